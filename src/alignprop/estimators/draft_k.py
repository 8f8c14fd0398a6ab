"""DRaFT-K: backpropagate the reward through the last K steps, always the same K (arXiv 2309.17400, algorithm 1)."""

from dataclasses import dataclass

from alignprop.estimators.alignprop import AlignProp
from alignprop.estimators.base import Estimate, MicroBatch, RewardGradient
from alignprop.rewards import WeightedSum
from alignprop.rollout import Sampler
from alignprop.seams import Checkpointing
from alignprop.truncation import Last


@dataclass(frozen=True)
class DraftK(RewardGradient):
    """AlignProp with a fixed window; with K = T the full gradient.

    Attributes:
        steps: K.
        checkpointing: activation checkpointing of the live steps.
    """

    steps: int = 1
    checkpointing: Checkpointing = "none"

    def __post_init__(self) -> None:
        """Refuse a window without a step before any model is loaded."""
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} needs at least 1: no live step means no gradient.")

    def __call__(self, sampler: Sampler, reward: WeightedSum, batch: MicroBatch, weight: float) -> Estimate:
        """One rollout and its backward pass; see :class:`~alignprop.estimators.base.RewardGradient`."""
        return AlignProp(Last(self.steps), self.checkpointing)(sampler, reward, batch, weight)
