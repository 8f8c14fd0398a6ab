"""The embedded text-to-image model, a small latent diffusion model of emoji drawings, with the models of its rewards.

It is a real `StableDiffusionPipeline` of 64 px pictures that ships inside the package, so that every recipe,
test and example has a model without a download. `weights/README.md` is the model card.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alignprop.emoji.aesthetic import AestheticHead, aesthetic_features, image_features, preprocess
from alignprop.emoji.names import Namer, label_of
from alignprop.emoji.rating import Rater
from alignprop.emoji.style import STYLES, StyleClassifier

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel, CLIPTokenizer

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the model: a `StableDiffusionPipeline` with `clip/`, `aesthetic/`, `classifier/`, `names/` and `rater/`
beside its parts."""

IMAGE_SIZE = 64
"""Height and width of the model's pictures in pixels."""

_PROMPTS = Path(__file__).parent / "prompts"


def pipeline(torch_dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Load the text-to-image pipeline, without a progress bar.

    Args:
        torch_dtype: Floating point type of the weights; they are stored in float16.
    """
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        WEIGHTS, torch_dtype=torch_dtype, safety_checker=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip() -> tuple[CLIPModel, CLIPTokenizer]:
    """Load the CLIP of the rewards, frozen, in evaluation mode and float32, with its tokenizer."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(WEIGHTS / "clip", torch_dtype=torch.float32, local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "clip", local_files_only=True)
    return model.eval().requires_grad_(False), tokenizer


def aesthetic() -> AestheticHead:
    """Load the aesthetic head, frozen, in evaluation mode and float32."""
    return AestheticHead.from_pretrained(WEIGHTS / "aesthetic").eval().requires_grad_(False)


def classifier() -> StyleClassifier:
    """Load the classifier of styles of drawing, frozen, in evaluation mode and float32."""
    return StyleClassifier.from_pretrained(WEIGHTS / "classifier").eval().requires_grad_(False)


def names() -> Namer:
    """Load the namer of drawn things, frozen, in evaluation mode and float32."""
    return Namer.from_pretrained(WEIGHTS / "names").eval().requires_grad_(False)


def rater() -> Rater:
    """Load the rater of drawings, frozen, in evaluation mode and float32."""
    return Rater.from_pretrained(WEIGHTS / "rater").eval().requires_grad_(False)


def prompts(name: str) -> list[str]:
    """Read a list of prompts of the package, one a line.

    Args:
        name: `animals` (the 45 training animals), `unseen` (8 animals for evaluation only) or `drift`
            (4 objects that show whether training for animals spoils the rest).

    Raises:
        ValueError: There is no such list.
    """
    known = sorted(path.stem for path in _PROMPTS.glob("*.txt"))
    if name not in known:
        raise ValueError(f"prompts={name!r} is not a list of the embedded model; choose one of {', '.join(known)}.")
    return (_PROMPTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()


__all__ = [
    "IMAGE_SIZE",
    "STYLES",
    "WEIGHTS",
    "AestheticHead",
    "Namer",
    "Rater",
    "StyleClassifier",
    "aesthetic",
    "aesthetic_features",
    "classifier",
    "clip",
    "image_features",
    "label_of",
    "names",
    "pipeline",
    "preprocess",
    "prompts",
    "rater",
]
