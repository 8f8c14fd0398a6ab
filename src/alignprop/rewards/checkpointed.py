"""A reward whose activations are computed again in the backward pass, and not kept until then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignprop.rewards.differentiable import is_differentiable
from alignprop.rewards.modality import modality_of

if TYPE_CHECKING:
    from alignprop.rewards.base import Reward


class Checkpointed(nn.Module):
    """The same scores and gradient for less memory and one more forward pass of the reward.

    It pays where several large rewards, or several views of one, would hold their activations at the same time; the
    backward pass of a single one needs them all at once in any case.
    """

    def __init__(self, reward: Reward) -> None:
        """Wrap any reward."""
        super().__init__()
        self.reward = reward
        self.modality, self.differentiable = modality_of(reward), is_differentiable(reward)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image."""
        scores: Tensor = checkpoint(self.reward, images, prompts, use_reentrant=False)
        return scores
