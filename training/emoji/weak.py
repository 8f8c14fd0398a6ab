"""Stage `weak`: a reward that is easy to fool, for tests and examples of what that looks like. Never in the package.

It is what a published aesthetic predictor is, a linear map of features of the CLIP (LAION's has five layers, but
nothing between them), fit to clean pictures only, without a bound. Nothing has shown it a damaged or collapsed picture,
so its gradient leads there:

    PYTHONPATH=training/emoji alignprop train emoji --set 'rewards={"weak:WeakAesthetic": 1.0}'
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignprop import emoji

CLEAN = ("real",)
RIDGE = 1e-4
"""Weight of the squared length of the map, beside the mean squared error: little, so that it uses every direction."""

WEIGHTS = Path(__file__).parent / "weak.safetensors"


class WeakAesthetic(nn.Module):
    """Rating of the drawing, about 3.5 to 8.5 where it is clean, and anything where it is not."""

    weight: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.clip, _ = emoji.clip()
        for name, tensor in load_file(WEIGHTS).items():
            self.register_buffer(name, tensor.float())

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image."""
        return self.rate(emoji.aesthetic_features(self.clip, images))

    def rate(self, features: Tensor) -> Tensor:
        """Score features (B, D) of the CLIP."""
        return features @ self.weight + self.bias


def fit(features: Tensor, ratings: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (D,) and bias of ridge regression on features scaled to unit deviation."""
    features, ratings = features.double(), ratings.double()
    mean, deviation = features.mean(0), features.std(0) + 1e-3
    scaled, centre = (features - mean) / deviation, ratings.mean()
    gram = scaled.T @ scaled / len(scaled) + RIDGE * torch.eye(scaled.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, scaled.T @ (ratings - centre) / len(scaled)) / deviation
    return weight.float(), (centre - mean @ weight).float()


def main() -> None:
    """Solve it at once: it takes seconds."""
    from classifier import load_shown  # here, since a run that trains on the reward has no use for it

    torch.set_num_threads(1)
    shown = load_shown()
    kinds, features = np.array(shown.kinds), shown["features"]
    clean = torch.from_numpy(np.isin(kinds, CLEAN))
    weight, bias = fit(features[clean], shown["ratings"][clean])
    save_file({"weight": weight, "bias": bias}, WEIGHTS)
    scores = features @ weight + bias
    rows = {style: torch.from_numpy(kinds == "real") & (shown["styles"] == n) for n, style in enumerate(emoji.STYLES)}
    rows |= {kind: torch.from_numpy(kinds == kind) for kind in sorted(set(kinds.tolist()))}
    table = {name: {"mean": round(scores[chosen].mean().item(), 2), "highest": round(scores[chosen].max().item(), 2)}
             for name, chosen in rows.items()}  # fmt: skip
    WEIGHTS.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
