"""``python -m alignprop.cli``, which launchers of several processes need."""

from alignprop.cli import main

main()
