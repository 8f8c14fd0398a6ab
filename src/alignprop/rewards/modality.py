"""What a reward looks at: pictures, the frames of a video or a waveform."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from alignprop.rewards.differentiable import is_differentiable

if TYPE_CHECKING:
    from alignprop.rewards.base import Reward

Modality = Literal["image", "video", "audio"]

_BY_DIMENSIONS: dict[int, Modality] = {3: "audio", 4: "image", 5: "video"}
NUM_FRAMES = 4
"""Frames of a video on which a reward of pictures is applied, where nothing else is said."""


def modality_of(reward: Reward) -> Modality:
    """What a reward scores: its attribute ``modality``, or pictures."""
    function = reward.func if isinstance(reward, functools.partial) else reward  # which hides its attributes
    modality: Modality = getattr(function, "modality", "image")
    return modality


def score(reward: Reward, samples: Tensor, prompts: Sequence[str]) -> Tensor:
    """Apply a reward to what a pipeline made; one of pictures is applied to frames of a video and averaged.

    Args:
        reward: Has an attribute ``modality`` if it takes frames (``"video"``) or waveforms (``"audio"``).
        samples: Pictures (B, 3, H, W), frames (B, F, 3, H, W) or waveforms (B, C, N).
        prompts: B strings.

    Returns:
        What the reward returned, or its mean over frames: shape (B,).

    Raises:
        ValueError: The reward cannot score such samples.
    """
    made, wanted = _BY_DIMENSIONS[samples.ndim], modality_of(reward)
    if wanted == made:
        return reward(samples, prompts)
    if wanted == "image" and made == "video":
        return OnFrames(reward).forward(samples, prompts)
    raise ValueError(f"a reward of modality {wanted!r} cannot score {made}, which is what the pipeline makes.")


class OnFrames(nn.Module):
    """A reward of pictures, applied to frames of a video and averaged over them."""

    modality: Modality = "video"

    def __init__(self, reward: Reward, num_frames: int = NUM_FRAMES) -> None:
        """Choose the frames.

        Args:
            reward: Scores pictures.
            num_frames: Frames evenly spaced from the first to the last; the middle one if it is 1.
        """
        super().__init__()
        self.reward = reward
        self.differentiable = is_differentiable(reward)
        self.num_frames = num_frames

    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score videos (B, F, 3, H, W)."""
        chosen = frames[:, self._places(frames.shape[1])]
        repeated = [prompt for prompt in prompts for _ in range(chosen.shape[1])]
        scores = self.reward(chosen.flatten(0, 1), repeated)
        return scores.view(chosen.shape[:2]).mean(1)

    def _places(self, num_frames: int) -> list[int]:
        if self.num_frames == 1:
            return [num_frames // 2]
        places = torch.linspace(0, num_frames - 1, min(self.num_frames, num_frames))
        return [round(place) for place in places.tolist()]


def stills(samples: Tensor) -> Tensor | None:
    """Pictures (N, 3, H, W) to show of samples: themselves, or the middle frames; None for waveforms."""
    if _BY_DIMENSIONS[samples.ndim] == "audio":
        return None
    return samples[:, samples.shape[1] // 2] if samples.ndim == 5 else samples
