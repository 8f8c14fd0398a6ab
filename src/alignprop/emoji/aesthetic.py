"""The aesthetic head: a rating of 1 to 10 from features of the CLIP, with gradient to the pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import CLIPModel

LOWEST, HIGHEST = 1.0, 10.0


def preprocess(images: Tensor, size: int = 64) -> Tensor:
    """Prepare pictures for the CLIP, with gradient.

    Args:
        images: Shape (B, 3, H, W) in [0, 1]; resized with antialiased bilinear interpolation if of another size.
        size: Height and width that the CLIP takes.

    Returns:
        Shape (B, 3, size, size) in [-1, 1].
    """
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return 2 * images - 1


def image_features(clip: CLIPModel, images: Tensor) -> Tensor:
    """Projected embeddings (B, 128) of pictures (B, 3, H, W) in [0, 1], not normalised."""
    pooled = clip.vision_model(pixel_values=preprocess(images)).pooler_output
    embeddings: Tensor = clip.visual_projection(pooled)
    return embeddings


def aesthetic_features(clip: CLIPModel, images: Tensor) -> Tensor:
    """What the aesthetic head sees of pictures (B, 3, H, W) in [0, 1]: a vector for each.

    The projected embedding alone knows the subject but loses the style, so the hidden states follow: the pooled
    token, the mean of the patches, and the mean and the deviation of the patches after the second layer.
    """
    output = clip.vision_model(pixel_values=preprocess(images), output_hidden_states=True)
    patches, early = output.last_hidden_state[:, 1:], output.hidden_states[2][:, 1:]
    embedding = F.normalize(clip.visual_projection(output.pooler_output), dim=-1)
    return torch.cat((embedding, output.pooler_output, patches.mean(1), early.mean(1), early.std(1)), dim=1)


class AestheticHead(nn.Module):
    """The multilayer perceptron of the LAION aesthetic predictor, its output bounded to 1..10.

    The bound is why a reward beyond that of good pictures cannot be had.

    Args:
        num_features: Length of the feature vectors.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("deviation", torch.ones(num_features))
        self.layers = nn.Sequential(
            nn.Linear(num_features, 1024),
            nn.Dropout(0.2),
            nn.ReLU(),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.ReLU(),
            nn.Linear(64, 16),
            nn.ReLU(),
            nn.Linear(16, 1),
        )

    @classmethod
    def from_pretrained(cls, folder: Path) -> AestheticHead:
        """Load from a folder with `config.json` and `model.safetensors`, in float32."""
        from safetensors.torch import load_file

        head = cls(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        head.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
        return head

    def forward(self, features: Tensor) -> Tensor:
        """Rate features (B, num_features) from `aesthetic_features`: (B,), each between 1 and 10."""
        logits = self.layers((features - self.mean) / self.deviation).squeeze(-1)
        return LOWEST + (HIGHEST - LOWEST) * torch.sigmoid(logits)
