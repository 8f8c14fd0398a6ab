"""Rewards of plain colour: the smallest examples of a reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness that a person sees (ITU-R BT.601)."""


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean luma, in [0, 1]."""
    return torch.einsum("bchw,c->bhw", images, images.new_tensor(LUMA)).mean((1, 2))


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of red minus the mean of green and blue, in [-1, 1]."""
    red, green, blue = images.mean((2, 3)).unbind(1)
    return red - (green + blue) / 2
