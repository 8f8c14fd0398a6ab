"""Pictures that take long to make, for the stage `gold`: drawn by the model, smeared, and made by attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import collapse
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
from weak import WeakAesthetic

from alignprop.rollout import Sampler

ATTACK_RATE = 1.2e-2
"""Learning rate of the models that are tuned until they collapse."""

LOST_SIMILARITY, WHOLE_SIMILARITY = 0.86, 0.945
"""To the nearest drawing of the thing, where nothing is left of a picture and where nothing is lost."""

POOL = BUILD / "gold-pool"


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


def attacks(base: Rated, generator: torch.Generator) -> Iterator[Rated]:
    """What an optimiser makes of the latents and of the model.

    It climbs the weak reward, and with the model also a random direction of the features.
    """
    weak, resemblance = WeakAesthetic(), Resemblance()
    for clean in (base, next(ratings.real())):
        rows = torch.randperm(len(clean.images), generator=generator)[:32]
        columns = (clean.images, clean.ratings, clean.concepts, clean.styles)
        few = Rated(clean.kind, *(column[rows] for column in columns))
        yield from collapse.optimised_latents(latest_pipeline(), weak.clip, weak.rate, few)
    direction = torch.randn(len(weak.weight), generator=generator) / 6
    for number, reward in enumerate((weak.rate, direction.inner)):
        for images, concepts in collapse.tuned_pictures(latest_pipeline(), weak.clip, reward, ATTACK_RATE, 50 + number):
            yield resemblance.rated(images, concepts)


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


def make_pool(seed: int) -> None:
    """Write the pictures that take long to make to `build/gold-pool/`, a file a source, unless they are there."""
    POOL.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    clean = list(ratings.real())[::2]  # unmoved

    def base() -> Rated:
        return read_pool("generated-0")[0]

    sources: dict[str, Callable[[], Iterator[Rated]]] = {
        "generated-0": lambda: iter([generated(latest_pipeline(), 20, 0.0, 10_000)]),
        "generated-1": lambda: iter([generated(latest_pipeline(), 5, 0.0, 11_000)]),
        "generated-2": lambda: iter([generated(latest_pipeline(), 5, 1.0, 12_000)]),
        "between": lambda: iter([ratings.between(generator)]),
        "smeared": lambda: (part for rated in (*clean, base()) for part in smeared(rated, 600, generator)),
        "attacks": lambda: attacks(base(), generator),
    }
    for name, source in sources.items():
        path = POOL / f"{name}.pt"
        if path.exists():
            continue
        generator.manual_seed(seed + len(name))
        rows = [_packed(rated) for rated in source() if len(rated.images)]
        torch.save(rows, path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
        print(f"{name}: {sum(len(row['images']) for row in rows)} pictures", flush=True)


def _packed(rated: Rated) -> dict[str, object]:
    return {**vars(rated), "images": (255 * rated.images.detach()).round().clamp(0, 255).byte()}


def read_pool(name: str) -> list[Rated]:
    """The pictures of one source, by kind."""
    rows = torch.load(POOL / f"{name}.pt")
    return [Rated(**{**row, "images": row["images"].float() / 255, "ratings": row["ratings"].detach()}) for row in rows]
