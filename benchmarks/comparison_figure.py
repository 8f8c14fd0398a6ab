"""A comparison as one picture for a page of the documentation: scores on unseen prompts against images scored.

    python benchmarks/comparison_figure.py docs/results/aesthetic/compare.json --output docs/results/aesthetic.svg \
        --measures emoji-aesthetic emoji-clip

A panel for each measure; thin lines are seeds, thick ones their mean, the dotted one is the base model. The horizontal
axis is logarithmic beyond its first fifth if one method was given many times the images of another.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

LOGARITHMIC_ABOVE = 4

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.hashsalt": "alignprop", "axes.spines.top": False, "axes.spines.right": False}


def values_of(sets: dict[str, Any], measure: str) -> Any:
    """A measure on the unseen prompts: a reward's name, or diversity."""
    unseen = sets["unseen"]
    return unseen["diversity"] if measure == "diversity" else unseen["rewards"][measure]


def draw(axes: Axes, results: dict[str, Any], measure: str) -> None:
    """All methods in one panel."""
    for number, (name, method) in enumerate(results["methods"].items()):
        colour = f"C{number}"
        for seed in method["seeds"].values():
            series = seed["series"]
            axes.plot(series["images"], values_of(series["sets"], measure), color=colour, linewidth=0.6, alpha=0.5)
        aggregated = method["aggregated"]["images"]
        means = values_of(aggregated["sets"], measure)["mean"]
        axes.plot(aggregated["x"], means, color=colour, linewidth=2, label=name)
    axes.axhline(values_of(results["base"], measure), color="grey", linestyle=":", linewidth=1)
    axes.set(title=measure, xlabel="images scored")


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--measures", nargs="+", required=True)
    arguments = parser.parse_args()
    results = json.loads(arguments.comparison.read_text(encoding="utf-8"))
    number = len(arguments.measures)
    figure, panels = plt.subplots(1, number, figsize=(4.4 * number, 3.4), layout="constrained", squeeze=False)
    spent = [method["spent"]["images"] for method in results["methods"].values()]
    for axes, measure in zip(panels[0], arguments.measures, strict=True):
        draw(axes, results, measure)
        if max(spent) >= LOGARITHMIC_ABOVE * min(spent):
            axes.set_xscale("symlog", linthresh=min(spent) / 5)
            axes.set_xlim(0)
            axes.xaxis.set_major_formatter("{x:g}")
    panels[0][0].legend(frameon=False, fontsize=9)
    figure.savefig(arguments.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
