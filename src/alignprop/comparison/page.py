"""`compare.html`: a comparison as one offline page, from what `compare.json` holds and the run folders' pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from alignprop.charts import DASHED, MAX_CURVES, Band, bands_chart
from alignprop.comparison import outcome
from alignprop.comparison.budget import read_budget
from alignprop.comparison.outcome import AXES, Results
from alignprop.report import data_uri, number, page_template, require_pages
from alignprop.runfolder import RunFolder, write_atomically

if TYPE_CHECKING:
    from markupsafe import Markup

LOGARITHMIC_ABOVE = 10
"""Methods that spend so many times as much as others are shown on a logarithmic axis."""

_SETS = {"unseen": "unseen prompts", "train": "training prompts"}


@dataclass(frozen=True)
class Measure:
    """What a chart and a column of the table show.

    Attributes:
        title: what a person calls it.
        set: the prompts.
        keys: where it is among the values of a set.
        note: whether it is trained.
    """

    title: str
    set: str
    keys: tuple[str, ...]
    note: str

    def of(self, values: Mapping[str, Any]) -> Any:
        """Its part of values by set of prompts."""
        found = values[self.set]
        for key in self.keys:
            found = found[key]
        return found

    @property
    def is_trained(self) -> bool:
        """Whether it is what the methods are trained on."""
        return self.keys == ("reward",)


@dataclass(frozen=True)
class Panel:
    """A chart with its caption."""

    title: str
    note: str
    svg: Markup


def write_page(folder: Path, results: Results) -> Path:
    """Write `compare.html` and return its path.

    Raises:
        ImportError: the extra `report` is not installed.
    """
    require_pages()
    measures = list(_measures(results))
    page = page_template("compare.html.j2").render(
        results=results,
        outcome=outcome,
        axes=AXES,
        axis=outcome.lead_axis(results),
        first=outcome.fastest(results, outcome.lead_axis(results)),
        measures=measures,
        charts={axis: list(_panels(results, measures, axis)) for axis in AXES},
        legend=_legend(results),
        omitted=list(results["methods"])[MAX_CURVES:],
        finals=list(_finals(results, measures)),
        pictures=list(_pictures(folder, results)),
        settings={name: list(_differences(results, name)) for name in results["methods"]},
        declaration=_declared(results),
        shown=_shown,
        name=folder.resolve().name,
    )
    path = folder / "compare.html"
    write_atomically(path, page)
    return path


def _measures(results: Results) -> Iterator[Measure]:
    """The trained reward on each set of prompts, then every other reward and the diversity on the unseen ones."""
    if not results["base"]:
        return
    trained = results["trained"]
    for name in (name for name in _SETS if name in results["base"]):
        yield Measure(outcome.trained_reward(results), name, ("reward",), f"trained, on {_SETS[name]}")
    rewards = results["base"]["unseen"]["rewards"]
    for reward in rewards:
        if reward not in trained or len(trained) > 1:
            part = "a part of what is trained" if reward in trained else "not trained"
            yield Measure(reward, "unseen", ("rewards", reward), f"{part}, on unseen prompts")
    yield Measure("diversity", "unseen", ("diversity",), "of the pictures of one unseen prompt")


def _panels(results: Results, measures: Sequence[Measure], axis: str) -> Iterator[Panel]:
    aggregated = [method["aggregated"] for method in results["methods"].values()]
    curves = [each and each[axis] for each in aggregated]
    ends = [curve["x"][-1] for curve in curves if curve]
    if not ends:
        return
    log_x = max(ends) > LOGARITHMIC_ABOVE * min(ends)
    for measure in measures:
        bands = [curve and Band(curve["x"], **measure.of(curve["sets"])) for curve in curves]
        goal = results["reach"]["value"] if measure.is_trained and measure.set == "unseen" else None
        yield Panel(measure.title, measure.note, bands_chart(bands, goal, log_x=log_x))


def _legend(results: Results) -> list[tuple[str, int, bool]]:
    """Methods with the place of their colour, and whether they are dashed."""
    return [(name, place, place in DASHED) for place, name in enumerate(list(results["methods"])[:MAX_CURVES])]


def _finals(results: Results, measures: Sequence[Measure]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """By row, each measure's mean with its interval and what it is of the base's."""
    base = results["base"]
    if base is None:
        return
    yield "base model", [(number(measure.of(base)), "") for measure in measures]
    starts = [measure.of(base) for measure in measures]
    for name, method in results["methods"].items():
        for title, found in ((name, method["final"]), (_gone_on(results, name), method["end"])):
            if found:
                intervals = [measure.of(found) for measure in measures]
                yield (
                    title,
                    [
                        (outcome.with_half_width(interval), _of_base(interval["mean"], start))
                        for interval, start in zip(intervals, starts, strict=True)
                    ],
                )


def _gone_on(results: Results, name: str) -> str:
    """A method after its own budget, where that is larger than the one of all."""
    own = results["declaration"]["budgets"].get(name)
    return f"{name}, after {outcome.amount(own)}" if own else name


def _of_base(value: float, start: float) -> str:
    return f"{100 * value / start:.0f} %" if start > 0 else ""


def _pictures(folder: Path, results: Results) -> Iterator[tuple[str, str]]:
    """Captions and grids of the unseen prompts: the base model's, then every method's of seed 0.

    Each at the evaluation nearest to the budget of all, and at its end if it went on.
    """
    budget = read_budget("budget", results["declaration"]["budget"])
    runs = {name: method["seeds"].get("0") for name, method in results["methods"].items()}
    evaluated = {name: run for name, run in runs.items() if run and run["series"]}
    for name, run in evaluated.items():
        files = RunFolder(folder / run["folder"])
        series = run["series"]
        grids = [files.samples(step) / "unseen.png" for step in series["step"]]
        if not all(grid.exists() for grid in grids):  # sound is not drawn
            continue
        if name == next(iter(evaluated)):
            yield "base model", data_uri(grids[0], max_width=2000)
        nearest = min(range(len(grids)), key=lambda place: abs(series[budget.unit][place] - budget.amount))
        for place in sorted({nearest, len(grids) - 1}):
            ended = run["finished"] or place < len(grids) - 1
            state = "" if ended else ", failed then" if run["failure"] else " so far"
            yield f"{name}, {series['images'][place]:,} images scored{state}", data_uri(grids[place], max_width=2000)


def _differences(results: Results, name: str) -> Iterator[tuple[str, str, str]]:
    """The settings of a method with what the recipe says, where it says something else."""
    for setting, value in results["methods"][name]["settings"].items():
        before: Any = results["declaration"]["recipe_settings"]
        for key in setting.split("."):
            before = before.get(key) if isinstance(before, Mapping) else None
        if before != value:
            yield setting, _shown(value), "the default" if before is None else _shown(before)


def _shown(value: Any) -> str:
    """A setting's value as `--set` takes it; several settings one after another."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _declared(results: Results) -> str:
    """What was declared, as YAML; the recipe's own settings are its file's."""
    declaration = {
        key: value for key, value in results["declaration"].items() if key not in ("recipe_settings", "command")
    }
    return yaml.safe_dump(declaration, sort_keys=False, allow_unicode=True)
