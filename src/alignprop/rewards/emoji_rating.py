"""Reward of the embedded rater: how good the drawing is, by another network than the aesthetic head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from alignprop import emoji
from alignprop.rewards.emoji import by_pillow


class EmojiRating(nn.Module):
    """Rating of the drawing, 1 to 10, whatever the prompt.

    A second opinion on what `emoji-aesthetic` rates: a very small convnet on the pixels, which shares nothing with the
    embedded CLIP, and has seen what its own training made of models that were tuned until they collapsed. It is meant
    for a judge: as a reward it is fooled soon.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rater = emoji.rater()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image."""
        rating: Tensor = self.rater(images)
        return rating

    def reference_pixels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the rater is given, and the same by Pillow."""
        return emoji.preprocess(images), by_pillow(images)
