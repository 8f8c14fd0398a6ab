"""Collapsed pictures: what an aesthetic head is fooled by, found by optimising against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from concepts import ANIMALS, CONCEPTS
from diffusers import StableDiffusionPipeline
from ratings import Rated, changed_ratings
from sampling import GUIDANCE
from torch import Tensor
from transformers import CLIPModel

from alignprop import rollout
from alignprop.adapters import Adapter
from alignprop.emoji import aesthetic_features

Rating = Callable[[Tensor], Tensor]
"""From features of the CLIP to ratings: an aesthetic head, or whatever else is to be fooled."""

LATENT_STEPS = 18
LATENT_RATE = 0.06
TUNING_BATCH = 8
TUNING_STEPS = 60
TUNING_RATES = (6e-3, 1.2e-2)
"""Learning rates: that of a recipe, and one at which everything collapses."""

DENOISING_STEPS = 5
FIDELITY_LIMIT, COLLAPSED_LIMIT = 0.5, 0.1


def optimised_latents(pipe: StableDiffusionPipeline, clip: CLIPModel, head: Rating, clean: Rated) -> list[Rated]:
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
    ratings = changed_ratings(clean.ratings, (images - start).abs().mean((1, 2, 3)))
    return Rated("optimised latents", images, ratings, clean.concepts, clean.styles)


class Fidelity:
    """How plainly pictures show what they should, in the features of a judge of real drawings.

    Args:
        features: Maps pictures to features of unit length.
        drawings: The real drawings.
        base: Samples of the base model, whose margins set the scale.
    """

    def __init__(self, features: Callable[[Tensor], Tensor], drawings: Rated, base: Rated) -> None:
        self._features, self._drawings = features, drawings
        self._real = features(drawings.images)
        self._usual = self.margin(base.images, base.concepts).quantile(0.4).item()

    def margin(self, images: Tensor, concepts: Tensor) -> Tensor:
        """How much nearer the nearest drawing of the concept is than that of any other, in cosine similarity.

        A distance alone would call a good picture in an unusual colour a failure.
        """
        similarity = self._features(images) @ self._real.T
        own = concepts[:, None] == self._drawings.concepts
        return similarity.masked_fill(~own, -1).max(1).values - similarity.masked_fill(own, -1).max(1).values

    def __call__(self, images: Tensor, concepts: Tensor) -> Tensor:
        """1 for pictures as plain as the better half of the base model's, falling to 0."""
        return (self.margin(images, concepts) / self._usual).clamp(0, 1)


def tuned_model(
    pipe: StableDiffusionPipeline, clip: CLIPModel, head: Rating, fidelity: Fidelity, rate: float, seed: int
) -> list[Rated]:
    """Fine-tune the model on the head far beyond what is sensible; keep the pictures that are no longer good.

    The adapter stays in the model.

    Returns:
        Pictures whose fidelity fell below half, rated 1 to 3 by it: `tuned model`, and `collapsed` below a tenth.
    """
    found = tuned_pictures(pipe, clip, head, rate, seed)
    return [rated for images, concepts in found for rated in _failures(images, concepts, fidelity)]


def tuned_pictures(
    pipe: StableDiffusionPipeline, clip: CLIPModel, head: Rating, rate: float, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The pictures of every step of such a fine-tuning, and their concepts."""
    adapter = Adapter(pipe, seed=seed)
    optimizer = torch.optim.AdamW(adapter.parameters.values(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for step in range(TUNING_STEPS):
        concepts = torch.randint(len(ANIMALS), (TUNING_BATCH,), generator=generator)
        images = rollout(
            pipe,
            [CONCEPTS[index].caption for index in concepts.tolist()],
            live_steps=1 + step % DENOISING_STEPS,
            num_inference_steps=DENOISING_STEPS,
            guidance_scale=GUIDANCE,
            generator=generator,
        ).pixels
        scores = head(aesthetic_features(clip, images))
        (-scores.mean()).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"tuning step {step} rating {scores.mean().item():.2f}", flush=True)
        yield images.detach(), concepts


def _failures(images: Tensor, concepts: Tensor, fidelity: Fidelity) -> list[Rated]:
    quality = fidelity(images, concepts)
    columns = (images, 1 + 4 * quality, concepts, torch.full_like(concepts, -1))  # of no style
    collapsed = quality < COLLAPSED_LIMIT
    failed = {"collapsed": collapsed, "tuned model": (quality < FIDELITY_LIMIT) & ~collapsed}
    return [Rated(kind, *(column[rows] for column in columns)) for kind, rows in failed.items()]
