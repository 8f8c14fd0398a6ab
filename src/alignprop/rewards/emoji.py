"""Rewards of the embedded model: its aesthetic head and its CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from alignprop import emoji
from alignprop.pixels import from_pil, to_pil


class EmojiAesthetic(nn.Module):
    """Rating of the drawing, 1 to 10, whatever the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.clip, _ = emoji.clip()
        self.head = emoji.aesthetic()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image."""
        rating: Tensor = self.head(emoji.aesthetic_features(self.clip, images))
        return rating

    def reference_pixels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the CLIP is given, and the same by Pillow."""
        return emoji.preprocess(images), by_pillow(images)


class EmojiClip(nn.Module):
    """Cosine similarity of image and prompt, -1 to 1; a prompt's embedding is computed once."""

    def __init__(self) -> None:
        super().__init__()
        self.clip, self.tokenizer = emoji.clip()
        self._embeddings: dict[str, Tensor] = {}

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image."""
        return cosine_similarity(emoji.image_features(self.clip, images), self._embed(prompts).to(images))

    def features(self, images: Tensor) -> Tensor:
        """Embeddings (B, 128) of unit length, of pictures (B, 3, H, W) in [0, 1], with gradient."""
        return normalize(emoji.image_features(self.clip, images), dim=-1)

    def reference_pixels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the CLIP is given, and the same by Pillow."""
        return emoji.preprocess(images), by_pillow(images)

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        for prompt in set(prompts) - self._embeddings.keys():  # each alone: its score must not depend on its company
            tokens = self.tokenizer([prompt], truncation=True, return_tensors="pt").to(self.clip.device)
            self._embeddings[prompt] = self.clip.text_projection(self.clip.text_model(**tokens).pooler_output)[0]
        return torch.stack([self._embeddings[prompt] for prompt in prompts])


def by_pillow(images: Tensor) -> Tensor:
    """The embedded CLIP's preprocessing of pictures (B, 3, H, W) in [0, 1] as 8-bit files, without gradient."""
    from PIL import Image

    size = (emoji.IMAGE_SIZE, emoji.IMAGE_SIZE)
    resized = [picture.resize(size, Image.Resampling.BILINEAR) for picture in to_pil(images)]
    return 2 * from_pil(resized).to(images) - 1
