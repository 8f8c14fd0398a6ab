"""Pixels between decoder and reward: value range, clamp, resize and normalisation, all with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


def to_unit(decoded: Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """Map a decoder's output from `value_range` to [0, 1], without clamping.

    Args:
        decoded: Pixels of any shape.
        value_range: What the decoder means by black and by white.
    """
    black, white = value_range
    return (decoded - black) / (white - black)


def clamp_straight_through(images: Tensor) -> Tensor:
    """Clamp values to [0, 1] and pass the gradient unchanged."""
    # Clamp's own gradient is zero outside [0, 1]: a saturated pixel could never be pulled back. So the
    # clamped value is detached, and a term that is exactly zero carries the gradient of the identity.
    return images.clamp(0, 1).detach() + (images - images.detach())


def resize(
    images: Tensor,
    size: int | tuple[int, int],
    mode: Literal["bilinear", "bicubic"] = "bilinear",
    antialias: bool = True,
) -> Tensor:
    """Resize as Pillow does, with gradient; bicubic may overshoot [0, 1].

    Args:
        images: Shape (B, C, H, W).
        size: New (height, width) in pixels, or one number for both; the aspect ratio is not kept.
        mode: Interpolation.
        antialias: Widen the filter when shrinking, as Pillow always does.
    """
    size = (size, size) if isinstance(size, int) else size
    return F.interpolate(images, size=size, mode=mode, antialias=antialias, align_corners=False)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract a mean and divide by a deviation in each channel.

    Args:
        images: Shape (B, C, H, W).
        mean: One number a channel.
        std: One number a channel.
    """
    shift, scale = (images.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (images - shift) / scale


def to_pil(images: Tensor) -> list[Image.Image]:
    """Round images in [0, 1], shape (B, 3, H, W), to 8-bit Pillow images."""
    from PIL import Image

    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def from_pil(pictures: Sequence[Image.Image]) -> Tensor:
    """Turn Pillow images of one size into a float32 tensor in [0, 1], shape (B, 3, H, W)."""
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def from_output(pictures: Any) -> Tensor:
    """Turn what a pipeline returned into a float32 tensor.

    Args:
        pictures: A tensor, which only changes its dtype, or what pipelines return that know no tensors: an array
            (B, H, W, 3) in [0, 1].
    """
    if isinstance(pictures, Tensor):
        return pictures.float()
    return torch.from_numpy(np.asarray(pictures)).movedim(-1, -3).float()
