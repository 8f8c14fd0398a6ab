"""Whether a reward has a gradient: some are numbers that a program or a person gives."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alignprop.rewards.base import Reward


def is_differentiable(reward: Reward) -> bool:
    """What a reward says of itself: its attribute ``differentiable``, or that gradient reaches the pixels."""
    function = reward.func if isinstance(reward, functools.partial) else reward  # which hides its attributes
    return bool(getattr(function, "differentiable", True))
