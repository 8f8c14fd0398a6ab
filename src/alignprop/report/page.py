"""A run folder as one page: `report.html`, a single offline file, made to be sent to a colleague.

Everything on it is read from the folder, so it can be written again at any time, also while the run goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignprop.charts import MAX_CURVES, Curve, curves_chart, scatter_chart
from alignprop.report.pages import data_uri, page_template, require_pages, versions
from alignprop.report.records import PICTURES, Record, config_of, in_order, is_trained, measures_of, prompt_sets
from alignprop.report.summary import Summary, summarise
from alignprop.report.watch import watch_of
from alignprop.runfolder import RunFolder, measured_alike, write_atomically

MAX_STRIP = 16
"""At most so many evaluations are shown in the strip of pictures."""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder, whatever there is of the run so far, and return its path.

    Raises:
        ImportError: The extra `report` (jinja2, matplotlib) is not installed.
    """
    require_pages()
    folder, summary = RunFolder(run_dir), summarise(run_dir)
    metrics, evaluations = folder.metrics.read(), measured_alike(folder.evaluations.read())
    config, sets = config_of(folder), prompt_sets(evaluations)
    page = page_template("report.html.j2").render(
        summary=summary,
        sets=sets,
        max_curves=MAX_CURVES,
        evaluations=evaluations,
        measures=measures_of,
        charts=_charts(metrics, evaluations, summary.kept_step),
        watch=watch_of(evaluations, summary.kept_step, (config.get("guard") or {}).get("max_fall")),
        guarded=config.get("guard") is not None,
        pairs=_pairs(folder, summary, sets),
        strip=_strip(folder, summary, sets),
        settings=dict(_flatten(config)),
        model=config.get("model", {}).get("name"),
        call=_call(config),
        adapter=folder.adapter.as_posix() if folder.adapter.exists() else None,
        versions=versions(),
    )
    path = run_dir / "report.html"
    write_atomically(path, page)
    return path


def _call(config: Record) -> Record:
    """What the pipeline's call was given, beside the prompt."""
    sampling = dict(config.get("sampling", {}))
    extra = sampling.pop("extra", {})
    return {name: value for name, value in {**sampling, **extra}.items() if value is not None}


def _flatten(settings: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as the dotted names that `--set` takes."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield (
                f"{prefix}{key}",
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str),
            )


@dataclass(frozen=True)
class _Panel:
    title: str
    note: str
    svg: str


def _charts(metrics: Sequence[Record], evaluations: Sequence[Record], kept_step: int | None) -> list[list[_Panel]]:
    """Two groups: rewards and diversity; small ones of how the training went."""
    steps = [record["step"] for record in metrics]

    def of_steps(key: str, title: str, note: str, height: float) -> list[_Panel]:
        values = [math.nan if record[key] is None else record[key] for record in metrics]
        return [_Panel(title, note, scatter_chart(steps, values, kept_step, height))] if metrics else []

    rewards = list(_evaluation_charts(evaluations, kept_step))
    rewards[1:1] = of_steps("reward", "training batches", "trained reward, moving mean", 2.1)
    norm = of_steps("grad_norm", "gradient norm", "before clipping", 1.3)
    live = of_steps("live_steps", "live denoising steps", "mean of a step", 1.3)
    return [rewards, norm + live]


def _evaluation_charts(evaluations: Sequence[Record], kept_step: int | None) -> Iterator[_Panel]:
    """Every reward and measure of the pictures, a curve for each set of prompts."""
    sets = prompt_sets(evaluations)
    for name in measures_of(evaluations[0], sets[0]) if evaluations else ():
        note = "trained" if is_trained(name, evaluations[0]) else PICTURES.get(name, "not trained")
        curves = [_curve(evaluations, prompts, name) for prompts in sets]
        yield _Panel(name, note, curves_chart(curves, kept_step))


def _curve(evaluations: Sequence[Record], prompts: str, name: str) -> Curve:
    records = [record for record in evaluations if prompts in record["sets"] and name in measures_of(record, prompts)]
    scores = [measures_of(record, prompts)[name] for record in records]
    return Curve([r["step"] for r in records], [s["mean"] for s in scores], [s["sem"] for s in scores])


@dataclass(frozen=True)
class _Picture:
    step: int
    uri: str


def _pairs(folder: RunFolder, summary: Summary, sets: Sequence[str]) -> dict[str, list[_Picture]]:
    """By set of prompts: the pictures of the first evaluation and of the one that it is compared with."""
    steps = [step for step in (summary.first_step, summary.compared_step) if step is not None]
    grids = {prompts: _grids(folder, prompts) for prompts in _sampled_sets(folder) if prompts in sets}
    return {
        prompts: [_picture(paths[step], step, max_width=2000) for step in steps if step in paths]
        for prompts, paths in grids.items()
    }


def _strip(folder: RunFolder, summary: Summary, sets: Sequence[str]) -> list[_Picture]:
    """The first set's pictures by step: at most `MAX_STRIP` evenly spaced ones and the kept one."""
    paths = next((_grids(folder, prompts) for prompts in _sampled_sets(folder) if prompts in sets), {})
    steps = np.array(list(paths), dtype=int)
    shown = steps[np.linspace(0, len(steps) - 1, min(len(steps), MAX_STRIP)).round().astype(int)]
    return [
        _picture(path, step, max_width=900)
        for step, path in paths.items()
        if step in shown or step == summary.kept_step
    ]


def _sampled_sets(folder: RunFolder) -> list[str]:
    return in_order(path.stem for path in folder.path.glob("samples/step-*/*.png"))


def _grids(folder: RunFolder, prompts: str) -> dict[int, Path]:
    """The sample grids of a set of prompts by step."""
    paths = sorted(folder.path.glob(f"samples/step-*/{prompts}.png"))
    return {int(path.parent.name.removeprefix("step-")): path for path in paths}


def _picture(path: Path, step: int, max_width: int) -> _Picture:
    return _Picture(step, data_uri(path, max_width))
