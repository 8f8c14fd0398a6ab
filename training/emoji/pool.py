"""Pictures that take long to make, for the stages `rater` and `gold`: drawn by the model, smeared, made by attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ratings
import torch
from concepts import SHEET, STYLES, caption
from data import BUILD
from diffusers import StableDiffusionPipeline
from export import latest_pipeline
from ratings import Rated
from sampling import GUIDANCE
from sheet import gradient_features
from torch import Tensor

from alignprop.rollout import Sampler

LOST_SIMILARITY, WHOLE_SIMILARITY = 0.86, 0.945
"""To the nearest drawing of the thing, where nothing is left of a picture and where nothing is lost."""


def generated(pipe: StableDiffusionPipeline, steps: int, eta: float, seed: int) -> Rated:
    """A picture of everything that the model draws in each style."""
    pairs = [(thing, style) for thing in range(len(SHEET)) for style in range(len(STYLES))]
    sampler = Sampler(pipe, {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "eta": eta})
    captions = [caption(SHEET[thing], STYLES[style]) for thing, style in pairs]
    images = [sampler.sample(captions[n : n + 38], range(seed + n, seed + n + 38)) for n in range(0, len(pairs), 38)]
    concepts, styles = torch.tensor(pairs).unbind(1)
    rated = ratings.STYLE_RATINGS[styles] - ratings.GENERATED_LOSS
    return Rated("generated", torch.cat(images).clamp(0, 1), rated, concepts, styles)


def smeared(clean: Rated, count: int, generator: torch.Generator) -> Iterator[Rated]:
    """Drawings with disturbed latents, at any severity."""
    rows = torch.randperm(len(clean.images), generator=generator)[:count]
    for part in rows.split(24):
        images, severity = clean.images[part], torch.rand((), generator=generator).item()
        worse = ratings.DAMAGES["smeared"](images, severity, generator)
        lowered = ratings.changed_ratings(clean.ratings[part], (worse - images).abs().mean((1, 2, 3)))
        yield Rated("smeared", worse, lowered, clean.concepts[part], clean.styles[part])


class Resemblance:
    """Rates what a tuned model draws by how near it is to a real drawing of the thing, in a space that no one trained.

    The model has memorised the drawings, so good pictures are near them: the cosine similarity of `gradient_features`
    is 0.945 or more for nine in ten samples with a style, and 0.94 on average for plain prompts.
    """

    def __init__(self) -> None:
        self._drawings = next(ratings.real())
        self._features = gradient_features(self._drawings.images)

    def rated(self, images: Tensor, concepts: Tensor) -> Rated:
        """Rated as the nearest drawing of the thing, less what is lost."""
        similarity = gradient_features(images) @ self._features.T
        own = concepts[:, None] == self._drawings.concepts
        nearest, rows = similarity.masked_fill(~own, -1).max(1)
        kept = ((nearest - LOST_SIMILARITY) / (WHOLE_SIMILARITY - LOST_SIMILARITY)).clamp(0, 1)
        styles = self._drawings.styles[rows]
        whole = ratings.STYLE_RATINGS[styles] - ratings.GENERATED_LOSS
        return Rated("tuned model", images, 1 + kept * (whole - 1), concepts, styles)


Attacks = Callable[[Rated, torch.Generator], Iterator[Rated]]
"""From samples of the base model to what optimisers make of them and of the model."""


@dataclass(frozen=True)
class Pool:
    """Bad pictures and good ones that take long to make, kept in `build/`, a file a source.

    Attributes:
        name: of the folder.
        seed: of damages and attacks.
        first_seed: of the model's noise.
        attacks: see :data:`Attacks`.
    """

    name: str
    seed: int
    first_seed: int
    attacks: Attacks

    def make(self) -> None:
        """Make the pictures, unless they are there."""
        self._folder.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(self.seed)
        clean = list(ratings.real())[::2]  # unmoved
        first = self.first_seed

        def base() -> Rated:
            return self.read("generated-0")[0]

        sources: dict[str, Callable[[], Iterator[Rated]]] = {
            "generated-0": lambda: iter([generated(latest_pipeline(), 20, 0.0, first)]),
            "generated-1": lambda: iter([generated(latest_pipeline(), 5, 0.0, first + 1000)]),
            "generated-2": lambda: iter([generated(latest_pipeline(), 5, 1.0, first + 2000)]),
            "between": lambda: iter([ratings.between(generator)]),
            "smeared": lambda: (part for rated in (*clean, base()) for part in smeared(rated, 600, generator)),
            "attacks": lambda: self.attacks(base(), generator),
        }
        for name, source in sources.items():
            if self._path(name).exists():
                continue
            generator.manual_seed(self.seed + len(name))
            rows = [_packed(rated) for rated in source() if len(rated.images)]
            partial = self._path(name).with_suffix(".partial")
            torch.save(rows, partial)
            partial.rename(self._path(name))
            print(f"{name}: {sum(len(row['images']) for row in rows)} pictures", flush=True)

    def read(self, name: str) -> list[Rated]:
        """The pictures of one source, by kind."""
        rows = torch.load(self._path(name))
        return [
            Rated(**{**row, "images": row["images"].float() / 255, "ratings": row["ratings"].detach()}) for row in rows
        ]

    @property
    def _folder(self) -> Path:
        return BUILD / self.name

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.pt"


def some(rated: Rated, count: int, generator: torch.Generator) -> Rated:
    """A few of the pictures."""
    rows = torch.randperm(len(rated.images), generator=generator)[:count]
    return Rated(rated.kind, *(c[rows] for c in (rated.images, rated.ratings, rated.concepts, rated.styles)))


def _packed(rated: Rated) -> dict[str, object]:
    return {**vars(rated), "images": (255 * rated.images.detach()).round().clamp(0, 255).byte()}
