"""The judge of last resort, for tests and figures only: never in the package, and never trained on.

A residual convnet on pixels, of another architecture, seed and split than everything else, with two outputs: a rating
of 1 to 10 as in `ratings.py`, and what the drawing shows. Its score of a picture and a prompt is

    gold = 1 + (rating - 1) * min(1, p(thing) / P_USUAL)

so a good drawing of the right thing scores what it is rated, and a good drawing of another thing, a spoilt one and
nonsense score little above 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from concepts import CONCEPTS
from safetensors.torch import load_file
from torch import Tensor, nn

from alignprop.emoji import preprocess
from alignprop.emoji.names import label_of

P_USUAL = 0.5
"""Probability of the thing that is as good as certainty: more than that of all others together."""

NONE = len(CONCEPTS)
"""The label of what is no thing."""

WEIGHTS = Path(__file__).parent / "gold.safetensors"


class Residual(nn.Module):
    """Two convolutions around which the picture passes, normalised before each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (B, width, H, W)."""
        hidden = self.first(F.gelu(self.norms[0](x)))
        return x + self.second(F.gelu(self.norms[1](hidden)))


class GoldNet(nn.Module):
    """Rates a picture and names what it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 5, stride=2, padding=2),
            nn.BatchNorm2d(24),
            nn.GELU(),
            nn.Conv2d(24, 64, 3, stride=2, padding=1),
        )
        self.fine = Residual(64)
        self.widen = nn.Conv2d(64, 96, 1)
        self.coarse = nn.Sequential(Residual(96), Residual(96))
        self.widen_again = nn.Conv2d(96, 144, 1)
        self.last = nn.Sequential(Residual(144), nn.BatchNorm2d(144), nn.GELU())
        statistics = 2 * (64 + 96) + 144
        self.rating = nn.Sequential(
            nn.LayerNorm(statistics), nn.Linear(statistics, 96), nn.GELU(), nn.Dropout(0.1), nn.Linear(96, 1)
        )
        self.names = nn.Linear(144, NONE + 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Ratings (B,) of 1 to 10 and logits (B, 117) of the things and of none, of pictures in [0, 1]."""
        pixels = preprocess(images).contiguous(memory_format=torch.channels_last)
        fine = self.fine(self.stem(pixels))
        coarse = self.coarse(F.avg_pool2d(self.widen(fine), 2))
        last = self.last(F.avg_pool2d(self.widen_again(coarse), 2)).mean((2, 3)).float()
        statistics = [statistic for maps in (fine, coarse) for statistic in _mean_and_deviation(maps)]
        logit = self.rating(torch.cat((*statistics, last), 1)).squeeze(1).float()
        return 1 + 9 * torch.sigmoid(logit), self.names(last).float()


def _mean_and_deviation(maps: Tensor) -> tuple[Tensor, Tensor]:
    maps = maps.float()
    mean, square = maps.mean((2, 3)), maps.square().mean((2, 3))
    return mean, ((square - mean.square()).clamp(min=0) + 1e-3).sqrt()


class Gold(nn.Module):
    """Scores pictures for their prompts, 1 to 10; see the formula above."""

    def __init__(self, net: GoldNet) -> None:
        super().__init__()
        self.net = net
        self._things = [concept.name for concept in CONCEPTS]

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score pictures (B, 3, H, W) in [0, 1]: shape (B,)."""
        rating, logits = self.net(images)
        things = torch.tensor([label_of(prompt, self._things) for prompt in prompts], device=images.device)
        return score(rating, logits, things)


def score(rating: Tensor, logits: Tensor, things: Tensor) -> Tensor:
    """The gold score, of what the net says and the thing (B,) that there should be."""
    probability = logits.softmax(1).gather(1, things[:, None])[:, 0]
    return 1 + (rating - 1) * (probability / P_USUAL).clamp(max=1)


def load_gold() -> Gold:
    """The gold judge, frozen and in evaluation mode: from pictures and prompts to scores."""
    net = GoldNet()
    state = {name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}
    net.load_state_dict(state, strict=False)  # the counters of the normalisations are not saved
    return Gold(net).eval().requires_grad_(False)
