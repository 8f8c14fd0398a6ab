"""The style classifier: in which style of drawing a picture is, from features of the CLIP, with gradient."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

STYLES = ("3d", "flat", "noto", "line")
"""The styles of the drawings, in the order of the classes; the class after them is a picture in none of them."""


class StyleClassifier(nn.Module):
    """A perceptron of one hidden layer.

    Args:
        num_features: Length of the feature vectors.
        num_hidden: Width of the hidden layer.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, num_features: int, num_hidden: int = 256) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("deviation", torch.ones(num_features))
        self.layers = nn.Sequential(
            nn.Linear(num_features, num_hidden),
            nn.Dropout(0.2),
            nn.SiLU(),  # smooth, so that its gradient changes little from one picture to the next
            nn.Linear(num_hidden, len(STYLES) + 1),
        )

    @classmethod
    def from_pretrained(cls, folder: Path) -> StyleClassifier:
        """Load from a folder with `config.json` and `model.safetensors`, in float32."""
        from safetensors.torch import load_file

        model = cls(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        return model

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, 5) of `STYLES` and of none, for features (B, num_features) from `aesthetic_features`."""
        logits: Tensor = self.layers((features - self.mean) / self.deviation)
        return logits
