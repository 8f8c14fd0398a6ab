"""`alignprop evaluate --strengths`: an adapter at several strengths, and the best of them."""

from __future__ import annotations

import json
import math
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from alignprop.drawing import adapted, base_sampler, how_to_measure, measures, settings_of
from alignprop.terminal import console, loading, set_table, status, tell

if TYPE_CHECKING:
    from rich.table import Table

    from alignprop.config import Config
    from alignprop.guard import Guard
    from alignprop.rewards import Reward, WeightedSum
    from alignprop.rollout import Sampler

PAGE = "strengths.html"


@dataclass(frozen=True)
class Asked:
    """What the command line says.

    Attributes:
        adapter: a run, or an adapter's folder.
        strengths: numbers with commas between.
        model: the base model's name, if not the adapter's own.
        prompts: their source, if not the run's.
        rewards: names, if not the run's.
        images_per_prompt: pictures of each prompt, if not the run's.
        seed: of the noise, if not the run's.
        steps: denoising steps, if not the run's.
        guidance: if not the run's.
        output: the page; None for one in the run.
        as_json: whether to print JSON.
    """

    adapter: Path
    strengths: str
    model: str | None
    prompts: str | None
    rewards: Sequence[str]
    images_per_prompt: int | None
    seed: int | None
    steps: int | None
    guidance: float | None
    output: Path | None
    as_json: bool


def read_strengths(text: str) -> list[float]:
    """The strengths in rising order, with 0 among them, which all others are compared with.

    Raises:
        ConfigError: the text says something else.
    """
    from alignprop.config import ConfigError

    try:
        found = {float(part) for part in text.split(",")}
    except ValueError:
        found = {math.nan}
    if not all(map(math.isfinite, found)) or found == {0.0}:
        raise ConfigError([f"--strengths={text} needs numbers with commas between, as in --strengths 0.5,1,1.5."])
    return sorted(found | {0.0})


def evaluate_strengths(asked: Asked) -> None:
    """Measure an adapter at every strength, and write the page."""
    from alignprop.config import Config, guard_of
    from alignprop.mixing.schedule import holds_schedule

    strengths = read_strengths(asked.strengths)
    with loading():
        sampler, folder = base_sampler(asked.model, asked.adapter, asked.steps, asked.guidance)
        assert folder is not None, "an adapter was asked for"
        if holds_schedule(folder):
            raise ValueError(f"{folder} has weights of its own for each denoising step: mix it with other weights.")
        config = settings_of(asked.adapter)
        rewards, sets = measures(config, asked.rewards, asked.prompts, sampler.pipeline.device)
        objective = _objective(config, rewards, asked.rewards)
        sampler = adapted(sampler, folder)
    with tempfile.TemporaryDirectory() as scratch:
        how = how_to_measure(config, asked.images_per_prompt, asked.seed)
        lines = _measured(how, sampler, sets, rewards, objective, strengths, Path(scratch))
        guard = guard_of(config or Config())
        best = _judge(lines, guard)
        if asked.as_json:
            typer.echo(json.dumps({"best": best, "strengths": lines}, indent=2))
            return
        console().print(_table(lines, best))
        _write_page(asked, lines, best, guard, Path(scratch))


def _objective(config: Config | None, rewards: Mapping[str, Reward], named: Sequence[str]) -> WeightedSum:
    """What the run optimised; of rewards named on the command line the first."""
    from alignprop.config import shaped
    from alignprop.rewards import WeightedSum

    if config is not None and not named:
        return shaped(config.rewards, rewards)
    first = next(iter(rewards))
    return WeightedSum({first: rewards[first]}, {first: 1.0})


def _measured(
    how: Mapping[str, Any],
    sampler: Sampler,
    sets: Mapping[str, Sequence[str]],
    rewards: Mapping[str, Reward],
    objective: WeightedSum,
    strengths: Sequence[float],
    scratch: Path,
) -> list[dict[str, Any]]:
    """A line of each strength as in `evaluation.jsonl`; the pictures of the first set of prompts go into a folder."""
    from alignprop.evaluation import draw, summaries
    from alignprop.measures import evaluate
    from alignprop.strength import set_strength

    lines: list[dict[str, Any]] = []
    for strength in (0.0, *(value for value in strengths if value)):  # the base model first, to compare with
        set_strength(sampler.pipeline, strength, sampler.spec)
        with status(f"Measuring strength {strength:g}"):
            results = {name: evaluate(sampler, chosen, rewards, **how) for name, chosen in sets.items()}
        if not lines:
            base = {name: result.compact() for name, result in results.items()}
        first = lines[0]["sets"] if lines else None
        found = summaries(results, base, objective, first)
        lines.append({"step": strength, "trained": list(objective.weights), "sets": found})
        draw(next(iter(results.values())), _picture(scratch, strength))
    return sorted(lines, key=lambda line: float(line["step"]))


def _picture(scratch: Path, strength: float) -> Path:
    return scratch / f"{strength:g}.png"


def _judge(lines: list[dict[str, Any]], guard: Guard) -> float:
    """Add what the guard warns of to each line, and return the best strength."""
    base = next(line for line in lines if line["step"] == 0)
    for line in lines:
        line |= guard.told(base, line)
    best = max(lines, key=lambda line: guard.value(base, line))
    return float(best["step"])


def _table(lines: Sequence[Mapping[str, Any]], best: float) -> Table:
    """The rewards on the first set of prompts by strength."""
    name, measured = next(iter(lines[0]["sets"].items()))
    table = set_table(name, measured, "strength", *measured["rewards"], "diversity", "")
    for line in lines:
        found = line["sets"][name]
        mark = "[green]best[/]" if line["step"] == best else f"[yellow]{escape(', '.join(line['alarms']))}[/]"
        scores = (f"{score['mean']:.4g} ± {score['sem']:.2g}" for score in found["rewards"].values())
        table.add_row(f"{line['step']:g}", *scores, f"{found['diversity']:.3g}", mark)
    return table


def _write_page(asked: Asked, lines: Sequence[Mapping[str, Any]], best: float, guard: Guard, scratch: Path) -> None:
    from alignprop.report import versions
    from alignprop.report.strengths import write_strengths

    page = asked.output or asked.adapter / PAGE
    drawn = {line["step"]: _picture(scratch, line["step"]) for line in lines}
    pictures = {strength: path for strength, path in drawn.items() if path.exists()}
    facts = {"command": shlex.join(["alignprop", *sys.argv[1:]]), **versions()}
    try:
        write_strengths(page, asked.adapter.resolve().name, lines, best, guard.max_fall, pictures, facts)
    except ImportError as error:  # the pages are an extra
        tell(f"[yellow]No page: {escape(str(error))}[/]")
        return
    tell(f"Wrote {escape(str(page))}")
