"""Stage `rater`: a very small convnet that rates drawings, the judge of the package beside the aesthetic head.

It shares nothing with the CLIP: it sees pixels, and the attacks that it learns from have other seeds than the head's.
The ratings of every sixth thing, others than the head's and the gold judge's, are held out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import augment
import collapse
import ratings
import torch
import torch.nn.functional as F
from checkpoint import Checkpoint
from concepts import STYLES
from data import BUILD
from export import latest_pipeline
from nonsense import NONSENSE
from pool import Pool, Resemblance, some
from ratings import Rated, joined, mixed_damages
from safetensors.torch import save_file
from schedule import warm_up_and_decay
from torch import Tensor, nn
from transformers import CLIPModel

from alignprop.emoji import AestheticHead, Rater

SEED = 211
WIDTHS = (16, 32, 48, 72)
LEARNING_RATE = 3e-3
CLEAN, DAMAGED, SMEARED, ATTACKED, NOTHING = 20, 16, 8, 20, 4
"""Pictures of a batch: clean drawings, damaged ones, with disturbed latents, made by attacks, and of nothing."""

WEIGHTS = {"real": 8.0, "round trip": 4.0, "between": 3.0, "generated": 6.0, "smeared": 1.0}
WEIGHTS |= {"tuned model": 3.0, "optimised latents": 1.0}
GROUP = 8
"""Pictures of a batch that share a damage and its severity."""

HELD_OUT_REMAINDER = 1
TUNINGS = ((True, 1.2e-2), (False, 1.2e-2), (True, 6e-3), (False, 1.2e-2))
"""Models tuned until they collapse: whether on the aesthetic head or on a random direction of its features, and the
learning rate."""


def attacks(base: Rated, generator: torch.Generator) -> Iterator[Rated]:
    """What an optimiser makes of the model and of latents that climb the aesthetic head, or any direction."""
    clip = CLIPModel.from_pretrained(BUILD / "clip").eval().requires_grad_(False)
    head = AestheticHead.from_pretrained(BUILD / "head").eval().requires_grad_(False)
    resemblance = Resemblance()
    for number, (on_head, rate) in enumerate(TUNINGS):
        direction = torch.randn(len(head.mean), generator=generator) / 6
        climbed = head if on_head else direction.inner
        for images, concepts in collapse.tuned_pictures(latest_pipeline(), clip, climbed, rate, 70 + number):
            yield resemblance.rated(images, concepts)
    for clean in (base, next(ratings.real())):
        yield from collapse.optimised_latents(latest_pipeline(), clip, head, some(clean, 32, generator))


POOL = Pool("rater-pool", seed=SEED, first_seed=30_000, attacks=attacks)


def held_out(concepts: Tensor) -> Tensor:
    """Things whose ratings the rater is never shown."""
    return concepts % ratings.HELD_OUT_EVERY == HELD_OUT_REMAINDER


class Pictures:
    """Pictures of some kinds, drawn by the weights of the kinds, of things that are not held out."""

    def __init__(self, parts: list[Rated], generator: torch.Generator) -> None:
        self.kinds, self.all = joined(parts)
        shares = torch.tensor([WEIGHTS[kind] / self.kinds.count(kind) for kind in self.kinds])
        self._shares, self._generator = shares * ~held_out(self.all.concepts), generator

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Pictures (count, 3, 64, 64), moved a little, and ratings (count,)."""
        rows = torch.multinomial(self._shares, count, replacement=True, generator=self._generator)
        images = augment.moved(self.all.images[rows], self._generator, degrees=8, scale=0.12, shift=0.1)
        return images, self.all.ratings[rows]


