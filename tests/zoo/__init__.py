"""Tiny pipelines with random weights of every family that is supported: one row each, no download."""

from zoo import audio, diffusion_transformers, stable_diffusion, transformers, video
from zoo.row import Row

ROWS: list[Row] = [*stable_diffusion.ROWS, *transformers.ROWS, *diffusion_transformers.ROWS, *video.ROWS, *audio.ROWS]
"""Every supported pipeline."""

__all__ = ["ROWS", "Row"]
