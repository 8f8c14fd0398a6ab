"""Stage `head`: trains the aesthetic head in rounds, each against the pictures that fooled the last one.

A head trained on clean pictures alone is hacked at once: its gradient leads to noise of a high rating. So it learns
on degraded pictures from the start, and after every round on what an optimiser makes of the latents and of the model
against it.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import collapse
import numpy as np
import ratings
import torch
import torch.nn.functional as F
from checkpoint import Checkpoint
from concepts import CONCEPTS, SHEET
from data import BUILD
from diffusers import StableDiffusionPipeline
from export import latest_pipeline
from judge import load_judge
from ratings import Rated
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel

from alignprop.emoji import AestheticHead, aesthetic_features
from alignprop.emoji.style import StyleClassifier

SEED = 61
BATCH = 256
LEARNING_RATE = 1e-3
FEATURE_NOISE = 0.1
GROUP_WEIGHTS = {
    "real": 10.0,
    "round trip": 4.0,
    "between": 3.0,
    "generated": 5.0,
    "optimised": 1.5,
    "tuned": 1.5,
    "collapsed": 1.5,
}
"""Weights of the kinds that begin so, in training; all damages together weigh as much as four of them."""

DAMAGE_WEIGHT = 4.0


class Features:
    """Features and ratings of everything the head has been shown, computed once."""

    def __init__(self, clip: CLIPModel) -> None:
        self._clip = clip
        self.kinds: list[str] = []
        self._parts: dict[str, list[Tensor]] = defaultdict(list)

    @torch.no_grad()
    def add(self, rated: Rated) -> None:
        """Take up pictures, if there are any: an attack may find none."""
        if not len(rated.images):
            return
        features = [aesthetic_features(self._clip, part) for part in rated.images.split(256)]
        self.kinds += [rated.kind] * len(rated.images)
        columns = {
            "features": torch.cat(features),
            "ratings": rated.ratings,
            "concepts": rated.concepts,
            "styles": rated.styles,
        }
        for name, column in columns.items():
            self._parts[name].append(column)

    def state_dict(self) -> dict[str, object]:
        """All of it, for a checkpoint."""
        return {"kinds": self.kinds, "columns": {name: self[name] for name in self._parts}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back."""
        self.kinds = state["kinds"]
        self._parts = defaultdict(list, {name: [column] for name, column in state["columns"].items()})

    def __getitem__(self, name: str) -> Tensor:
        """All of a column."""
        return torch.cat(self._parts[name])

    def weights(self) -> Tensor:
        """Sampling weights: balanced between groups of kinds, none for held-out concepts."""
        groups = [_group(kind) for kind in self.kinds]
        counts = {group: groups.count(group) for group in set(groups)}
        weights = torch.tensor([GROUP_WEIGHTS.get(group, DAMAGE_WEIGHT) / counts[group] for group in groups])
        return weights.masked_fill(ratings.held_out(self["concepts"]), 0.0)


def _group(kind: str) -> str:
    return next((group for group in GROUP_WEIGHTS if kind.startswith(group)), "damaged")


def fit(shown: Features, steps: int) -> AestheticHead:
    """Train a new head on everything shown."""
    torch.manual_seed(SEED)
    head = AestheticHead(shown["features"].shape[1])
    train(head, shown["features"], shown["ratings"], shown.weights(), F.smooth_l1_loss, LEARNING_RATE, steps)
    return head


