"""A reward in deviations of its own scores, so that weights mean the same for rewards of different scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from alignprop.rewards.differentiable import is_differentiable
from alignprop.rewards.modality import modality_of

if TYPE_CHECKING:
    from alignprop.rewards.base import Reward

DECAY = 0.99
"""Of the running statistics: the last hundred steps count most."""

_RESOLUTION = 1e-6
"""Deviation, relative to the mean, below which single precision tells scores no longer apart."""


class Normalised(nn.Module):
    """(score - mean) / deviation, by running statistics of the scores seen in training.

    After n updates, the mean and the variance are those of all batches so far, where the k-th batch from the end has
    a weight proportional to decay^k. They stand still during a call: no score depends on its company. The trainer
    updates them once a step with the scores of all processes, before any clamp (scores that are all clamped have no
    deviation to divide by), and begins them with a batch of the base model's pictures. In a weighted sum they change
    what is optimised; scores are reported as the reward gives them.
    """

    def __init__(self, reward: Reward, decay: float = DECAY) -> None:
        """Start without statistics, with mean 0 and deviation 1.

        Args:
            reward: Any.
            decay: Weight of what was seen before, in [0, 1).

        Raises:
            ValueError: The decay is out of its range.
        """
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} needs 0 <= decay < 1.")
        self.reward = reward
        self.modality, self.differentiable = modality_of(reward), is_differentiable(reward)
        self.decay = decay
        # Plain numbers: they must not change their precision with the module's, and a checkpoint keeps every digit.
        self.mean, self.variance, self.num_updates = 0.0, 0.0, 0

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image, in deviations from the mean."""
        return self.normalise(self.reward(images, prompts))

    def normalise(self, scores: Tensor) -> Tensor:
        """Scores (B,) of the reward, in deviations from the mean."""
        return (scores - self.mean) / self.deviation

    @property
    def deviation(self) -> float:
        """What scores are divided by; 1 as long as all that were seen are equal."""
        deviation = math.sqrt(self.variance)
        return deviation if deviation > _RESOLUTION * abs(self.mean) else 1.0

    def observe(self, scores: Tensor) -> None:
        """Take a batch (B,) of the reward's scores, which are finite, into the statistics."""
        values = scores.detach().double()
        self.num_updates += 1
        rate = (1 - self.decay) / (1 - self.decay**self.num_updates)  # 1 at first: nothing is known before
        change = values.mean().item() - self.mean
        self.mean += rate * change
        # The variance of a mixture: within both parts, and between them.
        within = (1 - rate) * self.variance + rate * values.var(correction=0).item()
        self.variance = within + rate * (1 - rate) * change**2

    def state(self) -> dict[str, float]:
        """The statistics, for a checkpoint."""
        return {"mean": self.mean, "variance": self.variance, "num_updates": self.num_updates}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from what `state` returned."""
        self.mean, self.variance = state["mean"], state["variance"]
        self.num_updates = int(state["num_updates"])
