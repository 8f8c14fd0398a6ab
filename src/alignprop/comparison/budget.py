"""What a run may spend, as ``images=640`` or ``seconds=300``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNITS = {"images": "images_scored", "seconds": "train_seconds"}
"""Units of a budget, with the key of `evaluation.jsonl` that counts them."""

MANY_STEPS = 10**9
"""Optimizer steps that no run reaches: the budget ends it."""


@dataclass(frozen=True)
class Budget:
    """An amount of images scored, or of seconds that the training steps take.

    Attributes:
        unit: a key of :data:`UNITS`.
        amount: above 0, whole for images.
    """

    unit: str
    amount: float

    def __str__(self) -> str:
        return f"{self.unit}={self.amount:g}" if self.amount < 1e6 else f"{self.unit}={self.amount!r}"

    def settings(self, evaluations: int) -> dict[str, Any]:
        """The settings of a run that spends it, evaluated so many times beside the base model."""
        each = self.amount / evaluations
        return {
            "guard": None,  # which would end some runs before their budget is spent
            "training.steps": MANY_STEPS,
            f"training.max_{self.unit}": self.amount,
            f"evaluation.every_{self.unit}": math.ceil(each) if self.unit == "images" else each,
        }

    def is_spent(self, evaluation: Mapping[str, Any]) -> bool:
        """Whether a line of `evaluation.jsonl` is a run's last."""
        return float(evaluation[UNITS[self.unit]]) >= self.amount


def read_budget(setting: str, text: object) -> Budget:
    """The budget that a text names.

    Raises:
        ValueError: in a sentence, with the setting.
    """
    unit, _, number = str(text).partition("=")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if unit not in UNITS or not 0 < amount < math.inf:
        raise ValueError(f"{setting}={text} needs the form images=640 or seconds=300, with a number above 0.")
    if unit == "images" and amount != int(amount):
        raise ValueError(f"{setting}={text} needs a whole number of images.")
    return Budget(unit, int(amount) if unit == "images" else amount)