def train(
    head: AestheticHead | StyleClassifier,
    features: Tensor,
    target: Tensor,
    weights: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    learning_rate: float,
    steps: int,
) -> None:
    """Train a head on noisy features, drawn by their weights, and freeze it."""
    head.train()
    head.mean.copy_(features.mean(0))
    head.deviation.copy_(features.std(0) + 1e-3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(steps):
        rows = torch.multinomial(weights, BATCH, replacement=True)
        batch = features[rows] + FEATURE_NOISE * head.deviation * torch.randn(BATCH, features.shape[1])
        loss = loss_of(head(batch), target[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    head.eval().requires_grad_(False)


def best_threshold(scores: Tensor, styles: Tensor, rows: Tensor) -> float:
    """The rating that tells 3d from the rest best on pictures that the head was trained on."""
    candidates = torch.linspace(5, 8.5, 71)
    right = (scores[rows] > candidates[:, None]) == (styles[rows] == 0)
    return round(candidates[right.float().mean(1).argmax()].item(), 2)


@torch.no_grad()
def report(head: AestheticHead, shown: Features) -> dict[str, object]:
    """Mean ratings by kind and style, and the accuracy of 3d against the rest, on held-out concepts only."""
    scores, styles, concepts = head(shown["features"]), shown["styles"], shown["concepts"]
    held_out, kinds = ratings.held_out(concepts), np.array(shown.kinds)
    threshold = best_threshold(scores, styles, torch.from_numpy(kinds == "real") & ~held_out)
    right = ((scores > threshold) == (styles == 0)).float()
    table: dict[str, object] = {"threshold of 3d": threshold}
    for kind in sorted(set(shown.kinds)):
        rows = held_out & torch.from_numpy(kinds == kind)
        if rows.any():
            by_style = {
                style: round(scores[rows & (styles == index)].mean().item(), 2)
                for index, style in enumerate(ratings.STYLES)
                if (rows & (styles == index)).any()
            }
            table[kind] = {"count": int(rows.sum()), "mean": round(scores[rows].mean().item(), 2), **by_style}
    for kind in ("real", "round trip", "generated"):
        for things, limit in (("all", len(concepts)), ("the 116 of the judge", len(CONCEPTS)), ("drawn", len(SHEET))):
            rows = held_out & torch.from_numpy(kinds == kind) & (concepts < limit)
            accuracy = {"count": int(rows.sum()), "accuracy": round(right[rows].mean().item(), 4)}
            table[f"3d against the rest, {kind}, {things}"] = accuracy
    return table


def save(head: AestheticHead, folder: Path) -> None:
    """Write a head as `AestheticHead.from_pretrained` reads it."""
    folder.mkdir(exist_ok=True)
    save_file(head.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_features": len(head.mean)}) + "\n")


def head_of_round(number: int) -> AestheticHead:
    """The head that a round ended with."""
    return AestheticHead.from_pretrained(BUILD / f"head-{number}").eval().requires_grad_(False)


def clean_and_degraded(generator: torch.Generator) -> Iterator[Rated]:
    """The real drawings, their damages and what is between their styles."""
    for rated in ratings.real():
        yield rated
        if rated.kind in ("real", "round trip"):
            yield from ratings.degraded(rated, 40, generator)
    for _ in range(2):
        yield ratings.between(generator)


def some(rated: Rated, count: int, generator: torch.Generator) -> Rated:
    """A few of the pictures, of concepts that the head may see."""
    rows = torch.nonzero(~ratings.held_out(rated.concepts)).flatten()
    rows = rows[torch.randperm(len(rows), generator=generator)[:count]]
    columns = (rated.images, rated.ratings, rated.concepts, rated.styles)
    return Rated(rated.kind, *(column[rows] for column in columns))


def samples(pipe: StableDiffusionPipeline, every: int, seed: int, generator: torch.Generator) -> list[Rated]:
    """Styled samples of the base model and their damages."""
    clean = ratings.generated(pipe, "generated", every, seed)
    return [clean, *ratings.degraded(clean, 4, generator)]


def attack(
    head: AestheticHead, clip: CLIPModel, base: Rated, every: int, number: int, generator: torch.Generator
) -> Iterator[Rated]:
    """What fools the head, and good pictures of the model as well, or they sink with the bad ones."""
    pipe, drawings = latest_pipeline(), next(ratings.real())
    fidelity = collapse.Fidelity(load_judge().features, drawings, base)
    for clean in (some(base, 16, generator), some(drawings, 16, generator)):
        yield from collapse.optimised_latents(pipe, clip, head, clean)
    yield from samples(pipe, every, 1000 * (number + 1), generator)
    for rate in collapse.TUNING_RATES:
        yield from collapse.tuned_model(latest_pipeline(), clip, head, fidelity, rate, seed=number)


def main() -> None:
    """Train, attack and train again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2500, help="of each round's head")
    parser.add_argument("--last-steps", type=int, default=5000, help="of the head that is kept")
    parser.add_argument("--every", type=int, default=2, help="sample every so many of the concepts and styles")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    clip = CLIPModel.from_pretrained(BUILD / "clip").eval().requires_grad_(False)
    shown = Features(clip)
    base = ratings.generated(latest_pipeline(), "generated", arguments.every, seed=0)
    checkpoint = Checkpoint(BUILD / "head.pt", {"shown": shown}, generator, interval_s=0)
    for number in checkpoint.steps(arguments.rounds):
        if number:
            found = attack(head_of_round(number - 1), clip, base, arguments.every, number - 1, generator)
        else:
            found = itertools.chain(
                clean_and_degraded(generator), samples(latest_pipeline(), arguments.every, 0, generator)
            )
        for rated in found:
            shown.add(rated)
        head = fit(shown, arguments.steps)
        save(head, BUILD / f"head-{number}")
        print(json.dumps({"round": number, **report(head, shown)}), flush=True)
    head = fit(shown, arguments.last_steps)
    save(head, BUILD / "head")
    (BUILD.parent / "head.json").write_text(json.dumps(report(head, shown), indent=1) + "\n")


if __name__ == "__main__":
    main()
