"""Evaluation on training and unseen prompts at fixed seeds, with rewards that are not trained, and the best adapter."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop import distributed
from alignprop.pictures import save_grid
from alignprop.pixels import to_pil
from alignprop.rewards import Reward, WeightedSum, check_scores, score, stills
from alignprop.rollout import Sampler
from alignprop.runfolder import RunFolder
from alignprop.trainer import Callback, Metrics, Trainer

SELECTED_BY = "unseen"
"""The set of prompts on which the best adapter is chosen, where there is one."""


@dataclass(frozen=True)
class Evaluated:
    """A set of prompts, sampled and scored.

    Attributes:
        prompts: the N prompts.
        images: (N, S, 3, H, W) in [0, 1], S pictures of each prompt; or videos, or waveforms, likewise.
        scores: (N, S) by the reward's name.
    """

    prompts: Sequence[str]
    images: Tensor
    scores: Mapping[str, Tensor]

    def summary(self, weights: Mapping[str, float]) -> dict[str, Any]:
        """The numbers of a line in ``evaluation.jsonl``.

        Args:
            weights: of the rewards that are trained; their weighted sum is the line's ``reward``.
        """
        trained = sum((weight * self.scores[name] for name, weight in weights.items()), torch.zeros(()))
        return {
            "num_prompts": self.images.shape[0],
            "num_images": self.images.shape[0] * self.images.shape[1],
            "reward": _statistics(trained),
            "rewards": {name: _statistics(values) for name, values in self.scores.items()},
            "diversity": diversity(self.images),
        }


def diversity(images: Tensor) -> float:
    """Mean distance between two pictures of one prompt: the root mean square of their pixels' difference, in [0, 1].

    Args:
        images: (N, S, 3, H, W) in [0, 1]; 0 is returned for S = 1.
    """
    flat = images.flatten(2).double()
    distances = torch.cdist(flat, flat) / flat.shape[-1] ** 0.5
    num_seeds = images.shape[1]
    pairs = num_seeds * (num_seeds - 1) * images.shape[0]
    return (distances.sum() / pairs).item() if pairs else 0.0


def _statistics(scores: Tensor) -> dict[str, float]:
    """Mean, deviation over single images, and standard error of the mean over prompts."""
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

    The work is shared among the processes, and every process gets all of the result.

    Args:
        sampler: the pipeline, in the state that is to be judged, and the arguments of its call.
        prompts: what to draw.
        rewards: by name.
        images_per_prompt: pictures of each prompt; their seeds depend on the prompt's place and on ``seed``.
        batch_size: pictures sampled at a time.
        seed: the same seed gives the same noise.
    """
    jobs = [
        (prompt, distributed.derive_seed(seed, place, copy))
        for place, prompt in enumerate(prompts)
        for copy in range(images_per_prompt)
    ]
    process = distributed.process()
    share = -(-len(jobs) // process.num_processes)
    mine = jobs[process.process_index * share : (process.process_index + 1) * share]
    images, scores = [], []
    for first in range(0, len(mine), batch_size):
        some_prompts, some_seeds = map(list, zip(*mine[first : first + batch_size], strict=True))
        pictures = sampler.sample(some_prompts, some_seeds)
        images.append(pictures.cpu())
        scores.append({name: _scored(name, reward, pictures, some_prompts) for name, reward in rewards.items()})
    images, scores = distributed.gather(images), distributed.gather(scores)
    shape = (len(prompts), images_per_prompt)
    return Evaluated(
        prompts=prompts,
        images=torch.cat(images).unflatten(0, shape),
        scores={name: torch.cat([part[name] for part in scores]).view(shape) for name in rewards},
    )


def optimised(objective: WeightedSum, scores: Mapping[str, Tensor], first: Mapping[str, Any]) -> Tensor:
    """What is optimised, in a unit that stays the same: running statistics would move between two evaluations.

    Args:
        objective: a weighted sum with rewards that are clamped or normalised.
        scores: of the rewards by name, all of one shape.
        first: statistics of the first evaluation by name, whose deviations take the place of the running ones.
    """
    units = {name: first[name]["std"] or 1.0 for name in objective.normalised}
    return objective.add_up({name: part / units.get(name, 1.0) for name, part in objective.clamp(scores).items()})


def _is_of(line: Mapping[str, Any], objective: WeightedSum) -> bool:
    """Whether an evaluation measured the same objective, as far as can be known."""
    measured = next(iter(line["sets"].values()))
    return line["trained"] == list(objective.weights) and ("objective" in measured) == objective.is_shaped


def _scored(name: str, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    scores = score(reward, images, prompts)
    check_scores(scores, images, name, prompts)
    return scores.float().cpu()


def _draw(result: Evaluated, path: Path) -> None:
    """Write the grid of an evaluation, of the middle frames of videos and of nothing for sound."""
    columns = [stills(samples) for samples in result.images]
    pictures = [to_pil(column) for column in columns if column is not None]
    if pictures:
        save_grid(pictures, result.prompts, path)


@dataclass
class Evaluation(Callback):
    """Evaluates at intervals, draws grids, and keeps the adapter with the best trained reward on unseen prompts.

    Attributes:
        folder: of the run.
        prompts: sets of prompts by name, ``train`` and ``unseen``.
        judges: rewards that are not trained, by name.
        every: steps between evaluations; there is always one before the first step and one at the end.
        every_images: evaluate whenever so many more images have been scored, and not by steps.
        every_seconds: evaluate whenever the steps have taken so much longer, and not by steps.
        images_per_prompt: pictures of each prompt.
        batch_size: pictures sampled at a time.
        seed: of the noise, the same at every evaluation.
        metadata: facts for the header of the adapter's file.
    """

    folder: RunFolder
    prompts: Mapping[str, Sequence[str]]
    judges: Mapping[str, Reward] = field(default_factory=dict)
    every: int = 25
    every_images: int | None = None
    every_seconds: float | None = None
    images_per_prompt: int = 4
    batch_size: int = 16
    seed: int = 1234
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def start(self, trainer: Trainer) -> None:
        """Evaluate the base model, or pick up where a resumed run was."""
        if distributed.process().is_main_process:
            self.folder.evaluations.rewind(trainer.step if trainer.step else -1)
        distributed.process().wait_for_everyone()
        lines = self.folder.evaluations.read() if trainer.step else []
        comparable = [line for line in lines if _is_of(line, trainer.objective)]
        self._first = comparable[0]["sets"] if comparable else None
        self._best = max((self._criterion(line) for line in comparable if line["kept"]), default=float("-inf"))
        self._evaluated = lines[-1]["step"] if lines else -1
        if trainer.best is not None and distributed.process().is_main_process:
            self._save(
                trainer, trainer.best, max((line["step"] for line in lines if line["kept"]), default=trainer.step)
            )
        self._interval = self._intervals_passed(trainer)
        if not lines:
            self._evaluate(trainer)

    def step(self, trainer: Trainer, metrics: Metrics) -> None:
        """Evaluate when it is time."""
        before, self._interval = self._interval, self._intervals_passed(trainer)
        if self._interval > before:
            self._evaluate(trainer)

    def _intervals_passed(self, trainer: Trainer) -> int:
        if self.every_images is not None:
            return trainer.images_scored // self.every_images
        if self.every_seconds is not None:
            return int(trainer.train_seconds // self.every_seconds)
        return trainer.step // self.every

    def end(self, trainer: Trainer) -> None:
        """Evaluate the last state of a finished run."""
        if trainer.finished and self._evaluated != trainer.step:
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        began = time.perf_counter()
        rewards = {**trainer.objective.rewards, **self.judges}
        with trainer.adapter.weights(trainer.evaluated_weights()):
            results = {
                name: evaluate(
                    trainer.sampler,
                    prompts,
                    rewards,
                    images_per_prompt=self.images_per_prompt,
                    batch_size=self.batch_size,
                    seed=self.seed,
                )
                for name, prompts in self.prompts.items()
            }
        line = {
            "step": trainer.step,
            "images_scored": trainer.images_scored,
            "denoiser_calls": trainer.denoiser_calls,
            "train_seconds": trainer.train_seconds,
            "trained": list(trainer.objective.weights),
            "sets": self._summaries(results, trainer.objective),
        }
        line["kept"] = self._criterion(line) > self._best
        self._best = max(self._best, self._criterion(line))
        self._evaluated = trainer.step
        if line["kept"]:
            trainer.best = {name: value.detach().clone() for name, value in trainer.evaluated_weights().items()}
        if distributed.process().is_main_process:
            for name, result in results.items():
                _draw(result, self.folder.samples(trainer.step) / f"{name}.png")
            if line["kept"]:
                self._save(trainer, trainer.evaluated_weights(), trainer.step)
            self.folder.evaluations.append({**line, "seconds": time.perf_counter() - began})
        distributed.process().wait_for_everyone()

    def _summaries(self, results: Mapping[str, Evaluated], objective: WeightedSum) -> dict[str, dict[str, Any]]:
        sets = {name: result.summary(objective.weights) for name, result in results.items()}
        self._first = self._first or sets
        if objective.is_shaped:
            for name, result in results.items():
                first = self._first.get(name, sets[name])["rewards"]
                sets[name]["objective"] = _statistics(optimised(objective, result.scores, first))
        return sets

    def _save(self, trainer: Trainer, values: Mapping[str, Tensor], step: int) -> None:
        with trainer.adapter.weights(values, as_reloaded=False):
            trainer.adapter.save(self.folder.adapter, {**self.metadata, "step": step})

    def _criterion(self, line: Mapping[str, Any]) -> float:
        chosen = line["sets"].get(SELECTED_BY) or next(iter(line["sets"].values()))
        return float(chosen.get("objective", chosen["reward"])["mean"])
