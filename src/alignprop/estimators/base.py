"""What an estimator is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alignprop.rewards import WeightedSum
from alignprop.rollout import Sampler


@dataclass(frozen=True)
class Estimate:
    """What is known of a micro-batch once its gradient has been accumulated.

    Attributes:
        scores: (B,), the reward of each image, detached.
        components: the rewards that the scores are made of, by name, each (B,), detached and unweighted.
        num_steps: denoising steps of the rollout.
        live_steps: how many of them carried gradient.
    """

    scores: Tensor
    components: Mapping[str, Tensor]
    num_steps: int
    live_steps: int


class Estimator(Protocol):
    """Accumulates the gradient of the expected reward."""

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
        """Add the gradient of ``-weight * sum(scores)`` to ``parameter.grad`` of the adapter.

        Args:
            sampler: the pipeline and the arguments of its call.
            reward: scores pictures.
            prompts: B prompts.
            seeds: B seeds, one a picture.
            generator: of what the estimator draws; the same on every rank.
            weight: one over the number of images of the whole optimizer step.

        Raises:
            ValueError: the reward is not usable (shape, not finite, no gradient).
        """
        ...
