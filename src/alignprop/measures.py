"""What is measured of a sampler's pictures: rewards, how much they differ, and how far they are from the base's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from alignprop import distributed
from alignprop.rewards import Reward, check_scores, score
from alignprop.rollout import Sampler

_HALF_A_LEVEL = 0.5 / 255


@runtime_checkable
class PictureFeatures(Protocol):
    """A reward that embeds pictures, so that they can be compared by what they show."""

    def features(self, images: Tensor) -> Tensor:
        """Embed pictures (B, 3, H, W) in [0, 1]: vectors of length 1, shape (B, D)."""
        ...


@dataclass(frozen=True)
class Evaluated:
    """A set of prompts, sampled and scored.

    Attributes:
        prompts: the N prompts.
        images: (N, S, 3, H, W) in [0, 1], S pictures of each prompt; or videos, or waveforms, likewise.
        scores: (N, S) by the reward's name.
        features: (N, S, D) of unit length, where there is something to embed the pictures with.
    """

    prompts: Sequence[str]
    images: Tensor
    scores: Mapping[str, Tensor]
    features: Tensor | None = None

    def summary(self, weights: Mapping[str, float], base: Evaluated | None = None) -> dict[str, Any]:
        """The numbers of a line in ``evaluation.jsonl``.

        Args:
            weights: of the rewards that are trained; their weighted sum is the line's ``reward``.
            base: the same prompts and seeds, drawn by the base model.
        """
        trained = sum((weight * self.scores[name] for name, weight in weights.items()), torch.zeros(()))
        return {
            "num_prompts": self.images.shape[0],
            "num_images": self.images.shape[0] * self.images.shape[1],
            "reward": statistics(trained),
            "rewards": {name: statistics(values) for name, values in self.scores.items()},
            "diversity": diversity(self.images),
            **self._saturated(),
            **self._feature_diversity(),
            **(self._distances(base) if base is not None else {}),
        }

    def compact(self) -> Evaluated:
        """The same with pictures in half precision, to be kept for comparison."""
        return replace(self, images=self.images.half())

    def _saturated(self) -> dict[str, float]:
        return {"saturated": saturated(self.images)} if self.images.ndim > 4 else {}  # not of waveforms

    def _feature_diversity(self) -> dict[str, float]:
        return {} if self.features is None else {"feature_diversity": feature_diversity(self.features)}

    def _distances(self, base: Evaluated) -> dict[str, float]:
        found = {"distance": distance(self.images.to(base.images.dtype), base.images)}
        if self.features is not None and base.features is not None:
            found["feature_distance"] = feature_distance(self.features, base.features)
        return found


def diversity(images: Tensor) -> float:
    """Mean distance between two pictures of one prompt: the root mean square of their pixels' difference, in [0, 1].

    Args:
        images: (N, S, 3, H, W) in [0, 1]; 0 is returned for S = 1.
    """
    flat = images.flatten(2).double()
    return _mean_of_pairs(torch.cdist(flat, flat) / flat.shape[-1] ** 0.5)


def feature_diversity(features: Tensor) -> float:
    """Mean cosine distance between the features of two pictures of one prompt, in [0, 2].

    Args:
        features: (N, S, D) of unit length; 0 is returned for S = 1.
    """
    return _mean_of_pairs(_cosine_distance(features[:, :, None], features[:, None]))


def _mean_of_pairs(distances: Tensor) -> float:
    """Of (N, S, S) distances, without those of a picture to itself, which are 0."""
    num_prompts, num_seeds, _ = distances.shape
    pairs = num_prompts * num_seeds * (num_seeds - 1)
    return (distances.sum() / pairs).item() if pairs else 0.0


def distance(images: Tensor, base: Tensor) -> float:
    """Mean distance of pictures to those of the base model at the same seeds: root mean squares of pixels' differences.

    Args:
        images: (N, S, ...) in [0, 1].
        base: alike.
    """
    # One prompt after another, as double precision of all pictures would take many times their memory.
    pairs = zip(images, base, strict=True)
    by_prompt = [(after.double() - before.double()).flatten(1).square().mean(1).sqrt() for after, before in pairs]
    return torch.stack(by_prompt).mean().item()


def feature_distance(features: Tensor, base: Tensor) -> float:
    """Mean cosine distance of pictures' features to those of the base model's pictures, in [0, 2].

    Args:
        features: (N, S, D) of unit length.
        base: alike.
    """
    return _cosine_distance(features, base).mean().item()


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Of vectors of unit length: half the square of their difference, which is 0 for equal ones to the last bit."""
    return (a.double() - b.double()).square().sum(-1) / 2


