"""Reward of real JPEG files: what DDPO calls compressibility (Black et al. 2023, arXiv 2305.13301)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor

from alignprop.pixels import to_pil
from alignprop.rewards.jpeg import check_quality


class JpegFileSize:
    """Minus the kilobytes (1000 bytes) of the file that Pillow writes: exact, and without gradient."""

    differentiable = False

    def __init__(self, quality: int = 95) -> None:
        """Choose the quality.

        Args:
            quality: As in libjpeg and Pillow, 1 to 100; 95 as in DDPO.

        Raises:
            ValueError: There is no such quality.
        """
        self.quality = check_quality(quality)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score pictures (B, 3, H, W) in [0, 1], rounded to 8 bits: shape (B,), float32."""
        sizes = []
        for picture in to_pil(images):
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=self.quality)
            sizes.append(buffer.tell())
        return -torch.tensor(sizes, dtype=torch.float32, device=images.device) / 1000
