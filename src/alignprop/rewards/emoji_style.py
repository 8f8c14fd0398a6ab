"""Reward of the embedded model's style classifier: drawn in a style, or not drawn in it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import Tensor, nn

from alignprop import emoji
from alignprop.rewards.classifier import log_probability
from alignprop.rewards.emoji import by_pillow


class EmojiStyle(nn.Module):
    """Log-probability that a drawing is in a style, or in another one, at most 0, whatever the prompt.

    The classifier knows four styles, and pictures in none of them, such as damaged ones; its five probabilities sum to
    one. The absence of a style is a drawing in one of the other three: with "none" among them, the shortest way from
    an outline would be to spoil the picture.
    """

    def __init__(self, style: str = "line", absent: bool = False) -> None:
        """Choose a style.

        Args:
            style: 3d, flat, noto or line (black outlines on white).
            absent: Reward drawings in the other styles.

        Raises:
            ValueError: There is no such style.
        """
        super().__init__()
        if style not in emoji.STYLES:
            near = difflib.get_close_matches(str(style).lower(), emoji.STYLES, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(emoji.STYLES)}."
            raise ValueError(f"style={style!r} is no style of the embedded model; {remedy}")
        self.labels = [number for number, name in enumerate(emoji.STYLES) if (name == style) != absent]
        self.clip, _ = emoji.clip()
        self.classifier = emoji.classifier()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image."""
        logits = self.classifier(emoji.aesthetic_features(self.clip, images))
        return log_probability(logits, self.labels)

    def reference_pixels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the CLIP is given, and the same by Pillow."""
        return emoji.preprocess(images), by_pillow(images)