def saturated(images: Tensor) -> float:
    """The share of the values of pictures in [0, 1] that a file of 8 bits would hold as 0 or 255."""
    return ((images < _HALF_A_LEVEL) | (images > 1 - _HALF_A_LEVEL)).double().mean().item()


def statistics(scores: Tensor) -> dict[str, float]:
    """Mean, deviation over single images, and standard error of the mean over prompts, of (N, S) scores."""
    by_prompt = scores.double().mean(1)
    sem = by_prompt.std() / len(by_prompt) ** 0.5 if len(by_prompt) > 1 else torch.zeros(())
    return {"mean": by_prompt.mean().item(), "std": scores.double().std(correction=0).item(), "sem": float(sem)}


@torch.no_grad()
def evaluate(
    sampler: Sampler,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    *,
    images_per_prompt: int = 4,
    batch_size: int = 16,
    seed: int = 0,
) -> Evaluated:
    """Sample every prompt at fixed seeds with the plain pipeline, and score the pictures.

    The work is shared among the processes, and every process gets all of the result. The pictures are embedded by the
    last of the rewards that embeds pictures: behind those that are trained, the ones that watch them.

    Args:
        sampler: the pipeline, in the state that is to be judged, and the arguments of its call.
        prompts: what to draw.
        rewards: by name.
        images_per_prompt: pictures of each prompt; their seeds depend on the prompt's place and on ``seed``.
        batch_size: pictures sampled at a time.
        seed: the same seed gives the same noise.

    Raises:
        ValueError: a reward's scores are not what they should be, on any of the processes.
    """
    jobs = [
        (prompt, distributed.derive_seed(seed, place, copy))
        for place, prompt in enumerate(prompts)
        for copy in range(images_per_prompt)
    ]
    process = distributed.process()
    share = -(-len(jobs) // process.num_processes)
    mine = jobs[process.process_index * share : (process.process_index + 1) * share]
    places = range(0, len(mine), batch_size)
    parts = distributed.together(lambda: [_drawn(sampler, mine[n : n + batch_size], rewards) for n in places])
    images, scores, features = (distributed.gather([part[column] for part in parts]) for column in range(3))
    shape = (len(prompts), images_per_prompt)
    return Evaluated(
        prompts=prompts,
        images=torch.cat(images).unflatten(0, shape),
        scores={name: torch.cat([part[name] for part in scores]).view(shape) for name in rewards},
        features=None if None in features else torch.cat(features).unflatten(0, shape),
    )


def _drawn(
    sampler: Sampler, jobs: Sequence[tuple[str, int]], rewards: Mapping[str, Reward]
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Pictures of prompts and seeds, their scores by reward, and their features."""
    prompts, seeds = map(list, zip(*jobs, strict=True))
    images = sampler.sample(prompts, seeds)
    scores = {name: _scored(name, reward, images, prompts) for name, reward in rewards.items()}
    embed = next((reward for reward in reversed(list(rewards.values())) if isinstance(reward, PictureFeatures)), None)
    features = embed.features(images).float().cpu() if embed is not None and images.ndim == 4 else None
    return images.cpu(), scores, features


def _scored(name: str, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    scores = score(reward, images, prompts)
    check_scores(scores, images, name, prompts)
    return scores.float().cpu()
