"""AlignProp as its first published code computed it: denoising steps kept one by one, not as a window.

There the truncation was drawn anew inside the sampling loop: step i of T (from 0) keeps its gradient if a number drawn
for it, uniform in [low, high], is at most i. So each step is kept independently, with probability
``(i + 1 - low) / (high - low + 1)``, and a rollout may keep none.
"""

from dataclasses import dataclass

import torch

from alignprop.estimators.base import Estimate, MicroBatch, RewardGradient, ascend
from alignprop.rewards import WeightedSum
from alignprop.rollout import Sampler
from alignprop.seams import Checkpointing
from alignprop.steps import Plan


@dataclass(frozen=True)
class AsReleased(RewardGradient):
    """Independently kept denoising steps; gradient flows around those that are not kept.

    Attributes:
        low: of the number that is drawn for each step.
        high: of it; None for the number of denoising steps, which the published settings were (0 and 50 of 50).
        checkpointing: activation checkpointing of the kept steps.
    """

    low: int = 0
    high: int | None = None
    checkpointing: Checkpointing = "none"

    def __post_init__(self) -> None:
        """Refuse an empty range before any model is loaded."""
        if self.low < 0 or (self.high is not None and self.high < self.low):
            raise ValueError(f"low={self.low} and high={self.high} need 0 <= low <= high.")

    def __call__(self, sampler: Sampler, reward: WeightedSum, batch: MicroBatch, weight: float) -> Estimate:
        """One rollout and its backward pass; see :class:`~alignprop.estimators.base.RewardGradient`."""
        rollout = sampler.rollout(
            batch.prompts,
            batch.seeds,
            plan=lambda num_steps: Plan(live=self.kept(num_steps, batch.generator)),
            checkpointing=self.checkpointing,
        )
        scores, components = ascend(reward, rollout, batch, weight)
        return Estimate(scores, components, rollout.num_steps, rollout.live_steps, rollout.calls, len(scores))

    def kept(self, num_steps: int, generator: torch.Generator) -> list[int]:
        """The steps that keep their gradient; perhaps none.

        Raises:
            ValueError: no step can ever be kept.
        """
        high = num_steps if self.high is None else self.high
        if self.low >= num_steps:
            raise ValueError(
                f"low={self.low} needs low < {num_steps}, the number of denoising steps: no step would ever be kept."
            )
        drawn = torch.randint(self.low, high + 1, (num_steps,), generator=generator).tolist()
        return [step for step, bound in enumerate(drawn) if bound <= step]
