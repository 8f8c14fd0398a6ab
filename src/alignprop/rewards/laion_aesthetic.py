"""Reward of beauty: LAION's aesthetic predictor, version 2.

Published at github.com/christophschuhmann/improved-aesthetic-predictor, trained on ratings of SAC, LAION-Logos and AVA.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from alignprop.rewards.checkpoints import check_layout, load_model, load_tensors
from alignprop.rewards.clip import KIND as CLIP_KIND
from alignprop.rewards.clip import VIT_L_14, ImageEncoder, load_preprocessing
from alignprop.rewards.preprocessing import compared

MODEL = "trl-lib/ddpo-aesthetic-predictor"
KIND = "LAION aesthetic predictor v2"
FILENAME = "sac+logos+ava1-l14-linearMSE.pth"
FILENAMES = {MODEL: "aesthetic-model.pth"}
"""What repositories of the hub call the published file."""


class LaionAesthetic(nn.Module):
    """Rating of the picture, about 1 to 10 and not bounded, whatever the prompt."""

    def __init__(self, model: str = MODEL, clip: str = VIT_L_14, revision: str | None = None) -> None:
        """Load the predictor and its CLIP.

        Args:
            model: The published file `sac+logos+ava1-l14-linearMSE.pth`, a folder that holds it, or a hub id.
            clip: Folder or hub id of OpenAI's ViT-L/14 as a CLIPModel of transformers.
            revision: Of `model` on the hub; None for a pinned commit of the default.

        Raises:
            ValueError: There is no such checkpoint, or it is of another kind.
        """
        from transformers import CLIPModel

        super().__init__()
        tensors = load_tensors(model, FILENAMES.get(model, FILENAME), revision, KIND)
        preprocess = load_preprocessing(clip, None, "clip")
        encoder = load_model(CLIPModel, clip, None, CLIP_KIND, "clip")
        self.encoder = ImageEncoder(encoder, preprocess)
        self.predictor = Predictor(encoder.config.projection_dim)
        check_layout(tensors, {name: weight.shape for name, weight in self.predictor.state_dict().items()}, model, KIND)
        self.predictor.load_state_dict(tensors)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score pictures (B, 3, H, W) in [0, 1]: shape (B,)."""
        rating: Tensor = self.predictor(self.encoder(images))
        return rating

    def reference_pixels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the model is given, and what its own image processor gives it."""
        return compared(self.encoder.preprocess, images)


class Predictor(nn.Module):
    """Five linear layers without activation between them, on a CLIP embedding of length 1."""

    def __init__(self, num_features: int) -> None:
        """Build it for embeddings of `num_features` numbers, 768 for the ViT-L/14."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_features, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Rate embeddings (B, num_features): shape (B,)."""
        weight = next(self.parameters())
        rating: Tensor = self.layers(embeddings.to(weight.dtype)).squeeze(-1)
        return rating
