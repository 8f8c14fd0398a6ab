"""Given pictures, to go on training a model on while a reward changes it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignprop import distributed
from alignprop.estimators.base import MicroBatch
from alignprop.estimators.denoising_loss import denoising_loss
from alignprop.rewards.specimens import folder_specimens
from alignprop.rollout import Rollout, Sampler
from alignprop.seams import Checkpointing


@dataclass(frozen=True)
class Pretraining:
    """Pictures of a folder with their prompts.

    Attributes:
        images: (N, 3, H, W) in [0, 1].
        prompts: N of them.
    """

    images: Tensor
    prompts: tuple[str, ...]

    @staticmethod
    @functools.cache
    def of(folder: str) -> Pretraining:
        """Read a folder once.

        Raises:
            ValueError: there is no picture in it, or one cannot be read.
        """
        specimens = folder_specimens(Path(folder), limit=None)
        return Pretraining(specimens.images, specimens.prompts)

    def __call__(
        self,
        sampler: Sampler,
        batch: MicroBatch,
        weight: float,
        rollout: Rollout,
        x_0: Tensor,
        checkpointing: Checkpointing,
    ) -> tuple[float, int]:
        """Backpropagate the denoising loss of as many pictures as the micro-batch has.

        Args:
            sampler: the pipeline and the arguments of its call.
            batch: its seeds choose pictures and noise.
            weight: of each picture's loss.
            rollout: one of this pipeline, of the right size.
            x_0: the clean latents that it ended with, in the scheduler's units.
            checkpointing: activation checkpointing of the steps.

        Returns:
            The mean loss, and the number of denoiser calls.
        """
        seeds = [distributed.derive_seed(seed, len(self.prompts)) for seed in batch.seeds]
        chosen = [seed % len(self.prompts) for seed in seeds]
        latents = _encoded(sampler.pipeline, self.images[chosen], rollout, x_0)
        weights = torch.full((len(chosen),), weight)
        prompts = [self.prompts[i] for i in chosen]
        losses, calls = denoising_loss(sampler, prompts, seeds, latents, weights, checkpointing)
        return losses.mean().item(), calls


@torch.no_grad()
def _encoded(pipeline: Any, images: Tensor, rollout: Rollout, x_0: Tensor) -> Tensor:
    """Clean latents of pictures, for pipelines whose latents are their decoder's, shifted and scaled."""
    vae = getattr(pipeline, "vae", None)
    config = getattr(vae, "config", {})
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor") or 0.0
    if (
        vae is None
        or rollout.latents.shape != x_0.shape
        or not torch.allclose((rollout.latents.float() - shift) * scale, x_0.detach().float(), rtol=1e-2, atol=1e-3)
    ):
        raise ValueError(
            f"images: the latents of {type(pipeline).__name__} are not its decoder's, shifted and scaled, so that "
            "pictures cannot be encoded for it; leave estimator.arguments.images out."
        )
    parameter = next(vae.parameters())
    sized = F.interpolate(images, size=rollout.pixels.shape[-2:], mode="bilinear", antialias=True)
    posterior = vae.encode(sized.to(parameter) * 2 - 1)[0]
    latents: Tensor = (posterior.mode() - shift) * scale
    return latents.to(x_0)
