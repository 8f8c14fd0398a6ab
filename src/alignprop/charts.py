"""Small charts as inline SVG: their numbers are text, their colours the CSS variables of the page that holds them."""

from __future__ import annotations

import io
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
_MUTED, _LINE, *_CURVES = "#10fe01", "#10fe02", "#10fe03", "#10fe04", "#10fe05"
_CSS_COLOURS = {
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
    **{colour: f"var(--curve-{index})" for index, colour in enumerate(_CURVES)},
}

MAX_CURVES = len(_CURVES)
"""So many curves have a colour of their own."""

# What an inline SVG does without; the ids would clash with those of other charts.
_BALLAST = r"^.*?(?=<svg)|<metadata>.*?</metadata>| xmlns(:xlink)?=\"[^\"]*\"| id=\"\w+_\d+\""


@dataclass(frozen=True)
class Curve:
    """Means at some steps, with their standard errors."""

    steps: Sequence[int]
    mean: Sequence[float]
    sem: Sequence[float]


def curves_chart(curves: Sequence[Curve], marked_step: int | None) -> Markup:
    """Draw lines with bands of one standard error, the first on top; the page colours them by `--curve-<index>`."""
    figure, axes = _axes(marked_step, height=2.1)
    for curve, colour in reversed(list(zip(curves, _CURVES, strict=False))):
        mean, sem = np.array(curve.mean, dtype=float), np.array(curve.sem, dtype=float)
        axes.fill_between(curve.steps, mean - sem, mean + sem, color=colour, alpha=0.16, linewidth=0)
        axes.plot(curve.steps, mean, color=colour, linewidth=1.6, marker="o", markersize=3)
    return _inline(figure)


def scatter_chart(steps: Sequence[int], values: Sequence[float], marked_step: int | None, height: float) -> Markup:
    """Draw every value as a faint dot and their moving mean as a line; `height` in inches of a width of 4.6."""
    figure, axes = _axes(marked_step, height)
    numbers = np.array(values, dtype=float)
    axes.plot(steps, numbers, ".", color=_MUTED, markersize=3.5, alpha=0.45)
    axes.plot(steps, moving_mean(numbers), color=_MUTED, linewidth=1.6)
    return _inline(figure)


def moving_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A centred mean over a tenth of the values, over fewer towards both ends."""
    half = len(values) // 20
    return np.array([values[max(0, index - half) : index + half + 1].mean() for index in range(len(values))])


def _axes(marked_step: int | None, height: float) -> tuple[Figure, Axes]:
    """An empty chart: pale horizontal lines, few ticks, the marked step as a dotted line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=_LINE, linewidth=0.7)
    axes.tick_params(length=0, labelcolor=_MUTED, labelsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if marked_step is not None:
        axes.axvline(marked_step, color=_MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
    return figure, axes


def _inline(figure: Figure) -> Markup:
    import matplotlib as mpl
    from markupsafe import Markup

    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "alignprop"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(_BALLAST, "", stream.getvalue(), flags=re.DOTALL)
    for marker, colour in _CSS_COLOURS.items():
        svg = svg.replace(marker, colour)
    return Markup(svg)  # it holds numbers alone, nothing of the user's
