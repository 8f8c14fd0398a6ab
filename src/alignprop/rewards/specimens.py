"""Pictures to examine a reward on: a folder of the user's, or some that the embedded model draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alignprop.pixels import from_pil

NUM_PICTURES = 4
NUM_STEPS = 5
"""Denoising steps of the embedded model's pictures."""
LARGEST = 512
"""Height and width to which larger pictures of different sizes are reduced."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Specimens:
    """Pictures with prompts.

    Attributes:
        images: Shape (B, 3, H, W) in [0, 1], float32.
        prompts: B of them.
        origin: Where they are from, in words.
    """

    images: Tensor
    prompts: tuple[str, ...]
    origin: str


def drawn_specimens(prompt: str | None = None) -> Specimens:
    """Let the embedded model draw.

    Args:
        prompt: Of all pictures; None for the first of its animals.
    """
    from alignprop import emoji

    prompts = [prompt] * NUM_PICTURES if prompt else emoji.prompts("animals")[:NUM_PICTURES]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    pipeline = emoji.pipeline()
    images = pipeline(prompts, num_inference_steps=NUM_STEPS, generator=generators, output_type="pt").images
    size = f"{images.shape[-2]} x {images.shape[-1]} px"
    origin = f"{len(prompts)} pictures of {size} that the embedded model draws in {NUM_STEPS} steps"
    return Specimens(images.float(), tuple(prompts), origin)


def folder_specimens(folder: Path, prompt: str | None = None, limit: int | None = NUM_PICTURES) -> Specimens:
    """Read the first pictures of a folder, by name.

    If their sizes differ, squares are cut from their centres and brought to the size of the smallest.

    Args:
        folder: Holds .png, .jpg, .jpeg, .webp or .bmp files.
        prompt: Of all pictures; None for their names, `a_cat.png` for "a cat".
        limit: How many; None for all.

    Raises:
        ValueError: There is no such folder, no picture in it, or one cannot be read.
    """
    from PIL import Image, ImageOps

    if not folder.is_dir():
        raise ValueError(f"--images {folder} is no folder; give one with pictures in it.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:limit]
    if not paths:
        raise ValueError(f"--images {folder} holds no picture ({', '.join(SUFFIXES)}); give a folder that does.")
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                pictures.append(picture.convert("RGB"))
        except OSError as error:
            raise ValueError(f"--images {folder}: {path.name} cannot be read as a picture; remove it.") from error
    if len({picture.size for picture in pictures}) > 1:
        edge = min(LARGEST, *(min(picture.size) for picture in pictures))
        pictures = [ImageOps.fit(picture, (edge, edge), Image.Resampling.LANCZOS) for picture in pictures]
    width, height = pictures[0].size
    names = tuple(prompt or path.stem.replace("_", " ").replace("-", " ") for path in paths)
    return Specimens(from_pil(pictures), names, f"{len(paths)} pictures of {folder}, {height} x {width} px")
