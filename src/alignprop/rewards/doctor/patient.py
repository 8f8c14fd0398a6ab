"""What the doctor's examinations share: the reward with its pictures, other pictures, and units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alignprop.rewards.base import Reward

Verdict = Literal["sound", "doubtful", "broken", "idle"]
"""Of a finding; idle where there is nothing to examine."""

Result = tuple[Verdict, str, dict[str, float]]
"""Of an examination: how it is; what was measured and, where it is not as it should be, what to do; numbers by name."""

GREY_LEVEL = 1 / 255


@dataclass(frozen=True)
class Patient:
    """A reward with pictures to examine it on; it is given copies, which it may spoil.

    Attributes:
        differentiable: Whether there is a gradient to examine.
    """

    reward: Reward
    images: Tensor
    prompts: Sequence[str]
    name: str
    differentiable: bool

    def score(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Scores, without gradient."""
        with torch.no_grad():
            return self.reward(images.clone(), prompts or self.prompts)

    def gradient(self, images: Tensor, prompts: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """Scores, and the gradient of their sum."""
        leaf = images.clone().requires_grad_()
        scores = self.reward(leaf * 1.0, prompts or self.prompts)  # a reward may write into what is no leaf
        (gradient,) = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)
        return scores.detach(), torch.zeros_like(leaf) if gradient is None else gradient


def noise(images: Tensor) -> Tensor:
    """As many pictures of noise, the same every time."""
    return torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).to(images)


def plain(images: Tensor) -> dict[str, Tensor]:
    """As many pictures of one colour, by its name."""
    return {kind: torch.full_like(images, value) for kind, value in (("black", 0.0), ("white", 1.0), ("grey", 0.5))}


def spread(scores: Tensor) -> float:
    """By how much pictures differ."""
    return scores.double().std(correction=0).item()


def scale(patient: Patient) -> float:
    """The largest score, for differences to be a part of."""
    return max(patient.score(patient.images).abs().max().item(), 1e-12)
