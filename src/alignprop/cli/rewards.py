"""Commands about rewards: their list, one in full, and the doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich.markup import escape

from alignprop.terminal import (
    FAILED,
    console,
    errors_told,
    loading,
    reward_list,
    status,
    tell,
    tell_diagnosis,
    tell_reward,
)

RewardName: TypeAlias = Annotated[str, typer.Argument(metavar="NAME", help="A reward's name, or module:attribute.")]

rewards_app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@rewards_app.callback(invoke_without_command=True)
def rewards(context: typer.Context) -> None:
    """List the rewards that have a name, show one in full, or examine one.

    Your own is any function (images, prompts) -> scores, named as [bold]module:attribute[/].

    [bold]alignprop rewards[/]

    [bold]alignprop rewards show clip-score[/]

    [bold]alignprop rewards check my_rewards:redness[/]
    """
    if context.invoked_subcommand is None:
        from alignprop.rewards import REWARDS, arguments_of

        console().print(reward_list(REWARDS, {name: arguments_of(name) for name in REWARDS}))


@rewards_app.command("show")
def show_reward(name: RewardName) -> None:
    """Show one reward in full, with its arguments.

    [bold]alignprop rewards show clip-score[/]
    """
    with errors_told():
        from alignprop.rewards import REWARDS, arguments_of, explanation_of

        tell_reward(name, REWARDS.get(name), arguments_of(name), explanation_of(name))


@rewards_app.command("check")
def check_reward(
    name: RewardName,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pictures to examine it on; without, the embedded model draws.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Of all pictures; without, their names: a_cat.png.")] = None,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="An argument of the reward; the value is YAML.")
    ] = [],  # noqa: B006
) -> None:
    """Examine a reward: scores, gradient, batch size, precision, cost. Exits with 1 if it is broken.

    [bold]alignprop rewards check emoji-aesthetic[/]

    [bold]alignprop rewards check my_rewards:redness --images photos[/]

    [bold]alignprop rewards check clip-score --set model=/path/to/clip[/]
    """
    with errors_told():
        from alignprop.config import JudgeTerm, Model, device_of, load_terms, read_overrides

        arguments = read_overrides(settings)
        with loading():
            from alignprop.rewards.doctor import examine
            from alignprop.rewards.specimens import drawn_specimens, folder_specimens

            specimens = folder_specimens(images, prompt) if images is not None else drawn_specimens(prompt)
            device = device_of(Model())
            reward = load_terms({name: JudgeTerm(arguments=arguments)}, device)[name]
        tell(f"[bold]{escape(name)}[/], on {escape(specimens.origin)}:\n")
        with status("Examining the reward"):
            diagnosis = examine(reward, specimens.images.to(device), specimens.prompts, name)
        tell_diagnosis(diagnosis)
        if diagnosis.broken:
            raise typer.Exit(FAILED)
