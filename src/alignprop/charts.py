"""Small charts as inline SVG: their numbers are text, their colours the CSS variables of the page that holds them."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# Matplotlib knows no CSS variables: it draws in marker colours, which are replaced in the SVG's text.
_MUTED, _LINE, *_CURVES = (f"#10fe{place:02}" for place in range(1, 11))
_CSS_COLOURS = {
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
    **{colour: f"var(--curve-{index})" for index, colour in enumerate(_CURVES)},
}

MAX_CURVES = len(_CURVES)
"""So many curves have a colour of their own."""

DASHED = range(4, MAX_CURVES)
"""Places of the curves that `bands_chart` dashes, as four colours are told apart more easily than eight."""

# What an inline SVG does without; the ids would clash with those of other charts.
_BALLAST = r"^.*?(?=<svg)|<metadata>.*?</metadata>| xmlns(:xlink)?=\"[^\"]*\"| id=\"\w+_\d+\""


@dataclass(frozen=True)
class Curve:
    """Means at some steps, with their standard errors."""

    steps: Sequence[float]
    mean: Sequence[float]
    sem: Sequence[float]


def curves_chart(curves: Sequence[Curve], marked_step: int | None) -> Markup:
    """Draw lines with bands of one standard error, the first on top; the page colours them by `--curve-<index>`."""
    figure, axes = _axes(marked_step, height=2.1)
    _draw_curves(axes, curves, _CURVES)
    return _inline(figure)


def _draw_curves(axes: Axes, curves: Sequence[Curve], colours: Sequence[str]) -> None:
    for curve, colour in reversed(list(zip(curves, colours, strict=False))):
        mean, sem = np.array(curve.mean, dtype=float), np.array(curve.sem, dtype=float)
        axes.fill_between(curve.steps, mean - sem, mean + sem, color=colour, alpha=0.16, linewidth=0)
        axes.plot(curve.steps, mean, color=colour, linewidth=1.6, marker="o", markersize=3)


def watch_chart(
    trained: Curve, watched: Sequence[Curve], worth: Curve | None, marked_x: float | None, floor: float | None
) -> Markup:
    """Draw what is trained above what watches it, along one axis; the page colours them by `--curve-<index>`.

    Args:
        trained: takes the first colour.
        watched: take the others.
        worth: of both together, below them in grey; None for none.
        marked_x: drawn as a dotted vertical line.
        floor: value of what is watched that is drawn as a dotted horizontal line.
    """
    from matplotlib.figure import Figure

    rows: list[tuple[Sequence[Curve], Sequence[str]]] = [([trained], _CURVES)]
    rows += [(watched, _CURVES[1:])] if watched else []
    rows += [([worth], [_MUTED])] if worth else []
    figure = Figure(figsize=(7.4, 0.4 + 1.9 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (curves, colours) in zip(panels, rows, strict=True):
        _style(axes, marked_x, whole=all(float(x).is_integer() for x in trained.steps))
        _draw_curves(axes, curves, colours)
    if watched and floor is not None:
        panels[1].axhline(floor, color=_MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
    return _inline(figure)


@dataclass(frozen=True)
class Band:
    """A mean curve and its interval, whose bounds are None where a single value gives none."""

    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float | None]
    high: Sequence[float | None]


def bands_chart(bands: Sequence[Band | None], marked_value: float | None, *, log_x: bool) -> Markup:
    """Draw lines with bands, the first on top, each in the colour of its place; the fifth and later ones are dashed.

    Args:
        bands: None leaves a colour out.
        marked_value: drawn as a dotted horizontal line.
        log_x: whether the horizontal axis is logarithmic beyond its first point that is not 0.
    """
    figure, axes = _axes(None, height=2.5)
    drawn = [(place, band) for place, band in enumerate(bands[:MAX_CURVES]) if band is not None]
    if log_x:
        _logarithmic(axes, *_range([x for _, band in drawn for x in band.x if x > 0]))
    for place, band in reversed(drawn):
        colour, style = _CURVES[place], "--" if place in DASHED else "-"
        if None not in band.low:
            low, high = np.array(band.low, dtype=float), np.array(band.high, dtype=float)
            axes.fill_between(band.x, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(band.x, band.mean, color=colour, linestyle=style, linewidth=1.6, marker="o", markersize=2.5)
    _room_for_lines(axes, [value for _, band in drawn for value in band.mean])
    if marked_value is not None:
        axes.axhline(marked_value, color=_MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
    return _inline(figure)


def _room_for_lines(axes: Axes, values: Sequence[float]) -> None:
    """Cut bands off that would flatten all lines, as those of two seeds may."""
    (first, last), (low, high) = _range(values), axes.get_ylim()
    span = last - first
    if span:
        axes.set_ylim(max(low, first - span), min(high, last + span))


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _logarithmic(axes: Axes, first: float, last: float) -> None:
    """A logarithmic axis with 0 on it, to the left of the first value."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    ticks = [factor * 10.0**decade for decade in decades for factor in (1, 3)]
    axes.set_xscale("symlog", linthresh=first, linscale=0.4)
    axes.set_xlim(0, 1.1 * last)
    axes.xaxis.set_major_locator(FixedLocator([0, *(tick for tick in ticks if first <= tick <= last)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))


def scatter_chart(steps: Sequence[int], values: Sequence[float], marked_step: int | None, height: float) -> Markup:
    """Draw every value as a faint dot and their moving mean as a line; `height` in inches of a width of 4.6."""
    figure, axes = _axes(marked_step, height)
    numbers = np.array(values, dtype=float)
    axes.plot(steps, numbers, ".", color=_MUTED, markersize=3.5, alpha=0.45)
    axes.plot(steps, moving_mean(numbers), color=_MUTED, linewidth=1.6)
    return _inline(figure)


@dataclass(frozen=True)
class Spot:
    """A point of two measures.

    Attributes:
        x: the first measure.
        y: the second.
        x_sem: standard error of the first.
        y_sem: of the second.
        label: the number of its row in the page's table.
        colour: place of its curve's colour; None for the muted one.
        marked: whether it is drawn large.
        filled: whether it is filled, or a ring.
    """

    x: float
    y: float
    x_sem: float
    y_sem: float
    label: int
    colour: int | None
    marked: bool
    filled: bool


def front_chart(spots: Sequence[Spot], paths: Sequence[Sequence[int]]) -> Markup:
    """Draw points of two measures with crosses of one standard error, and lines that join some of them.

    Args:
        spots: all points.
        paths: places of the spots along each line.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(None, height=3.4)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x", color=_LINE, linewidth=0.7)
    axes.margins(0.09)
    for path in paths:
        axes.plot([spots[i].x for i in path], [spots[i].y for i in path], color=_MUTED, linewidth=1, zorder=1)
    for spot in spots:
        colour = _MUTED if spot.colour is None else _CURVES[spot.colour % MAX_CURVES]
        axes.errorbar(
            spot.x, spot.y, spot.y_sem, spot.x_sem, fmt="none", ecolor=colour, alpha=0.35, linewidth=0.8, zorder=1
        )
        size, face = 7.5 if spot.marked else 5, colour if spot.filled else "none"
        axes.plot(spot.x, spot.y, "o", color=colour, markersize=size, markerfacecolor=face, zorder=2)
        axes.annotate(
            str(spot.label), (spot.x, spot.y), (5, 5), textcoords="offset points", fontsize=8, color=colour, zorder=3
        )
    return _inline(figure)


def moving_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A centred mean over a tenth of the values, over fewer towards both ends."""
    half = len(values) // 20
    return np.array([values[max(0, index - half) : index + half + 1].mean() for index in range(len(values))])


def _axes(marked_step: int | None, height: float) -> tuple[Figure, Axes]:
    """An empty chart: pale horizontal lines, few ticks, the marked step as a dotted line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, height), layout="constrained")
    axes = figure.add_subplot()
    _style(axes, marked_step, whole=True)
    return figure, axes


def _style(axes: Axes, marked_x: float | None, *, whole: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=_LINE, linewidth=0.7)
    axes.tick_params(length=0, labelcolor=_MUTED, labelsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if marked_x is not None:
        axes.axvline(marked_x, color=_MUTED, linewidth=0.9, linestyle=(0, (2, 2)))


def _inline(figure: Figure) -> Markup:
    import matplotlib as mpl
    from markupsafe import Markup

    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "alignprop"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = _with_own_ids(re.sub(_BALLAST, "", stream.getvalue(), flags=re.DOTALL))
    for marker, colour in _CSS_COLOURS.items():
        svg = svg.replace(marker, colour)
    return Markup(svg)  # it holds numbers alone, nothing of the user's


def _with_own_ids(svg: str) -> str:
    """Ids that no other chart of the page has: a clip path is none if the first of its name is in a hidden part."""
    own = hashlib.sha256(svg.encode()).hexdigest()[:10]
    return re.sub(r'(?<= id=")[\w.]+(?=")|(?<=url\(#)\w+|(?<=href="#)\w+', lambda name: f"{name[0]}-{own}", svg)