class Batches:
    """Draws pictures with ratings."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        unmoved = list(ratings.real())[::2]
        fresh = [part for name in ("generated-1", "generated-2", "between") for part in POOL.read(name)]
        self.clean = Pictures([*unmoved, *fresh], generator)
        self.smeared = Pictures(POOL.read("smeared"), generator)
        self.attacked = Pictures(POOL.read("attacks"), generator)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, 64, 64) and ratings (B,)."""
        parts = [self.clean.draw(CLEAN), self.smeared.draw(SMEARED), self.attacked.draw(ATTACKED)]
        parts += [mixed_damages(*self.clean.draw(GROUP), self._generator) for _ in range(DAMAGED // GROUP)]
        kind = list(NONSENSE)[int(torch.randint(len(NONSENSE), (), generator=self._generator))]
        parts.append((NONSENSE[kind](self.clean.draw(NOTHING)[0], self._generator), torch.ones(NOTHING)))
        images, rated = zip(*parts, strict=True)
        return torch.cat(images), torch.cat(rated)


def train(steps: int) -> Rater:
    """Train, from the last checkpoint if there is one."""
    torch.manual_seed(SEED)
    rater = Rater(WIDTHS).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(rater.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = warm_up_and_decay(optimizer, steps, warm_up=100, decay=0.6)
    generator = torch.Generator().manual_seed(SEED)
    batches = Batches(generator)
    parts = {"rater": rater, "optimizer": optimizer, "schedule": schedule}
    checkpoint = Checkpoint(BUILD / "rater.pt", parts, generator)
    for step in checkpoint.steps(steps):
        images, rated = batches.draw()
        loss = F.smooth_l1_loss(rater(images.contiguous(memory_format=torch.channels_last)), rated)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(rater.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        checkpoint.log(step, loss)
    return rater.eval().requires_grad_(False)


def save(rater: Rater, folder: Path) -> None:
    """Write a rater as `Rater.from_pretrained` reads it, in half precision."""
    folder.mkdir(exist_ok=True)
    state = rater.state_dict()
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    state = {name: state[name].half().contiguous() for name in state if name not in counters}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"widths": WIDTHS}) + "\n")


@torch.no_grad()
def figures(rater: Rater, images: Tensor, rated: Tensor) -> dict[str, float]:
    """How near the ratings come to what they should be."""
    found = torch.cat([rater(part) for part in images.split(100)])
    row = {
        "count": len(found),
        "should be": rated.mean().item(),
        "mean": found.mean().item(),
        "error": (found - rated).abs().mean().item(),
    }
    if rated.std() > 0:
        row["correlation"] = torch.corrcoef(torch.stack((found, rated)))[0, 1].item()
    return {name: round(value, 3) for name, value in row.items()}


def report(rater: Rater) -> dict[str, dict[str, float]]:
    """The figures of things that were held out: by kind, of clean ones by style, damaged, and of nothing."""
    generator = torch.Generator().manual_seed(SEED + 1)
    batches, table = Batches(generator), dict[str, dict[str, float]]()
    for pictures in (batches.clean, batches.smeared, batches.attacked):
        rows = held_out(pictures.all.concepts)
        for kind in dict.fromkeys(pictures.kinds):
            own = rows & torch.tensor([other == kind for other in pictures.kinds])
            if own.any():
                table[kind] = figures(rater, pictures.all.images[own], pictures.all.ratings[own])
    real = next(ratings.real())
    for number, style in enumerate(STYLES):
        own = held_out(real.concepts) & (real.styles == number)
        table[f"real, {style}"] = figures(rater, real.images[own], real.ratings[own])
    images, rated = real.images[held_out(real.concepts)], real.ratings[held_out(real.concepts)]
    for kind in ratings.DAMAGES:
        worse = ratings.DAMAGES[kind](images, 0.5, generator)
        table[f"{kind}, 0.5"] = figures(rater, worse, ratings.lowered(kind, 0.5, images, worse, rated))
    for kind, nonsense in NONSENSE.items():
        table[kind] = figures(rater, nonsense(images, generator), torch.ones(len(images)))
    return table


def main() -> None:
    """Make the pool, train the rater, save it and measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    POOL.make()
    save(train(arguments.steps), BUILD / "rater")
    table = report(Rater.from_pretrained(BUILD / "rater").eval())
    (BUILD.parent / "rater.json").write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
