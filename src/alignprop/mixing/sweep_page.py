"""`sweep.html`: a sweep as one offline page, from `sweep.json` and the strips of pictures beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop.charts import Curve, Spot, curves_chart, front_chart
from alignprop.config import ConfigError
from alignprop.mixing.sweep import Weights, picture_of
from alignprop.report import data_uri, number, page_template, require_pages
from alignprop.runfolder import write_atomically

if TYPE_CHECKING:
    from markupsafe import Markup

DIVERSITY = "diversity"
"""Of the pictures of one prompt: a measure beside the rewards."""

Results = Mapping[str, Any]
"""The content of `sweep.json`."""


@dataclass(frozen=True)
class Point:
    """A mixture on the page.

    Attributes:
        label: its number.
        weights: of the members.
        title: in words.
        values: mean and standard error by measure.
        base: whether it is the base model.
        member: place of the member that it is; None for others.
        on_front: whether no other point is at least as good on both axes of the chart and better on one.
    """

    label: int
    weights: Weights
    title: str
    values: Mapping[str, tuple[float, float]]
    base: bool
    member: int | None
    on_front: bool


@dataclass(frozen=True)
class Panel:
    """A chart with its title."""

    title: str
    svg: Markup


def axes_of(declaration: Mapping[str, Any], asked: str | None) -> tuple[str, str]:
    """The two measures of the front: as asked for, else what the members were trained on, else what there is.

    Args:
        declaration: of the sweep.
        asked: two names with a comma between.

    Raises:
        ConfigError: what is asked for is not measured.
    """
    known = [*declaration["rewards"], DIVERSITY]
    if asked is not None:
        names = [name.strip() for name in asked.split(",")]
        if len(names) != 2 or not set(names) <= set(known) or names[0] == names[1]:
            raise ConfigError([f"--chart={asked} needs two of {', '.join(known)}, with a comma between."])
        return names[0], names[1]
    trained = [name for names in declaration["trained"].values() for name in names]
    first, second, *_ = dict.fromkeys([*trained, *known])
    return first, second


def undominated(values: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other pair is at least as large in both numbers and larger in one."""
    return [
        not any(x >= own_x and y >= own_y and (x, y) != (own_x, own_y) for x, y in values) for own_x, own_y in values
    ]


def write_page(
    folder: Path, results: Results, asked: Sequence[Weights], line: Sequence[Weights], axes: tuple[str, str]
) -> Path:
    """Write `sweep.html` and return its path.

    Args:
        folder: of the sweep.
        results: what was measured.
        asked: the points of the page; others of the folder are left out.
        line: those along a line, in order; none of a triangle.
        axes: the two measures of the front.

    Raises:
        ImportError: the extra `report` is not installed.
    """
    require_pages()
    members = list(results["declaration"]["members"])
    found = {tuple(point["weights"]): point["measured"] for point in results["points"]}
    points = _points(members, {weights: found[weights] for weights in asked}, axes)
    path = [asked.index(weights) for weights in line]
    page = page_template("sweep.html.j2").render(
        results=results,
        declaration=results["declaration"],
        name=folder.resolve().name,
        headline=headline(points, members, axes),
        lede=lede(points, axes),
        points=points,
        members=members,
        measures=list(points[0].values),
        axes=axes,
        front=front_chart([_spot(point, axes) for point in points], [path]),
        panels=list(_panels(points, path)),
        pictures=[(p, data_uri(file, 2000)) for p in points if (file := picture_of(folder, p.weights)).exists()],
        num_images=len(results["declaration"]["prompts"]) * results["declaration"]["images_per_prompt"],
    )
    write_atomically(folder / "sweep.html", page)
    return folder / "sweep.html"


def _points(members: Sequence[str], found: Mapping[Weights, Any], axes: tuple[str, str]) -> list[Point]:
    values = [_values(measured) for measured in found.values()]
    front = undominated([(own[axes[0]][0], own[axes[1]][0]) for own in values])
    return [
        Point(
            label=place,
            weights=weights,
            title=titled(members, weights),
            values=own,
            base=not any(weights),
            member=weights.index(1) if 1 in weights and sum(map(bool, weights)) == 1 else None,
            on_front=beaten_by_none,
        )
        for place, (weights, own, beaten_by_none) in enumerate(zip(found, values, front, strict=True))
    ]


def _values(measured: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    rewards = {name: (score["mean"], score["sem"]) for name, score in measured["rewards"].items()}
    return {**rewards, DIVERSITY: (measured["diversity"], 0.0)}


def titled(members: Sequence[str], weights: Weights) -> str:
    """A mixture in words: 0.7 × a + 0.3 × b, or what is its only member."""
    parts = {name: weight for name, weight in zip(members, weights, strict=True) if weight}
    if not parts:
        return "base model"
    words = [name if weight == 1 else f"{_weight(weight)} × {name}" for name, weight in parts.items()]
    base = 1 - sum(weights)
    return " + ".join([*words, *([f"{_weight(base)} × base"] if abs(base) > 1e-9 else [])])


def _weight(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def headline(points: Sequence[Point], members: Sequence[str], axes: tuple[str, str]) -> str:
    """What the members are on the two axes."""
    ends = [point for point in points if point.member is not None] or list(points)
    ends = ends if len(members) > 1 else [*(point for point in points if point.base), *ends]
    told = [f"{axis} {' → '.join(number(point.values[axis][0]) for point in ends)}" for axis in axes]
    return f"{' → '.join(point.title for point in ends)}: {', '.join(told)}"


def lede(points: Sequence[Point], axes: tuple[str, str]) -> str:
    """How the mixtures do against the ends."""
    between = [point for point in points if not point.base and point.member is None]
    kept = [point for point in between if point.on_front]
    base = next((point for point in points if point.base), None)
    first = f"{len(kept)} of {len(between)} mixtures are beaten by no other point on both." if between else ""
    beaten = [
        point.title
        for point in points
        if point.member is not None and any(_beats(each, point, axes) for each in between)
    ]
    second = f"A mixture beats {' and '.join(beaten)} on both." if beaten else ""
    start = (
        f"The base model has {' and '.join(f'{axis} {number(base.values[axis][0])}' for axis in axes)}." if base else ""
    )
    return " ".join(filter(None, (first, second, start)))


def _beats(one: Point, other: Point, axes: tuple[str, str]) -> bool:
    return all(one.values[axis][0] > other.values[axis][0] for axis in axes)


def _spot(point: Point, axes: tuple[str, str]) -> Spot:
    (x, x_sem), (y, y_sem) = (point.values[axis] for axis in axes)
    marked = point.base or point.member is not None
    return Spot(x, y, x_sem, y_sem, point.label, point.member, marked, point.on_front)


def _panels(points: Sequence[Point], path: Sequence[int]) -> Iterator[Panel]:
    """Every measure along a line, against the share of the way that is gone, in per cent."""
    line = [points[label] for label in path]
    if len(line) < 2:
        return
    shares = [round(100 * (1 - point.weights[0])) for point in line]
    for name in line[0].values:
        means, errors = zip(*(point.values[name] for point in line), strict=True)
        yield Panel(name, curves_chart([Curve(shares, means, errors)], None))
