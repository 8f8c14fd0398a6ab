"""`alignprop mix`: parse, call, print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from alignprop.cli.adapters import Guidance, ModelName, Steps
from alignprop.cli.mixtures import quality, read_members, write_card, write_mixture
from alignprop.terminal import errors_told, tell

if TYPE_CHECKING:
    from alignprop.mixing import StepWeights, StoredAdapter


def mix(
    adapters: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Runs, or adapters' folders.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Of the mixture, or of the sweep.")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="One for each adapter: any numbers. What lacks of 1 is the base model's."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="R", help="Compress to this rank, and print the error; without, exact.")
    ] = None,
    late_weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="Of the late denoising steps; --weights is of the early ones.")
    ] = None,
    switch_at: Annotated[
        float | None, typer.Option(metavar="X", help="Share of the chain after which they hold (default 0.5).")
    ] = None,
    ramp: Annotated[
        float | None, typer.Option(metavar="X", help="Share of the chain over which they come (default 0).")
    ] = None,
    sweep: Annotated[
        int | None, typer.Option(metavar="N", help="Measure N mixtures from A to B, or N to a side of A, B, C.")
    ] = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="The base model is a corner of the sweep.")] = False,
    prompts: Annotated[
        str | None, typer.Option(help="Of a sweep: a list's name, a file or module:function; else A's unseen ones.")
    ] = None,
    reward: Annotated[
        list[str], typer.Option("--reward", help="Measured beside those of the runs; may be given several times.")
    ] = [],  # noqa: B006  # typer copies it
    images_per_prompt: Annotated[
        int | None, typer.Option(min=1, help="Pictures of each prompt of a sweep; else as in A's run.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of a sweep's noise; else as in A's run.")] = None,
    chart: Annotated[str | None, typer.Option(metavar="X,Y", help="The two measures of the front.")] = None,
    save_adapters: Annotated[bool, typer.Option("--save-adapters", help="Keep the mixture of every point.")] = False,
    model: ModelName = None,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Mix adapters of one base model by adding their weight updates up. Nothing is trained.

    [bold]alignprop mix runs/a runs/b --weights 0.7,0.3 --output mixed[/]

    [bold]alignprop mix runs/a --weights 0.5 --output half[/]  half way from the base model

    [bold]alignprop mix runs/a runs/b --weights 1.2,-0.2 --rank 4 --output mixed[/]

    By denoising steps, A for the layout and B for the detail:

    [bold]alignprop mix runs/a runs/b --weights 1,0 --late-weights 0,1 --switch-at 0.4 --output mixed[/]

    Measured along the line from A to B, as one page; the same command goes on with what was stopped:

    [bold]alignprop mix runs/a runs/b --sweep 5 --output sweeps/a-b[/]

    [bold]alignprop mix runs/a --sweep 5 --with-base --reward clip-score --output sweeps/a[/]
    """
    with errors_told():
        of_sweep = {
            "--with-base": with_base,
            "--prompts": prompts,
            "--reward": reward,
            "--images-per-prompt": images_per_prompt,
            "--seed": seed,
            "--chart": chart,
            "--save-adapters": save_adapters,
            "--steps": steps,
            "--guidance": guidance,
        }
        of_mixture = {
            "--weights": weights,
            "--rank": rank,
            "--late-weights": late_weights,
            "--switch-at": switch_at,
            "--ramp": ramp,
        }
        _require_fitting(sweep, of_sweep, of_mixture, len(adapters))
        if sweep is not None:
            from alignprop.cli.sweeping import Asked, run_sweep

            asked = Asked(adapters, output, sweep, with_base, prompts, tuple(reward), images_per_prompt, seed, chart)
            run_sweep(asked, model, steps, guidance, save_adapters=save_adapters)
            return
        numbers = _numbers("--weights", weights, len(adapters))
        late = _numbers("--late-weights", late_weights, len(adapters)) if late_weights is not None else None
        _require_new(output)
        members = read_members(adapters, model)
        if late is None:
            _save_mixture(members, numbers, rank, output, adapters, model)
        else:
            from alignprop.mixing import StepWeights

            schedule = StepWeights(numbers, late, 0.5 if switch_at is None else switch_at, ramp or 0.0)
            _save_schedule(members, schedule, output, adapters, model)


