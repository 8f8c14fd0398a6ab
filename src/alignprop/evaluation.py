"""Evaluation on training and unseen prompts at fixed seeds, with rewards that are not trained, and the best adapter."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from alignprop import distributed
from alignprop.guard import Guard
from alignprop.measures import Evaluated, evaluate, statistics
from alignprop.pictures import save_grid
from alignprop.pixels import to_pil
from alignprop.rewards import Reward, WeightedSum, stills
from alignprop.runfolder import RunFolder, measured_alike
from alignprop.trainer import Callback, Metrics, Trainer


def optimised(objective: WeightedSum, scores: Mapping[str, Tensor], first: Mapping[str, Any]) -> Tensor:
    """What is optimised, in a unit that stays the same: running statistics would move between two evaluations.

    Args:
        objective: a weighted sum with rewards that are clamped or normalised.
        scores: of the rewards by name, all of one shape.
        first: statistics of the first evaluation by name, whose deviations take the place of the running ones.
    """
    units = {name: first[name]["std"] or 1.0 for name in objective.normalised}
    return objective.add_up({name: part / units.get(name, 1.0) for name, part in objective.clamp(scores).items()})


def summaries(
    results: Mapping[str, Evaluated],
    base: Mapping[str, Evaluated],
    objective: WeightedSum,
    first: Mapping[str, Any] | None,
) -> dict[str, dict[str, Any]]:
    """What a line of ``evaluation.jsonl`` says of each set of prompts.

    Args:
        results: by set.
        base: the same prompts and seeds, drawn by the base model.
        objective: what is optimised.
        first: this of the first evaluation; None if these are its results.
    """
    sets = {name: result.summary(objective.weights, base[name]) for name, result in results.items()}
    if objective.is_shaped:
        for name, result in results.items():
            units = (first or sets).get(name, sets[name])["rewards"]
            sets[name]["objective"] = statistics(optimised(objective, result.scores, units))
    return sets


def draw(result: Evaluated, path: Path) -> None:
    """Write the grid of an evaluation, of the middle frames of videos and of nothing for sound."""
    columns = [stills(samples) for samples in result.images]
    pictures = [to_pil(column) for column in columns if column is not None]
    if pictures:
        save_grid(pictures, result.prompts, path)


@dataclass
class Evaluation(Callback):
    """Evaluates at intervals, draws grids, and keeps the best adapter by the guard's criterion on unseen prompts.

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
        guard: says which adapter is the best, what to warn of, and when to stop.
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
    guard: Guard = field(default_factory=Guard)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def start(self, trainer: Trainer) -> None:
        """Evaluate the base model, or pick up where a resumed run was."""
        if distributed.process().is_main_process:
            self.folder.evaluations.rewind(trainer.step if trainer.step else -1)
        distributed.process().wait_for_everyone()
        lines = self.folder.evaluations.read() if trainer.step else []
        self._base: dict[str, Evaluated] | None = None
        self._lines = list(measured_alike(lines))
        if lines and not self._measures_alike(lines[-1], trainer.objective):
            self._lines = [self._base_anew(trainer)]
        self._best = max((self._value(line) for line in self._lines if line["kept"]), default=float("-inf"))
        self._evaluated = lines[-1]["step"] if lines else -1
        if trainer.best is not None and distributed.process().is_main_process:
            self._save(
                trainer, trainer.best, max((line["step"] for line in lines if line["kept"]), default=trainer.step)
            )
        if self._lines and (reason := self.guard.verdict(self._lines)):
            trainer.stop(reason)
        self._interval = self._intervals_passed(trainer)
        if not lines:
            self._evaluate(trainer)

    def _measures_alike(self, line: Mapping[str, Any], objective: WeightedSum) -> bool:
        """Whether an evaluation measured what this one does, as far as can be known."""
        kinds = {name: (len(prompts), len(prompts) * self.images_per_prompt) for name, prompts in self.prompts.items()}
        found = {name: (values["num_prompts"], values["num_images"]) for name, values in line["sets"].items()}
        names = {name for values in line["sets"].values() for name in values["rewards"]}
        terms = line.get("terms", objective.terms if line["trained"] == list(objective.weights) else None)
        return kinds == found and names == {*objective.weights, *self.judges} and terms == objective.terms

    def _base_anew(self, trainer: Trainer) -> dict[str, Any]:
        """The base model's evaluation in a run that is resumed with other rewards, judges or prompts than before."""
        began = time.perf_counter()
        with trainer.adapter.disabled():
            results = self._measure(trainer)
        self._base = {name: result.compact() for name, result in results.items()}
        counts = dict.fromkeys(("images_scored", "denoiser_calls", "train_seconds"), 0)
        line = {
            "step": 0,
            "base": True,
            **counts,
            **self._measured(results, self._base, trainer.objective, None),
            "kept": False,  # what was kept before this was measured is not comparable
            "stopped": None,
            "seconds": time.perf_counter() - began,
        }
        line |= self.guard.told(line, line)
        if distributed.process().is_main_process:
            for name, result in results.items():
                draw(result, self.folder.samples(0) / f"{name}.png")
            self.folder.evaluations.append(line)
        return line

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
        with trainer.adapter.weights(trainer.evaluated_weights()):
            results = self._measure(trainer)
        line: dict[str, Any] = {
            "step": trainer.step,
            "images_scored": trainer.images_scored,
            "denoiser_calls": trainer.denoiser_calls,
            "train_seconds": trainer.train_seconds,
            **self._measured(
                results,
                self._base_results(trainer, results),
                trainer.objective,
                self._lines[0]["sets"] if self._lines else None,
            ),
        }
        self._judge(line)
        if line["kept"]:
            trainer.best = {name: value.detach().clone() for name, value in trainer.evaluated_weights().items()}
        if distributed.process().is_main_process:
            for name, result in results.items():
                draw(result, self.folder.samples(trainer.step) / f"{name}.png")
            if line["kept"]:
                self._save(trainer, trainer.evaluated_weights(), trainer.step)
            self.folder.evaluations.append({**line, "seconds": time.perf_counter() - began})
        self._evaluated = trainer.step
        if line["stopped"]:
            trainer.stop(line["stopped"])
        distributed.process().wait_for_everyone()

    @staticmethod
    def _measured(
        results: Mapping[str, Evaluated],
        base: Mapping[str, Evaluated],
        objective: WeightedSum,
        first: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """What was optimised, and the measures by set of prompts."""
        names = {"trained": list(objective.weights), "terms": objective.terms}
        return {**names, "sets": summaries(results, base, objective, first)}

    def _measure(self, trainer: Trainer) -> dict[str, Evaluated]:
        rewards = {**trainer.objective.rewards, **self.judges}
        return {
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

    def _base_results(self, trainer: Trainer, results: Mapping[str, Evaluated]) -> dict[str, Evaluated]:
        """What the base model draws at the same seeds: the first evaluation, drawn again in a run that is resumed."""
        if self._base is None:
            if trainer.step:
                with trainer.adapter.disabled():
                    results = self._measure(trainer)
            self._base = {name: result.compact() for name, result in results.items()}
        return self._base

    def _judge(self, line: dict[str, Any]) -> None:
        """Add to an evaluation whether its adapter is the best so far, what the guard warns of, and whether to stop."""
        self._lines.append(line)
        value = self._value(line)
        line["kept"] = value > self._best  # the first always is: where no later one is worth more, it remains
        self._best = max(self._best, value)
        line |= self.guard.told(self._lines[0], line)
        line["stopped"] = self.guard.verdict(self._lines)

    def _value(self, line: Mapping[str, Any]) -> float:
        return self.guard.value(self._lines[0], line)

    def _save(self, trainer: Trainer, values: Mapping[str, Tensor], step: int) -> None:
        with trainer.adapter.weights(values, as_reloaded=False):
            trainer.adapter.save(self.folder.adapter, {**self.metadata, "step": step})
