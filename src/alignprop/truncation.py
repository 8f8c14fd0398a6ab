"""How many of the last denoising steps stay live: truncated backpropagation through the sampling chain.

A truncation is drawn once for each micro-batch, and the same on every rank. K live steps are one contiguous window at
the end of the chain (AlignProp, arXiv 2310.03739, section 4.2).
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class Truncation(Protocol):
    """Draws K, the number of live steps."""

    def draw(self, num_steps: int, generator: torch.Generator) -> int:
        """How many of the last denoising steps stay live, in [1, num_steps].

        Raises:
            ValueError: the settings do not fit ``num_steps``.
        """
        ...


@dataclass(frozen=True)
class All:
    """Full backpropagation: every denoising step is live."""

    def draw(self, num_steps: int, generator: torch.Generator) -> int:
        """Always ``num_steps``."""
        return num_steps


@dataclass(frozen=True)
class Last:
    """The last ``steps`` denoising steps, always (DRaFT-K, arXiv 2309.17400)."""

    steps: int = 1

    def __post_init__(self) -> None:
        """Refuse a window without a step before any model is loaded."""
        if self.steps < 1:
            raise ValueError(f"truncation.steps={self.steps} needs at least 1: no live step means no gradient.")

    def draw(self, num_steps: int, generator: torch.Generator) -> int:
        """Always ``steps``."""
        _check_fits("truncation.steps", self.steps, num_steps)
        return self.steps


@dataclass(frozen=True)
class Uniform:
    """K uniform in [low, high], the paper's randomised truncation.

    Attributes:
        low: fewest live steps.
        high: most live steps; None for the number of denoising steps.
    """

    low: int = 1
    high: int | None = None

    def __post_init__(self) -> None:
        """Refuse an empty range before any model is loaded."""
        if self.low < 1 or (self.high is not None and self.high < self.low):
            raise ValueError(f"truncation needs 1 <= low <= high, but low={self.low} and high={self.high}.")

    def draw(self, num_steps: int, generator: torch.Generator) -> int:
        """One of the whole numbers from ``low`` to ``high``, each as likely."""
        high = num_steps if self.high is None else self.high
        _check_fits("truncation.high", high, num_steps)
        _check_fits("truncation.low", self.low, high)
        return int(torch.randint(self.low, high + 1, (), generator=generator))


@dataclass(frozen=True)
class Gaussian:
    """K normal around ``mean``, rounded and moved into [1, number of denoising steps].

    Attributes:
        mean: in denoising steps.
        std: in denoising steps.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        """Refuse what no draw can satisfy."""
        if self.mean < 1 or self.std < 0:
            raise ValueError(f"truncation needs mean >= 1 and std >= 0, but mean={self.mean} and std={self.std}.")

    def draw(self, num_steps: int, generator: torch.Generator) -> int:
        """A rounded normal draw; what falls outside is set to the nearest bound."""
        _check_fits("truncation.mean", self.mean, num_steps)
        drawn = self.mean + self.std * float(torch.randn((), generator=generator))
        return min(max(round(drawn), 1), num_steps)


def _check_fits(setting: str, value: float, num_steps: int) -> None:
    if not 1 <= value <= num_steps:
        raise ValueError(
            f"{setting}={value} needs 1 <= {setting.split('.')[1]} <= {num_steps}, the number of denoising steps."
        )
