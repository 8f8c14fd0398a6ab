"""Collapsed pictures: what an aesthetic head is fooled by, found by optimising against it."""

from __future__ import annotations

import torch
from concepts import ANIMALS, CONCEPTS
from diffusers import StableDiffusionPipeline
from ratings import Rated
from sampling import GUIDANCE
from torch import Tensor
from transformers import CLIPModel

from alignprop import rollout
from alignprop.adapters import Adapter
from alignprop.emoji import AestheticHead, aesthetic_features

LATENT_STEPS = 18
LATENT_RATE = 0.06
TOLERATED_CHANGE = 0.06
"""Mean absolute change of the pixels at which a picture that was optimised has lost most of its rating."""

TUNING_BATCH = 8
TUNING_STEPS = 40
TUNING_RATE = 1e-2
DENOISING_STEPS = 10
FIDELITY_LIMIT = 0.5


def optimised_latents(pipe: StableDiffusionPipeline, clip: CLIPModel, head: AestheticHead, clean: Rated) -> list[Rated]:
    """Climb the rating from the latents of clean pictures and rate the results by how far they went.

    Such a climb changes a picture without making another good one, so its rating falls with the change.
    """
    with torch.no_grad():
        latents = pipe.vae.encode(2 * clean.images - 1).latent_dist.mean
        start = ((pipe.vae.decode(latents).sample + 1) / 2).clamp(0, 1)
    latents.requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=LATENT_RATE)
    results = []
    for step in range(LATENT_STEPS):
        images = ((pipe.vae.decode(latents).sample + 1) / 2).clamp(0, 1)
        if step % 6 == 5 or step == 2:
            results.append(_rated_by_change(clean, start, images.detach()))
        (-head(aesthetic_features(clip, images)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return results


def _rated_by_change(clean: Rated, start: Tensor, images: Tensor) -> Rated:
    change = (images - start).abs().mean((1, 2, 3))
    ratings = 1 + (clean.ratings - 1) * torch.exp(-((change / TOLERATED_CHANGE) ** 2))
    return Rated("optimised latents", images, ratings, clean.concepts, clean.styles)


class Fidelity:
    """How far pictures are from any real drawing of their concept, in the features of a judge of real drawings.

    Args:
        features: Maps pictures to features of unit length.
        drawings: The real drawings.
        base: Samples of the base model, whose distances set the scale.
    """

    def __init__(self, features: torch.nn.Module, drawings: Rated, base: Rated) -> None:
        self._features, self._drawings = features, drawings
        self._real = features(drawings.images)
        distances = self.distance(base.images, base.concepts)
        self._usual, self._worst = distances.quantile(torch.tensor([0.6, 0.95])).tolist()

    def distance(self, images: Tensor, concepts: Tensor) -> Tensor:
        """Cosine distance to the nearest real drawing of the concept."""
        similarity = self._features(images) @ self._real.T
        similarity[concepts[:, None] != self._drawings.concepts] = -1
        return 1 - similarity.max(1).values

    def __call__(self, images: Tensor, concepts: Tensor) -> Tensor:
        """1 for pictures as good as the better half of the base model's, falling to 0."""
        distance = self.distance(images, concepts)
        return ((self._worst - distance) / (self._worst - self._usual)).clamp(0, 1)


def tuned_model(
    pipe: StableDiffusionPipeline, clip: CLIPModel, head: AestheticHead, fidelity: Fidelity, seed: int
) -> list[Rated]:
    """Fine-tune the model on the head far beyond what is sensible; keep the pictures that are no longer good.

    Returns:
        Pictures whose fidelity fell below half, rated 1 to 3 by it.
    """
    adapter = Adapter(pipe, seed=seed)
    optimizer = torch.optim.AdamW(adapter.parameters.values(), lr=TUNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    results = []
    for step in range(TUNING_STEPS):
        concepts = torch.randint(len(ANIMALS), (TUNING_BATCH,), generator=generator)
        images = rollout(
            pipe,
            [CONCEPTS[index].caption for index in concepts.tolist()],
            live_steps=1 + step % 3,
            num_inference_steps=DENOISING_STEPS,
            guidance_scale=GUIDANCE,
            generator=generator,
        ).pixels
        scores = head(aesthetic_features(clip, images))
        if step % 2:
            results.append(_failures(images.detach(), concepts, fidelity))
        (-scores.mean()).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"tuning step {step} rating {scores.mean().item():.2f}", flush=True)
    return results


def _failures(images: Tensor, concepts: Tensor, fidelity: Fidelity) -> Rated:
    quality = fidelity(images, concepts)
    failed = quality < FIDELITY_LIMIT
    unknown_style = torch.full_like(concepts, -1)
    columns = (images, 1 + 4 * quality, concepts, unknown_style)
    return Rated("tuned model", *(column[failed] for column in columns))
