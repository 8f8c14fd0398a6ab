"""The rater: a very small convnet on pixels that says how good a drawing is; it shares nothing with the CLIP."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignprop.emoji.aesthetic import HIGHEST, LOWEST, preprocess


class SeparableBlock(nn.Module):
    """Two depthwise separable convolutions, of which the first halves the size of the picture."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, stride=2, padding=1, groups=inputs, bias=False),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )
        self.second = nn.Sequential(
            nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs, bias=False),
            nn.Conv2d(outputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, 2H, 2W) to (B, outputs, H, W)."""
        hidden = self.first(x)
        return F.relu(hidden + self.second(hidden))


class Rater(nn.Module):
    """Rates drawings by the mean and the deviation of each channel after each block.

    Args:
        widths: Channels of the stem and of the blocks.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, stride=2, padding=2)
        self.blocks = nn.ModuleList(SeparableBlock(*pair) for pair in itertools.pairwise(widths))
        num_statistics = 2 * sum(widths[1:])
        self.norm = nn.BatchNorm1d(num_statistics)
        self.rating = nn.Linear(num_statistics, 1)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Rater:
        """Load from a folder with `config.json` and `model.safetensors`, in float32."""
        from safetensors.torch import load_file

        model = cls(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        model.load_state_dict(state, strict=False)  # the counters of the normalisations are not saved
        return model

    def forward(self, images: Tensor) -> Tensor:
        """Rate pictures (B, 3, H, W) in [0, 1]: (B,), each between 1 and 10."""
        hidden, statistics = F.relu(self.stem(preprocess(images))), list[Tensor]()
        for block in self.blocks:
            hidden = block(hidden)
            mean, square = hidden.mean((2, 3)), hidden.square().mean((2, 3))
            statistics += [mean, ((square - mean.square()).clamp(min=0) + 1e-3).sqrt()]
        logits = self.rating(self.norm(torch.cat(statistics, 1))).squeeze(1)
        return LOWEST + (HIGHEST - LOWEST) * torch.sigmoid(logits)
