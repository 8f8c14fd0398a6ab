"""Mixtures along the line between two adapters, or over the triangle of three, each measured at the same seeds."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop.config import ConfigError
from alignprop.runfolder import is_taken, write_atomically

if TYPE_CHECKING:
    from alignprop.measures import Evaluated
    from alignprop.mixing.files import StoredAdapter
    from alignprop.rewards import Reward
    from alignprop.rollout import Sampler

_FORMAT = "alignprop-sweep-1"
NUM_PICTURES = 8
"""Pictures of a strip: of the first prompts, the first seed of each."""

Weights = tuple[float, ...]
"""Of the members, in order; what they lack of 1 is the base model's."""


def grid(num_corners: int, num_points: int, *, with_base: bool) -> list[Weights]:
    """Evenly spaced mixtures of adapters, the base model among the corners if asked for.

    Args:
        num_corners: what is mixed, 2 or 3, the base model counted.
        num_points: along a side, at least 2: so many in all on a line, n (n + 1) / 2 on a triangle.
        with_base: whether the last corner is the base model.

    Returns:
        Weights of the adapters alone, from the first one to the last corner.
    """
    last = num_points - 1
    shares: list[tuple[int, ...]] = [(last - k, k) for k in range(num_points)]
    if num_corners == 3:
        shares = [(last - row, row - k, k) for row in range(num_points) for k in range(row + 1)]
    points = [tuple(part / last for part in parts) for parts in shares]
    return [point[:-1] for point in points] if with_base else points


@dataclass(frozen=True)
class Declaration:
    """What a sweep measures, and how: points of different declarations cannot be compared.

    Attributes:
        members: the adapters' folders by name.
        digests: of their files.
        model: the base model.
        sampling: arguments of its call.
        prompts: what is drawn.
        images_per_prompt: pictures of each prompt.
        batch_size: pictures drawn at a time.
        seed: of the noise, the same at every point.
        rewards: what is measured, with its settings, by name.
        trained: which of them each member was trained on.
    """

    members: Mapping[str, str]
    digests: Mapping[str, str]
    model: str
    sampling: Mapping[str, Any]
    prompts: Sequence[str]
    images_per_prompt: int
    batch_size: int
    seed: int
    rewards: Mapping[str, Mapping[str, Any]]
    trained: Mapping[str, Sequence[str]]

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        found: dict[str, Any] = json.loads(json.dumps(vars(self)))
        return found


def digest_of(adapter: StoredAdapter) -> str:
    """A digest of an adapter's files, to notice that it was trained again."""
    digest = hashlib.sha256()
    for file in adapter.files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class SweepFile:
    """`sweep.json`: the declaration and the points that were measured so far.

    Attributes:
        folder: of the sweep.
        declaration: what is asked for.
        command: that was called last.
    """

    folder: Path
    declaration: Declaration
    command: str

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / "sweep.json"

    def points(self) -> dict[Weights, dict[str, Any]]:
        """What was measured, by weights.

        Raises:
            ConfigError: the folder holds another sweep, or something else.
        """
        if not self.path.is_file():
            if is_taken(self.folder):
                raise ConfigError([f"{self.folder} is not empty and no sweep: give another folder, --output DIR."])
            return {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError([f"{self.path} cannot be read: {error}."]) from error
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ConfigError([f"{self.path} is not of this library's format {_FORMAT!r}."])
        asked = self.declaration.document()
        changed = [key for key, value in asked.items() if data["declaration"].get(key) != value]
        if changed:
            differences = "; ".join(f"{key} was {_short(data['declaration'].get(key))}" for key in changed)
            raise ConfigError(
                [f"{self.folder} holds another sweep ({differences}): ask for the same, or give another --output DIR."]
            )
        return {tuple(point["weights"]): point for point in data["points"]}

    def write(self, points: Mapping[Weights, Mapping[str, Any]]) -> dict[str, Any]:
        """Write the points, and return the whole content."""
        from alignprop.report import versions

        document = {
            "format": _FORMAT,
            "command": self.command,
            "declaration": self.declaration.document(),
            "points": [points[weights] for weights in sorted(points, reverse=True)],
            "versions": versions(),
        }
        write_atomically(self.path, json.dumps(document, indent=1) + "\n")
        return document


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def sweep(
    file: SweepFile, asked: Sequence[Weights], sampler: Sampler, names: Sequence[str], rewards: Mapping[str, Reward]
) -> Iterator[tuple[Weights, dict[str, Any], bool]]:
    """Measure the points that are not in the file yet, each written as soon as it is there.

    Args:
        file: of the sweep.
        asked: weights of the members.
        sampler: its pipeline holds the members side by side.
        names: of the members in the pipeline.
        rewards: by name.

    Yields:
        A point's weights, what was measured there, and whether that was done before.
    """
    from alignprop.mixing.schedule import weigh
    from alignprop.spec import spec_of

    points = file.points()
    for weights in asked:
        before = weights in points
        if not before:
            began = time.perf_counter()
            weigh(sampler.pipeline, names, weights, sampler.spec or spec_of(sampler.pipeline))
            result = measured(sampler, file.declaration, rewards)
            summary = result.summary(dict.fromkeys(rewards, 1.0))
            del summary["reward"]  # a sum of rewards, which nobody asked for
            _draw(result, picture_of(file.folder, weights))
            seconds = time.perf_counter() - began
            points[weights] = {"weights": list(weights), "seconds": seconds, "measured": summary}
            file.write(points)
        yield weights, points[weights], before


def measured(sampler: Sampler, declaration: Declaration, rewards: Mapping[str, Reward]) -> Evaluated:
    """Draw and score the declared prompts with the pipeline as it is."""
    from alignprop.measures import evaluate

    return evaluate(
        sampler,
        declaration.prompts,
        rewards,
        images_per_prompt=declaration.images_per_prompt,
        batch_size=declaration.batch_size,
        seed=declaration.seed,
    )


def picture_of(folder: Path, weights: Weights) -> Path:
    """Where the strip of a point is."""
    return folder / "pictures" / f"{'_'.join(f'{weight:.4g}' for weight in weights)}.png"


def _draw(result: Evaluated, path: Path) -> None:
    """Write the first picture of the first prompts, or the middle frame of a video; nothing for sound."""
    from alignprop.pictures import save_grid
    from alignprop.pixels import to_pil
    from alignprop.rewards import stills

    shown = stills(result.images[:NUM_PICTURES, 0])
    if shown is not None:
        save_grid([[picture] for picture in to_pil(shown)], result.prompts[:NUM_PICTURES], path)
