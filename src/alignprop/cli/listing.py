"""Commands that list what there is: recipes and estimators."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.syntax import Syntax
from rich.table import Column, Table

from alignprop.terminal import console, errors_told, is_terminal, tell_estimators


def recipes(name: Annotated[str | None, typer.Argument(help="Print this one.")] = None) -> None:
    """List the recipes, or print one.

    [bold]alignprop recipes[/]

    [bold]alignprop recipes emoji > mine.yaml[/]
    """
    with errors_told():
        from alignprop.config import recipe_path
        from alignprop.config import recipes as known

        if name is not None:
            text = recipe_path(name).read_text(encoding="utf-8")
            console().print(Syntax(text, "yaml")) if is_terminal() else typer.echo(text, nl=False)
            return
        table = Table(Column("recipe", no_wrap=True), "what it does", box=None)
        for recipe, row in known().items():
            table.add_row(f"[bold]{recipe}[/]", row.description)
        console().print(table)


def estimators(name: Annotated[str | None, typer.Argument(help="Show this one in full.")] = None) -> None:
    """List the ways to turn a reward into gradients, or show one with its formula and its settings.

    [bold]alignprop estimators[/]

    [bold]alignprop estimators ddpo[/]

    [bold]alignprop train --set estimator.name=draft-k --set 'estimator.arguments={steps: 2}'[/]
    """
    with errors_told():
        from alignprop.config import describe_estimators

        tell_estimators(describe_estimators(name), in_full=name is not None)
