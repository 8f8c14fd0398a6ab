"""Reward of human preference: PickScore (Kirstain et al. 2023, arXiv 2305.01569)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from alignprop.rewards.clip import VIT_H_14, load_clip
from alignprop.rewards.preprocessing import compared

MODEL = "yuvalkirstain/PickScore_v1"


class PickScore(nn.Module):
    """Cosine of the CLIP embeddings of picture and prompt, times the temperature that the model learned.

    The paper's scoring function, and the scores of the published model card: about 20.
    """

    def __init__(self, model: str = MODEL, processor: str = VIT_H_14, revision: str | None = None) -> None:
        """Load PickScore.

        Args:
            model: Folder or hub id of the published CLIPModel of transformers.
            processor: Folder or hub id of tokenizer and image processor, those of OpenCLIP's ViT-H/14.
            revision: Of `model` on the hub; None for a pinned commit of the published model.

        Raises:
            ValueError: There is no such checkpoint, or it is of another kind.
        """
        super().__init__()
        self.clip = load_clip(model, revision, processor)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score pictures (B, 3, H, W) in [0, 1]: shape (B,)."""
        scores: Tensor = self.clip.logit_scale.exp() * self.clip(images, prompts)
        return scores

    def features(self, images: Tensor) -> Tensor:
        """The CLIP's embeddings (B, D) of unit length, of pictures (B, 3, H, W) in [0, 1], with gradient."""
        return self.clip.features(images)

    def reference_pixels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the model is given, and what its own image processor gives it."""
        return compared(self.clip.images.preprocess, images)
