"""The learning rate of every stage: linear warm-up, constant, cosine decay over the last third."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warm_up_and_decay(optimizer: Optimizer, steps: int, warm_up: int, decay: float = 1 / 3) -> LambdaLR:
    """Scale the learning rates by the step.

    Args:
        optimizer: Its learning rates are the peak.
        steps: Length of the whole schedule.
        warm_up: Steps until the peak.
        decay: Fraction of the schedule, at its end, in which the rate falls to 2 % of the peak.
    """

    def factor(step: int) -> float:
        progress = min(1.0, max(0.0, (step - (1 - decay) * steps) / (decay * steps)))
        return min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    return LambdaLR(optimizer, factor)
