"""Reward of agreement with the prompt, by any CLIP."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from alignprop.rewards.clip import VIT_L_14, load_clip
from alignprop.rewards.preprocessing import compared


class ClipScore(nn.Module):
    """Cosine of the CLIP embeddings of picture and prompt.

    CLIPScore (Hessel et al. 2021, arXiv 2104.08718, section 3) is 2.5 times this and cut off at 0, where its
    gradient would be lost.
    """

    def __init__(self, model: str = VIT_L_14, revision: str | None = None) -> None:
        """Load a CLIP.

        Args:
            model: Folder or hub id of a CLIPModel of transformers with its tokenizer and image processor.
            revision: Commit, tag or branch on the hub; None for a pinned commit of the default model.

        Raises:
            ValueError: There is no such checkpoint, or it is of another kind.
        """
        super().__init__()
        self.clip = load_clip(model, revision)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score pictures (B, 3, H, W) in [0, 1]: shape (B,), -1 to 1."""
        similarity: Tensor = self.clip(images, prompts)
        return similarity

    def features(self, images: Tensor) -> Tensor:
        """The CLIP's embeddings (B, D) of unit length, of pictures (B, 3, H, W) in [0, 1], with gradient."""
        return self.clip.features(images)

    def reference_pixels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the model is given, and what its own image processor gives it."""
        return compared(self.clip.images.preprocess, images)
