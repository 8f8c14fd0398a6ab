"""AlignProp: backpropagate the reward through the last K steps of the sampling chain (arXiv 2310.03739, eq. 3)."""

from collections.abc import Callable
from dataclasses import dataclass, field

from alignprop.estimators.base import Estimate, MicroBatch, RewardGradient, ascend
from alignprop.rewards import WeightedSum
from alignprop.rollout import Sampler
from alignprop.seams import Checkpointing
from alignprop.truncation import Truncation, Uniform


@dataclass(frozen=True)
class AlignProp(RewardGradient):
    """Randomised truncated backpropagation through time.

    The gradient is exact along the live window; what is left out is the dependence of the window's first latents on
    the adapter, which is the truncation's bias.

    Attributes:
        truncation: draws K for each micro-batch.
        checkpointing: activation checkpointing of the live steps, or a function from K to a mode.
    """

    truncation: Truncation = field(default_factory=Uniform)
    checkpointing: Checkpointing | Callable[[int], Checkpointing] = "none"

    def __call__(self, sampler: Sampler, reward: WeightedSum, batch: MicroBatch, weight: float) -> Estimate:
        """One rollout and its backward pass; see :class:`~alignprop.estimators.base.RewardGradient`."""
        rollout = sampler.rollout(
            batch.prompts,
            batch.seeds,
            live_steps=lambda num_steps: self.truncation.draw(num_steps, batch.generator),
            checkpointing=self.checkpointing,
        )
        scores, components = ascend(reward, rollout, batch, weight)
        return Estimate(scores, components, rollout.num_steps, rollout.live_steps, rollout.calls, len(scores))
