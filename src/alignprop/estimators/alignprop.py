"""AlignProp: backpropagate the reward through the last K steps of the sampling chain (arXiv 2310.03739, eq. 3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from alignprop.estimators.base import Estimate, require_gradient
from alignprop.rewards import WeightedSum, check_scores
from alignprop.rollout import Sampler
from alignprop.seams import Checkpointing
from alignprop.truncation import Truncation, Uniform


@dataclass(frozen=True)
class AlignProp:
    """Randomised truncated backpropagation through time.

    The gradient is exact along the live window; what is left out is the dependence of the window's first latents on
    the adapter, which is the truncation's bias.

    Attributes:
        truncation: draws K for each micro-batch.
        checkpointing: activation checkpointing of the live steps, or a function from K to a mode.
    """

    needs_gradient: ClassVar[bool] = True

    truncation: Truncation = field(default_factory=Uniform)
    checkpointing: Checkpointing | Callable[[int], Checkpointing] = "none"

    def __call__(
        self,
        sampler: Sampler,
        reward: WeightedSum,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        generator: torch.Generator,
        weight: float,
    ) -> Estimate:
        """One rollout and its backward pass; see :class:`~alignprop.estimators.base.Estimator`."""
        require_gradient(reward, type(self).__name__)
        rollout = sampler.rollout(
            prompts,
            seeds,
            live_steps=lambda num_steps: self.truncation.draw(num_steps, generator),
            checkpointing=self.checkpointing,
        )
        components = reward.components(rollout.pixels, prompts)
        for name, values in components.items():
            check_scores(values, rollout.pixels, name, prompts)
        scores = reward.combine(components)
        (-weight * scores.sum()).backward()
        return Estimate(
            scores=scores.detach(),
            components={name: values.detach() for name, values in components.items()},
            num_steps=rollout.num_steps,
            live_steps=rollout.live_steps,
        )
