"""Means over seeds with their intervals, curves on a common grid, and where a curve first reaches a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
"""Of every interval."""


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds, and the bounds that hold the mean of all seeds with :data:`CONFIDENCE`.

    Attributes:
        mean: of the values.
        low: None for a single value, which says nothing about others.
        high: likewise.
        n: how many values.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half_width(self) -> float | None:
        """What stands behind ±."""
        return None if self.high is None else self.high - self.mean


def t_probability(t: float, degrees: int) -> float:
    """Probability that a Student-t variable lies in [-t, t], by the finite series for whole degrees of freedom.

    Abramowitz and Stegun, equations 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t for which [-t, t] holds ``confidence``: 12.706 for one degree of freedom and 0.95, 2.776 for four."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < confidence:
        high *= 2
    for _ in range(100):  # halves the interval to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of at least one value, with its Student-t interval."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Interval(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def common_grid(grids: Sequence[Sequence[float]]) -> list[float]:
    """Points at which curves can be compared, inside the range that all of them cover.

    The curves' own points where these agree; else as many as the shortest has, evenly spaced.
    """
    first = list(grids[0])
    if all(list(grid) == first for grid in grids):
        return first
    low, high = max(grid[0] for grid in grids), min(grid[-1] for grid in grids)
    return [float(x) for x in np.linspace(low, high, min(map(len, grids)))]


def interpolate(points: Sequence[float], xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """A curve at some points of its range, by linear interpolation; ``xs`` do not fall."""
    assert xs[0] <= min(points) and max(points) <= xs[-1], "nothing is extrapolated"
    return [float(y) for y in np.interp(points, xs, ys)]


def crossing(ys: Sequence[float], value: float) -> float | None:
    """Where a curve first reaches a value, as a place among its points: 1.5 lies halfway from the second to the third.

    Returns:
        None if it does not.
    """
    for place, y in enumerate(ys):
        if y >= value:
            return place - (y - value) / (y - ys[place - 1]) if place else 0.0
    return None


def at_place(xs: Sequence[float], place: float) -> float:
    """The value at a place among points, as :func:`crossing` gives it."""
    return interpolate([place], range(len(xs)), xs)[0]
