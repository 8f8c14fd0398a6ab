"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

Settings: TypeAlias = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe; the value is YAML.")
]
RecipeName: TypeAlias = Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name or a YAML file.")]
