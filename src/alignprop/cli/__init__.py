"""The command line: parse, call, print."""

from typing import Annotated

import typer

from alignprop.cli import adapters, listing, rewards, training
from alignprop.cli.comparing import compare
from alignprop.cli.mixing import mix

app = typer.Typer(
    name="alignprop",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Align diffusion models by backpropagating a reward through their own sampler.",
    epilog="Start with [bold]alignprop train[/]: it needs no download and takes some minutes.",
)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    """Options of every command."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"alignprop {installed('alignprop')}")
        raise typer.Exit


for command in (
    training.train,
    training.check,
    compare,
    adapters.sample,
    adapters.evaluate,
    adapters.export,
    mix,
    training.report,
    listing.recipes,
    listing.estimators,
):
    app.command()(command)
app.add_typer(rewards.rewards_app, name="rewards")


def main() -> None:
    """Run the command line."""
    app()
