"""`alignprop mix --sweep`: what is asked for, checked before a model loads, then measured and shown."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from alignprop.cli.mixtures import read_members, write_mixture
from alignprop.drawing import base_sampler, base_settings, how_to_measure, settings_of
from alignprop.report import duration, number
from alignprop.terminal import loading, status, tell

if TYPE_CHECKING:
    from alignprop.config import Config, JudgeTerm
    from alignprop.mixing import StoredAdapter
    from alignprop.mixing.sweep import Declaration, SweepFile, Weights
    from alignprop.prompts import Prompts


@dataclass(frozen=True)
class Asked:
    """The command line of a sweep.

    Attributes:
        adapters: as the user calls them.
        output: the sweep's folder.
        num_points: of a side.
        with_base: whether the base model is a corner.
        prompts: their source; None for those of the first adapter's run.
        rewards: beside those of the runs.
        images_per_prompt: None for as in the run.
        seed: None for as in the run.
        chart: the two measures of the front; None to choose them.
    """

    adapters: Sequence[Path]
    output: Path
    num_points: int
    with_base: bool
    prompts: str | None
    rewards: tuple[str, ...]
    images_per_prompt: int | None
    seed: int | None
    chart: str | None

    @property
    def num_corners(self) -> int:
        """What is mixed, the base model counted."""
        return len(self.adapters) + self.with_base


def run_sweep(
    asked: Asked, model: str | None, steps: int | None, guidance: float | None, *, save_adapters: bool
) -> None:
    """Measure the points that are not there yet, and write the page."""
    from alignprop.mixing.measuring import chosen_prompts, merged_terms
    from alignprop.mixing.sweep import SweepFile, grid
    from alignprop.mixing.sweep_page import axes_of

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("A sweep draws on one process: call it by itself.")
    members = read_members(asked.adapters, model)
    configs = {name: settings_of(path) for name, path in zip(members, asked.adapters, strict=True)}
    first = next(iter(configs.values()))
    _require_settings(asked, next(iter(members)), first, model)
    prompts, chosen = chosen_prompts(first, asked.prompts)
    terms = merged_terms(configs, asked.rewards)
    declaration = _declared(asked, members, configs, chosen, terms, _sampling(asked, model, steps, guidance))
    axes = axes_of(declaration.document(), asked.chart)
    line = grid(asked.num_corners, asked.num_points, with_base=asked.with_base)
    points = list(dict.fromkeys([(0.0,) * len(members), *line]))
    file = SweepFile(asked.output, declaration, shlex.join(["alignprop", *sys.argv[1:]]))
    missing = set(points) - set(file.points())
    tell(f"{len(points)} points, {len(missing)} to measure, of {len(chosen)} prompts × {declaration.images_per_prompt}")
    if missing:
        _measure(file, points, members, terms, prompts, (asked.adapters[0], model, steps, guidance))
    if save_adapters:
        for weights in points:
            place = asked.output / "adapters" / "_".join(f"{weight:.4g}" for weight in weights)
            if not place.exists():
                write_mixture(members, weights, None, place, asked.adapters, model)
    _write_page(file, points, line if asked.num_corners == 2 else [], axes)


def _require_settings(asked: Asked, name: str, config: Config | None, model: str | None) -> None:
    """Refuse an adapter that does not tell what to sample, before anything loads.

    Raises:
        ConfigError: with all that is missing.
    """
    from alignprop.config import ConfigError

    if config is not None:
        return
    known = {"--model": model, "--prompts": asked.prompts, "--reward": asked.rewards}
    problems = [f"{option} is missing: {name} does not tell." for option, value in known.items() if not value]
    if problems:
        raise ConfigError(problems)


def _sampling(asked: Asked, model: str | None, steps: int | None, guidance: float | None) -> tuple[str, dict[str, Any]]:
    """The base model's name and the arguments of its call."""
    chosen, sampling = base_settings(model, asked.adapters[0], steps, guidance)
    return chosen.name, sampling.call()


def _declared(
    asked: Asked,
    members: Mapping[str, StoredAdapter],
    configs: Mapping[str, Config | None],
    prompts: Sequence[str],
    terms: Mapping[str, JudgeTerm],
    sampling: tuple[str, Mapping[str, Any]],
) -> Declaration:
    from alignprop.mixing.measuring import trained_by
    from alignprop.mixing.sweep import Declaration, digest_of

    first = next(iter(configs.values()))
    return Declaration(
        members={name: str(member.folder) for name, member in members.items()},
        digests={name: digest_of(member) for name, member in members.items()},
        model=sampling[0],
        sampling=sampling[1],
        prompts=list(prompts),
        rewards={name: term.model_dump(mode="json") for name, term in terms.items()},
        trained=trained_by(configs),
        **how_to_measure(first, asked.images_per_prompt, asked.seed),
    )


def _measure(
    file: SweepFile,
    points: Sequence[Weights],
    members: Mapping[str, StoredAdapter],
    terms: Mapping[str, JudgeTerm],
    prompts: Prompts,
    base: tuple[Path, str | None, int | None, float | None],
) -> None:
    """Load everything once, and tell every point as it is there."""
    from alignprop.config import load_terms
    from alignprop.mixing.schedule import load_members
    from alignprop.mixing.sweep import sweep
    from alignprop.mixing.sweep_page import titled
    from alignprop.spec import spec_of

    adapter, model, steps, guidance = base
    with loading():
        sampler, _ = base_sampler(model, adapter, steps, guidance)
        rewards = load_terms(terms, sampler.pipeline.device, prompts)
        folders = [member.folder for member in members.values()]
        names = load_members(sampler.pipeline, folders, spec_of(sampler.pipeline))
    found = sweep(file, points, sampler, names, rewards)
    for place, weights in enumerate(points, start=1):
        with status(f"Measuring point {place} of {len(points)}"):
            _, point, before = next(found)
        scores = ", ".join(f"{name} {number(s['mean'])}" for name, s in point["measured"]["rewards"].items())
        spent = "there already" if before else duration(point["seconds"])
        head = f"{escape(f'[{place}/{len(points)}]')} [bold]{escape(titled(list(members), weights))}[/]"
        tell(f"{head}: {escape(scores)}, {spent}")


def _write_page(file: SweepFile, points: Sequence[Weights], line: Sequence[Weights], axes: tuple[str, str]) -> None:
    from alignprop.mixing.sweep_page import write_page

    results = file.write(file.points())
    tell(escape(str(file.path)))
    try:
        tell(escape(str(write_page(file.folder, results, points, line, axes))))
    except ImportError as error:  # the pages are an extra
        tell(f"[yellow]No sweep.html: {escape(str(error))}[/]")
