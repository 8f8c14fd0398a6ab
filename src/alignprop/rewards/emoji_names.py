"""Reward of the embedded namer: the drawing shows what the prompt names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignprop import emoji
from alignprop.rewards.emoji import by_pillow


class EmojiNames(nn.Module):
    """Log-probability that a drawing shows the thing that the prompt names, at most 0.

    A convnet on the pixels, which shares nothing with the embedded CLIP: a second opinion on what is drawn. It knows
    116 things and one class for all else, noise and wreckage among it. With logits `z` and the thing `k` of a prompt,
    the score is `z_k - logsumexp(z)`.

    Prompts are a thing in the words of the embedded model: `a fox`, or with a style `a fox, 3d`, whatever the style of
    the drawing. Any other prompt is refused with a `ValueError`, since what it says beyond would not be judged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.namer = emoji.names()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image."""
        things = self.namer.labels[:-1]
        wanted = torch.tensor([emoji.label_of(prompt, things) for prompt in prompts], device=images.device)
        return -F.cross_entropy(self.namer(images), wanted, reduction="none")

    def features(self, images: Tensor) -> Tensor:
        """Features (B, 128) of unit length, of pictures (B, 3, H, W) in [0, 1], with gradient."""
        return self.namer.features(images)

    def reference_pixels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the namer is given, and the same by Pillow."""
        return emoji.preprocess(images), by_pillow(images)
