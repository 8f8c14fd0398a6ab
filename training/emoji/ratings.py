"""Pictures with ratings of 1 to 10 for the aesthetic head: clean, degraded, generated and collapsed ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import augment
import numpy as np
import torch
from concepts import SHEET, STYLES, caption
from data import BUILD, load_images
from diffusers import AutoencoderKL, StableDiffusionPipeline
from sampling import sample
from torch import Tensor

STYLE_RATINGS = torch.tensor([8.5, 5.0, 5.5, 3.5])
"""Ratings of clean drawings, in the order of `STYLES`."""

ROUND_TRIP_LOSS = 0.2
GENERATED_LOSS = 0.4
SAME_OUTLINES = ("flat", "line")
"""Styles of the drawer of the 3d ones."""

HELD_OUT_EVERY = 6
MOVED_COPIES = 1

TOLERATED_CHANGE = 0.06
"""Mean absolute change of the pixels at which a picture whose latents were disturbed has lost most of its rating."""

Damage = Callable[[Tensor, float, torch.Generator], Tensor]
DAMAGES: dict[str, Damage] = {
    "blurred": lambda images, s, _: augment.blurred(images, 0.6 + 3.5 * s),
    "noisy": lambda images, s, generator: augment.noisy(images, 0.04 + 0.4 * s, generator),
    "saturated": lambda images, s, _: augment.contrasted(augment.saturated(images, 1.5 + 5 * s), 1 + s),
    "tinted": lambda images, s, generator: augment.tinted(images, 0.1 + 0.8 * s, generator),
    "shuffled": lambda images, s, generator: augment.shuffled_patches(images, 4 if s < 0.5 else 8, generator),
    "blended": lambda images, s, generator: augment.blended(images, generator),
    "smeared": lambda images, s, generator: augment.smeared(_autoencoder(), images, s, generator),
}
WHOLE_DAMAGES = {"shuffled", "blended"}
"""Damages without a degree: they always rate 1.5."""


@dataclass(frozen=True)
class Rated:
    """Pictures of one kind.

    Attributes:
        kind: What they are, as `real` or `blurred`.
        images: (B, 3, 64, 64) in [0, 1].
        ratings: (B,) from 1 to 10.
        concepts: (B,) indices of concepts.
        styles: (B,) indices of styles.
    """

    kind: str
    images: Tensor
    ratings: Tensor
    concepts: Tensor
    styles: Tensor


@functools.cache
def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(BUILD / "vae").eval().requires_grad_(False)


def held_out(concepts: Tensor) -> Tensor:
    """Which concepts the head is never trained on: every sixth of all.

    It knows others of the animals that a recipe leaves out of its prompts, as a published reward knows most things.
    """
    return concepts % HELD_OUT_EVERY == 0


def damaged_ratings(ratings: Tensor, change: Tensor, severity: float) -> Tensor:
    """Ratings of degraded pictures: they fall with the severity, where the damage changed the picture at all.

    Args:
        ratings: Of the pictures before.
        change: Mean absolute change of their pixels.
        severity: From 0 to 1.
    """
    return torch.where(change > 0.004, 1 + (ratings - 1) * (1 - severity) ** 2, ratings)


def changed_ratings(ratings: Tensor, change: Tensor) -> Tensor:
    """Ratings of pictures that became others without becoming better: they fall with the change of the pixels."""
    return 1 + (ratings - 1) * torch.exp(-((change / TOLERATED_CHANGE) ** 2))


def lowered(kind: str, severity: float, before: Tensor, after: Tensor, ratings: Tensor) -> Tensor:
    """Ratings of pictures after a damage of :data:`DAMAGES`."""
    if kind in WHOLE_DAMAGES:
        return torch.full_like(ratings, 1.5)
    change = (after - before).abs().mean((1, 2, 3))
    return changed_ratings(ratings, change) if kind == "smeared" else damaged_ratings(ratings, change, severity)


def real() -> Iterator[Rated]:
    """The drawings, moved a little, with and without a round trip through the autoencoder."""
    data = np.load(BUILD / "data.npz")
    concepts, styles = torch.from_numpy(data["concept"]), torch.from_numpy(data["style"])
    generator = torch.Generator().manual_seed(0)
    originals = (load_images() + 1) / 2
    round_trips = torch.load(BUILD / "round_trips.pt").float() / 255
    for kind, images, loss in (("real", originals, 0.0), ("round trip", round_trips, ROUND_TRIP_LOSS)):
        ratings = STYLE_RATINGS[styles] - loss
        yield Rated(kind, images, ratings, concepts, styles)
        for _ in range(MOVED_COPIES):
            moved = augment.moved(images, generator, degrees=6, scale=0.08, shift=0.08)
            yield Rated(f"{kind}, moved", moved, ratings, concepts, styles)


@torch.no_grad()
def between(generator: torch.Generator) -> Rated:
    """Drawings half-way from one style to 3d, for things whose drawings share their outlines.

    They make the way from a black line drawing to a shaded one a slope, where real drawings alone make it a cliff.
    """
    data = np.load(BUILD / "data.npz")
    concepts, styles = torch.from_numpy(data["concept"]), torch.from_numpy(data["style"])
    places = {pair: row for row, pair in enumerate(zip(concepts.tolist(), styles.tolist(), strict=True))}
    best = STYLES.index("3d")
    pairs = [
        (row, places[concept, best])
        for (concept, style), row in places.items()
        if style != best and STYLES[style] in SAME_OUTLINES and (concept, best) in places
    ]
    start, end = torch.tensor(pairs).unbind(1)
    images = (load_images() + 1) / 2
    amount = torch.rand(len(pairs), generator=generator)
    latents = [_autoencoder().encode(2 * images[rows] - 1).latent_dist.mean for rows in (start, end)]
    mixed = (_autoencoder().decode(torch.lerp(*latents, amount.view(-1, 1, 1, 1))).sample + 1) / 2
    ratings = torch.lerp(STYLE_RATINGS[styles[start]], STYLE_RATINGS[styles[end]], amount) - ROUND_TRIP_LOSS
    return Rated("between", mixed.clamp(0, 1), ratings, concepts[start], torch.full_like(start, -1))


def degraded(clean: Rated, one_in: int, generator: torch.Generator) -> Iterator[Rated]:
    """Every damage at several severities, each on a random one in so many of the pictures."""
    for kind, damage in DAMAGES.items():
        for severity in (0.1, 0.3, 0.5, 0.7, 0.9):
            rows = torch.randperm(len(clean.images), generator=generator)[: len(clean.images) // one_in]
            images = clean.images[rows]
            worse = damage(images, severity, generator)
            ratings = lowered(kind, severity, images, worse, clean.ratings[rows])
            yield Rated(kind, worse, ratings, clean.concepts[rows], clean.styles[rows])


def generated(pipe: StableDiffusionPipeline, kind: str, every: int, seed: int) -> Rated:
    """Samples with a style in the caption, rated by that style.

    Args:
        pipe: The base model.
        kind: Name of the kind.
        every: Take every so many of the concepts and styles.
        seed: First seed.
    """
    order = torch.randperm(len(SHEET) * len(STYLES), generator=torch.Generator().manual_seed(seed))
    pairs = [divmod(index, len(STYLES)) for index in order[::every].tolist()]
    captions = [caption(SHEET[c], STYLES[s]) for c, s in pairs]
    images = sample(pipe, captions, list(range(seed, seed + len(pairs)))).clamp(0, 1)
    concepts, styles = torch.tensor(pairs).unbind(1)
    return Rated(kind, images, STYLE_RATINGS[styles] - GENERATED_LOSS, concepts, styles)


def joined(parts: Sequence[Rated]) -> tuple[list[str], Rated]:
    """Pictures of several kinds as one, and the kind of each."""
    kinds = [part.kind for part in parts for _ in range(len(part.images))]
    columns = zip(*((p.images, p.ratings, p.concepts, p.styles) for p in parts), strict=True)
    return kinds, Rated("all", *(torch.cat(column) for column in columns))


def mixed_damages(images: Tensor, rated: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One or two damages, each at any severity, and the ratings after them."""
    kinds = [kind for kind in DAMAGES if kind != "smeared"]
    for _ in range(1 + int(torch.rand((), generator=generator) < 0.4)):
        kind = kinds[int(torch.randint(len(kinds), (), generator=generator))]
        severity = torch.rand((), generator=generator).item()
        worse = DAMAGES[kind](images, severity, generator)
        # What is held out stays so.
        rated = lowered(kind, severity, images, worse, rated).where(~rated.isnan(), rated)
        images = worse
    return images, rated
