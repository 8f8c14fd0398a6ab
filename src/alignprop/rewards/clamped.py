"""A reward that asks for no more than a target: as good as a real picture is enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from alignprop.rewards.differentiable import is_differentiable
from alignprop.rewards.modality import modality_of

if TYPE_CHECKING:
    from alignprop.rewards.base import Reward


class Clamped(nn.Module):
    """min(score, above): the gradient is exactly zero above the target, and the reward's own below it.

    A picture that is good enough pulls no more, so what is left of the gradient comes from the others. In a weighted
    sum the target changes what is optimised; scores are reported as the reward gives them.
    """

    def __init__(self, reward: Reward, above: float) -> None:
        """Set a target.

        Args:
            reward: Any.
            above: The score that is enough, in the reward's own unit: such as what real pictures get.
        """
        super().__init__()
        self.reward = reward
        self.modality, self.differentiable = modality_of(reward), is_differentiable(reward)
        self.above = above

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image, up to the target."""
        return self.clamp(self.reward(images, prompts))

    def clamp(self, scores: Tensor) -> Tensor:
        """Scores (B,) of the reward, up to the target."""
        return scores.clamp(max=self.above)

    def share(self, scores: Tensor) -> float:
        """The share of scores (B,) of the reward that are above the target, in [0, 1]."""
        return (scores > self.above).double().mean().item()
