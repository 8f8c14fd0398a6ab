"""The namer: a small convnet on pixels that says what a drawing shows; it shares nothing with the CLIP."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from alignprop.emoji.aesthetic import preprocess

STYLE_WORDS = ("3d", "flat", "noto", "line drawing")
"""What may follow the thing in a prompt of the embedded model, after a comma, in the order of the styles."""

SCALE = 16.0
"""Of the logits, since features are of unit length."""


class Block(nn.Module):
    """A residual block that halves the size of the picture."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, 2H, 2W) to (B, outputs, H, W)."""
        hidden = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.skip(F.avg_pool2d(x, 2)) + self.norms[1](self.second(hidden)))


class Namer(nn.Module):
    """Names what a picture shows.

    Args:
        labels: What the classes are called.
        widths: Channels of the stem and of the three blocks; the last is the length of the features.
    """

    def __init__(self, labels: Sequence[str], widths: Sequence[int]) -> None:
        super().__init__()
        self.labels = tuple(labels)
        stem, first, second, last = widths
        self.stem = nn.Conv2d(3, stem, 5, stride=2, padding=2)
        self.blocks = nn.Sequential(Block(stem, first), Block(first, second), Block(second, last))
        self.names = nn.Linear(last, len(self.labels))

    @classmethod
    def from_pretrained(cls, folder: Path) -> Namer:
        """Load from a folder with `config.json` and `model.safetensors`, in float32."""
        from safetensors.torch import load_file

        model = cls(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        model.load_state_dict(state, strict=False)  # the counters of the normalisations are not saved
        return model

    def features(self, images: Tensor) -> Tensor:
        """Features (B, D) of unit length, of pictures (B, 3, H, W) in [0, 1]."""
        hidden = self.blocks(F.relu(self.stem(preprocess(images))))
        return F.normalize(hidden.mean((2, 3)), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, labels) of pictures (B, 3, H, W) in [0, 1]."""
        logits: Tensor = SCALE * self.names(self.features(images))
        return logits


def label_of(prompt: str, labels: Sequence[str]) -> int:
    """The number of the thing that a prompt names: `a fox`, `fox` or, with a style, `a fox, 3d`.

    Args:
        prompt: In the words of the embedded model, whatever the case.
        labels: Names of things.

    Raises:
        ValueError: It names none of them, or says more, which would not be judged.
    """
    words = " ".join(prompt.lower().split())
    thing = re.sub(rf", ({'|'.join(STYLE_WORDS)})$", "", re.sub(r"^(an?|the) ", "", words))
    if thing in labels:
        return list(labels).index(thing)
    near = difflib.get_close_matches(thing, labels, n=1) or [label for label in labels if label in thing.split()]
    such = f"did you mean {_caption(near[0])!r}?" if near else f"give one such as {_caption(labels[0])!r}."
    remedy = f"{such} For other prompts leave it out of the judges and rewards."
    raise ValueError(f"prompt={prompt!r} is not just a thing that emoji-names knows: {remedy}")


def _caption(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
