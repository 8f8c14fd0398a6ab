"""Numbers as a person writes them."""

from __future__ import annotations

import math


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, with a real minus: 0.291, 7.91, 12.3, 1,234."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.{digits}g}".rstrip(".")
    return text.replace("-", "−")


def lower_bound(value: float, digits: int = 3) -> str:
    """A number that another is above, in words that stay true: never rounded up, ``more than 592`` for 592.6."""
    unit = 10.0 ** max(math.floor(math.log10(value)) - digits + 1, -12) if 0 < value < 100 else 1.0
    return f"more than {number(math.floor(value / unit * (1 + 1e-12)) * unit, digits)}"


def signed(value: float) -> str:
    """A difference to one decimal: +2.4, −0.1."""
    return f"{value:+.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as a person says them: 41 s, 2 min 41 s, 3 h 12 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def memory(megabytes: float) -> str:
    """Megabytes as MB or GB."""
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"


def prompts_in_words(name: str) -> str:
    """A set of prompts as a person calls it."""
    return "training prompts" if name == "train" else f"{name} prompts"