def _require_fitting(
    sweep: int | None, of_sweep: dict[str, Any], of_mixture: dict[str, Any], num_adapters: int
) -> None:
    """Refuse options that do not go together.

    Raises:
        ConfigError: with all of them.
    """
    from alignprop.config import ConfigError

    foreign, kind = (of_sweep, "a sweep: add --sweep N") if sweep is None else (of_mixture, "one mixture: leave it out")
    given = [name for name, value in foreign.items() if value not in (None, False, [])]
    problems = [f"{name} is of {kind}." for name in given]
    if sweep is None:
        if of_mixture["--weights"] is None:
            problems.append("--weights is missing: give a number for each adapter, as in --weights 0.7,0.3.")
        if of_mixture["--late-weights"] is None:
            later = [name for name in ("--switch-at", "--ramp") if of_mixture[name] is not None]
            problems += [f"{name} is of mixtures by denoising steps: add --late-weights." for name in later]
        elif of_mixture["--rank"] is not None:
            problems.append("--rank is of one mixture for all denoising steps: leave it or --late-weights out.")
    else:
        corners = num_adapters + bool(of_sweep["--with-base"])
        if corners not in (2, 3):
            problems.append(f"--sweep is over 2 or 3 corners, and here are {corners}, --with-base counted.")
        if sweep < 2:
            problems.append(f"--sweep={sweep} needs at least 2, the points of a side.")
    if problems:
        raise ConfigError(problems)


def _numbers(option: str, text: str | None, count: int) -> tuple[float, ...]:
    """One finite number for each adapter.

    Raises:
        ConfigError: the text says something else.
    """
    from alignprop.config import ConfigError

    try:
        found = tuple(float(part) for part in (text or "").split(","))
    except ValueError:
        raise ConfigError([f"{option}={text} needs numbers with commas between, as in {option} 0.7,0.3."]) from None
    if len(found) != count:
        raise ConfigError([f"{option}={text} has {len(found)} numbers for {count} adapters: give one for each."])
    if not all(map(math.isfinite, found)):
        raise ConfigError([f"{option}={text} needs finite numbers."])
    return found


def _require_new(output: Path) -> None:
    from alignprop.config import ConfigError
    from alignprop.runfolder import is_taken

    if is_taken(output):
        raise ConfigError([f"{output} is not empty: give another folder, --output DIR."])


def _save_mixture(
    members: dict[str, StoredAdapter],
    weights: Sequence[float],
    rank: int | None,
    output: Path,
    adapters: Sequence[Path],
    model: str | None,
) -> None:
    mixture = write_mixture(members, weights, rank, output, adapters, model)
    tell(f"{_formula(members, weights)}, {quality(mixture)}")
    tell(f"Wrote {escape(str(output))}")


def _formula(members: dict[str, StoredAdapter], weights: Sequence[float]) -> str:
    from alignprop.mixing.sweep_page import titled

    return f"[bold]{escape(titled(list(members), tuple(weights)))}[/]"


def _save_schedule(
    members: dict[str, StoredAdapter],
    schedule: StepWeights,
    output: Path,
    adapters: Sequence[Path],
    model: str | None,
) -> None:
    from alignprop.mixing import save_schedule

    save_schedule(schedule, members, output)
    rows = {
        name: {"early": f"{early:g}", "late": f"{late:g}", "adapter": f"`{member.folder}`"}
        for (name, member), early, late in zip(members.items(), schedule.early, schedule.late, strict=True)
    }
    how = f"over {schedule.ramp:g} of the chain around" if schedule.ramp else "behind"
    told = f"The weights change from early to late {how} {schedule.switch_at:g} of the denoising chain."
    write_card(output, model or next(iter(members.values())).model, rows, told, adapters[0], by_steps=True)
    tell(f"Early: {_formula(members, schedule.early)}\nLate:  {_formula(members, schedule.late)}\n{told}")
    tell(f"Wrote {escape(str(output))}")
