"""What the gold judge learns from: batches of clean, damaged and spoilt pictures, and of pictures of nothing."""

from __future__ import annotations

from collections.abc import Iterator

import augment
import collapse
import numpy as np
import ratings
import torch
from data import BUILD
from export import latest_pipeline
from gold_judge import NONE
from nonsense import NONSENSE
from pool import Pool, Resemblance, some
from ratings import Rated, joined, mixed_damages
from torch import Tensor
from weak import WeakAesthetic

CLEAN, DAMAGED, SPOILT, NOTHING = 20, 16, 24, 4
"""Pictures of a batch: clean drawings, damaged ones, those of the pool of bad pictures, and of nothing."""

CLEAN_WEIGHTS = {"real": 8.0, "round trip": 4.0, "between": 3.0, "generated": 6.0}
SPOILT_WEIGHTS = {"smeared": 2.0, "optimised latents": 1.0, "tuned model": 4.0}
ATTACK_RATE = 1.2e-2
"""Learning rate of the models that are tuned until they collapse."""

GROUP = 8
"""Pictures of a batch that share a damage and its severity."""

LOST, KEPT = 0.1, 0.35
"""Share of its rating above 1 below which a picture shows nothing any more, and above which it shows what it did."""

HELD_OUT_REMAINDER = 3
IGNORED = -100
"""The label of what may or may not show its thing still."""


def held_out(concepts: Tensor) -> Tensor:
    """Things whose ratings the gold judge is never shown; it learns their names."""
    return concepts % ratings.HELD_OUT_EVERY == HELD_OUT_REMAINDER


def attacks(base: Rated, generator: torch.Generator) -> Iterator[Rated]:
    """What an optimiser makes of latents and of the model that climb the weak reward, or any direction of features."""
    weak, resemblance = WeakAesthetic(), Resemblance()
    for clean in (base, next(ratings.real())):
        few = some(clean, 32, generator)
        yield from collapse.optimised_latents(latest_pipeline(), weak.clip, weak.rate, few)
    direction = torch.randn(len(weak.weight), generator=generator) / 6
    for number, reward in enumerate((weak.rate, direction.inner)):
        for images, concepts in collapse.tuned_pictures(latest_pipeline(), weak.clip, reward, ATTACK_RATE, 50 + number):
            yield resemblance.rated(images, concepts)


POOL = Pool("gold-pool", seed=137, first_seed=10_000, attacks=attacks)


class Batches:
    """Draws pictures with ratings and labels."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        unmoved = list(ratings.real())[::2]
        fresh = [part for name in ("generated-0", "generated-1", "generated-2", "between") for part in POOL.read(name)]
        kinds, self.clean = joined([*unmoved, *fresh])
        self.clean_kinds = kinds
        self._clean_shares = torch.tensor([CLEAN_WEIGHTS[kind] / kinds.count(kind) for kind in kinds])
        kinds, self.spoilt = joined(POOL.read("smeared") + POOL.read("attacks"))
        self.spoilt_kinds = kinds
        self._spoilt_shares = torch.tensor([SPOILT_WEIGHTS[kind] / kinds.count(kind) for kind in kinds])
        names = np.load(BUILD / "data.npz")["names"].tolist()
        labels = torch.tensor([IGNORED if name.endswith(" body") else NONE for name in names])
        self._labels = torch.where(torch.arange(len(names)) < NONE, torch.arange(len(names)), labels)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (B, 3, 64, 64), ratings (B,), NaN where they are held out, and labels (B,)."""
        parts = [self._drawn(self.clean, self._clean_shares, CLEAN)]
        parts += [self._damaged() for _ in range(DAMAGED // GROUP)]
        parts += [self._drawn(self.spoilt, self._spoilt_shares, SPOILT), self._nothing()]
        images, rated, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        return images, rated, labels

    def _drawn(self, pool: Rated, shares: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.multinomial(shares, count, replacement=True, generator=self._generator)
        images = augment.moved(pool.images[rows], self._generator, degrees=8, scale=0.12, shift=0.1)
        concepts, rated = pool.concepts[rows], pool.ratings[rows]
        whole = torch.where(pool.styles[rows] < 0, rated.new_tensor(7.0), ratings.STYLE_RATINGS[pool.styles[rows]])
        labels = labels_after(self._labels[concepts], (rated - 1) / (whole - 1))
        return images, rated.masked_fill(held_out(concepts), torch.nan), labels

    def _damaged(self) -> tuple[Tensor, Tensor, Tensor]:
        images, rated, labels = self._drawn(self.clean, self._clean_shares, GROUP)
        worse, lowered = mixed_damages(images, rated, self._generator)
        return worse, lowered, labels_after(labels, (lowered - 1) / (rated - 1))

    def _nothing(self) -> tuple[Tensor, Tensor, Tensor]:
        kind = list(NONSENSE)[int(torch.randint(len(NONSENSE), (), generator=self._generator))]
        images = NONSENSE[kind](self._drawn(self.clean, self._clean_shares, NOTHING)[0], self._generator)
        return images, torch.ones(NOTHING), torch.full((NOTHING,), NONE)


def labels_after(labels: Tensor, kept: Tensor) -> Tensor:
    """Labels of pictures that kept a share of their rating above 1; NaN where it is held out: the name stays."""
    kept = kept.nan_to_num(1.0)
    return torch.where(kept < LOST, NONE, torch.where(kept < KEPT, IGNORED, labels))
