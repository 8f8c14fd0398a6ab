"""What the gold judge says of pictures whose ratings were held out, and of the base model's pictures."""

from __future__ import annotations

import ratings
import torch
from concepts import ANIMALS, STYLES, UNSEEN
from export import latest_pipeline
from gold_batches import CLEAN_WEIGHTS, Batches, held_out
from gold_judge import GoldNet, score
from nonsense import NONSENSE
from ratings import Rated
from sampling import GUIDANCE
from torch import Tensor

from alignprop.rollout import Sampler


@torch.no_grad()
def judged(net: GoldNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """Ratings and logits of many pictures."""
    ratings_and_logits = [net(part) for part in images.split(128)]
    rating, logits = zip(*ratings_and_logits, strict=True)
    return torch.cat(rating), torch.cat(logits)


def held_out_pictures(batches: Batches, generator: torch.Generator) -> dict[str, Rated]:
    """Pictures of things whose ratings were held out, by kind: clean, damaged, of the pool, and of nothing."""
    found = {}
    for kinds, pool in ((batches.clean_kinds, batches.clean), (batches.spoilt_kinds, batches.spoilt)):
        for kind in dict.fromkeys(kinds):
            rows = held_out(pool.concepts) & torch.tensor([other == kind for other in kinds])
            found[kind] = Rated(kind, *(c[rows] for c in (pool.images, pool.ratings, pool.concepts, pool.styles)))
    real = found["real"]
    for kind, damage in ratings.DAMAGES.items():
        for severity in (0.25, 0.5, 0.75):
            worse = damage(real.images, severity, generator)
            lowered = ratings.lowered(kind, severity, real.images, worse, real.ratings)
            found[f"{kind}, {severity}"] = Rated(kind, worse, lowered, real.concepts, real.styles)
    for kind, nonsense in NONSENSE.items():
        images = nonsense(real.images, generator)
        found[kind] = Rated(kind, images, torch.ones(len(images)), real.concepts, torch.full_like(real.styles, -1))
    return found


def rating_figures(net: GoldNet, pictures: dict[str, Rated]) -> dict[str, object]:
    """Means, errors and quantiles of the rating by kind, and how well 3d is told from the rest."""
    table: dict[str, object] = {}
    everything = []
    for kind, rated in pictures.items():
        if not len(rated.images):
            continue
        found, _ = judged(net, rated.images)
        everything.append(torch.stack((found, rated.ratings)))
        row = {
            "count": len(found),
            "should be": rated.ratings.mean(),
            "mean": found.mean(),
            "error": (found - rated.ratings).abs().mean(),
            "highest tenth": found.quantile(0.9),
        }
        if kind in CLEAN_WEIGHTS and kind != "between":
            is_3d = rated.styles == 0
            row |= {style: found[rated.styles == number].mean() for number, style in enumerate(STYLES)}
            row["3d against the rest"] = ((found > 6.5) == is_3d).float().mean()
        table[kind] = _rounded(row)
    together = torch.cat(everything, 1)
    table["all"] = _rounded({
        "count": together.shape[1],
        "error": (together[0] - together[1]).abs().mean(),
        "correlation": torch.corrcoef(together)[0, 1],
        "rank correlation": torch.corrcoef(together.argsort(1).argsort(1).float())[0, 1],
    })  # fmt: skip
    return table


def score_figures(net: GoldNet, seed: int) -> dict[str, object]:
    """Names and gold scores of pictures that the base model draws for plain prompts at seeds that no one has seen."""
    things = [*ANIMALS, *UNSEEN]
    labels, table = torch.arange(len(things)).repeat(4), {}
    generator = torch.Generator().manual_seed(seed)
    for eta in (0.0, 1.0):
        sampler = Sampler(latest_pipeline(), {"num_inference_steps": 5, "guidance_scale": GUIDANCE, "eta": eta})
        captions = [thing.caption for thing in things]
        seeds = [range(20_000 + 100 * copy, 20_000 + 100 * copy + len(things)) for copy in range(4)]
        images = torch.cat([sampler.sample(captions, copy).clamp(0, 1) for copy in seeds])
        table[f"base model, eta {eta:.0f}"] = _score_row(net, images, labels)
    table["another animal"] = _score_row(net, images, labels.roll(1))
    for kind, damage in ratings.DAMAGES.items():
        table[f"{kind}, 0.5"] = _score_row(net, damage(images, 0.5, generator), labels)
    for kind, nonsense in NONSENSE.items():
        table[kind] = _score_row(net, nonsense(images, generator), labels)
    return table


def _score_row(net: GoldNet, images: Tensor, labels: Tensor) -> dict[str, float]:
    rating, logits = judged(net, images)
    probability, scores = logits.softmax(1).gather(1, labels[:, None])[:, 0], score(rating, logits, labels)
    return _rounded({
        "count": len(images),
        "named": (logits.argmax(1) == labels).float().mean(),
        "probability, lowest tenth": probability.quantile(0.1),
        "rating": rating.mean(),
        "gold": scores.mean(),
        "gold, highest tenth": scores.quantile(0.9),
    })  # fmt: skip


def _rounded(row: dict[str, float | Tensor]) -> dict[str, float]:
    return {name: round(float(value), 3) for name, value in row.items()}


def report(net: GoldNet, seed: int) -> dict[str, object]:
    """Ratings of things whose ratings were held out, and gold scores of the base model's pictures."""
    generator = torch.Generator().manual_seed(seed)
    pictures = held_out_pictures(Batches(generator), generator)
    return {"ratings": rating_figures(net, pictures), "scores": score_figures(net, seed + 1)}
