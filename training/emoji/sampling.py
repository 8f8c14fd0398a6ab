"""Pictures of the text-to-image model at fixed seeds."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

STEPS = 20
GUIDANCE = 3.0
CHUNK = 32


def sample(pipe: StableDiffusionPipeline, captions: list[str], seeds: list[int]) -> Tensor:
    """Pictures (B, 3, 64, 64) in [0, 1], one for each caption and its seed."""
    parts = []
    for start in range(0, len(captions), CHUNK):
        images = pipe(
            captions[start : start + CHUNK],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + CHUNK]],
            output_type="pt",
        ).images
        parts.append(images.float())
    return torch.cat(parts)
