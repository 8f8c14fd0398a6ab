"""What a row of the zoo is: a tiny pipeline of a family, with random weights, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

CUT_OFF = "Its decoder cuts pixels off itself: those beyond black and white carry no gradient."
"""What some pipelines need to be known for."""


@dataclass(frozen=True)
class Row:
    """One pipeline of the table of supported pipelines.

    Attributes:
        name: what people call it.
        build: makes the pipeline anew with the same random weights, in a dtype.
        call: keyword arguments of its call beside the prompts; 2 to 4 denoising steps.
        prompts: two prompts that it understands.
        needs: what a user has to know, for the table in the documentation; empty if nothing.
        calls: denoiser calls in a denoising step.
        modality: what it makes: `image`, `video` or `audio`.
        targets: endings of the modules that take the LoRA; None for the attention projections.
        rounds: what computes in fp32 though the model is in float64, so that finite differences are coarser.
        exact: dtype of the comparison with finite differences; float64 unless the pipeline cannot run in it.
        blocks: whether diffusers can checkpoint the denoiser's blocks.
        sd_family: whether it is of the Stable Diffusion families, whose half precision is checked as well.
    """

    name: str
    build: Callable[[torch.dtype], Any]
    call: Mapping[str, Any]
    prompts: tuple[str, str] = ("a cat", "a dog")
    needs: str = ""
    calls: int = 1
    modality: str = "image"
    targets: tuple[str, ...] | None = None
    rounds: str = ""
    exact: torch.dtype = torch.float64
    blocks: bool = True
    sd_family: bool = False

    @property
    def id(self) -> str:
        """The name as pytest shows it."""
        return self.name.lower().replace(" ", "-")
