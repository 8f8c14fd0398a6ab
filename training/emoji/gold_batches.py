"""What the gold judge learns from: batches of clean, damaged and spoilt pictures, and of pictures of nothing."""

from __future__ import annotations

from collections.abc import Sequence

import augment
import numpy as np
import ratings
import torch
from data import BUILD
from gold_judge import NONE
from gold_pool import read_pool
from nonsense import NONSENSE
from ratings import Rated
from torch import Tensor

CLEAN, DAMAGED, SPOILT, NOTHING = 20, 16, 24, 4
"""Pictures of a batch: clean drawings, damaged ones, those of the pool of bad pictures, and of nothing."""

CLEAN_WEIGHTS = {"real": 8.0, "round trip": 4.0, "between": 3.0, "generated": 6.0}
SPOILT_WEIGHTS = {"smeared": 2.0, "optimised latents": 1.0, "tuned model": 4.0}
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


def _joined(parts: Sequence[Rated]) -> tuple[list[str], Rated]:
    kinds = [part.kind for part in parts for _ in range(len(part.images))]
    columns = zip(*((p.images, p.ratings, p.concepts, p.styles) for p in parts), strict=True)
    return kinds, Rated("all", *(torch.cat(column) for column in columns))


class Batches:
    """Draws pictures with ratings and labels."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        unmoved = list(ratings.real())[::2]
        fresh = [part for name in ("generated-0", "generated-1", "generated-2", "between") for part in read_pool(name)]
        kinds, self.clean = _joined([*unmoved, *fresh])
        self.clean_kinds = kinds
        self._clean_shares = torch.tensor([CLEAN_WEIGHTS[kind] / kinds.count(kind) for kind in kinds])
        kinds, self.spoilt = _joined(read_pool("smeared") + read_pool("attacks"))
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


def mixed_damages(images: Tensor, rated: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One or two damages, each at any severity, and the ratings after them."""
    kinds = [kind for kind in ratings.DAMAGES if kind != "smeared"]
    for _ in range(1 + int(torch.rand((), generator=generator) < 0.4)):
        kind = kinds[int(torch.randint(len(kinds), (), generator=generator))]
        severity = torch.rand((), generator=generator).item()
        worse = ratings.DAMAGES[kind](images, severity, generator)
        change = (worse - images).abs().mean((1, 2, 3))
        rated = ratings.damaged_ratings(rated, change, severity)
        if kind in ratings.WHOLE_DAMAGES:
            rated = torch.full_like(rated, 1.5).where(~rated.isnan(), rated)
        images = worse
    return images, rated
