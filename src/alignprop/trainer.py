"""The training loop."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from alignprop import distributed
from alignprop.adapters import Full, Lora, Trainable
from alignprop.estimators import AlignProp, Descent, Estimate, Estimator, MicroBatch, OneBackward, Step
from alignprop.memory import peak_resident_bytes
from alignprop.optimisation import Optimisation, Optimizer
from alignprop.prompts import batch as prompt_batch
from alignprop.regularisation import Regularisation, Regulariser
from alignprop.rewards import Reward, as_weighted_sum, check_scores
from alignprop.rollout import Sampler
from alignprop.spec import PipelineSpec
from alignprop.surgery import Surgery, refusals

Metrics = dict[str, Any]
Result = TypeVar("Result")
_PROMPTS, _NOISE, _ESTIMATOR, _DROPOUT, _VIEWS, _SURGERY = range(6)  # streams of random numbers that come from one seed


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message names the step, the cause and the prompts."""


class Callback(Protocol):
    """Something that watches a training: evaluation, checkpoints, trackers. What is not overridden does nothing."""

    def start(self, trainer: "Trainer") -> None:
        """Before the first step, or the first after resuming."""
        return None

    def step(self, trainer: "Trainer", metrics: Metrics) -> None:
        """After each optimizer step."""
        return None

    def end(self, trainer: "Trainer") -> None:
        """After the last step, or when the run was interrupted between two steps."""
        return None


@dataclass
class Trainer:
    """Aligns a pipeline with a reward.

    All that is random in step n is drawn from ``seed`` and n, so that a resumed run needs no generator state, and two
    processes see the prompts and noise that one process with twice the batch would.

    Attributes:
        pipeline: a diffusers pipeline; an adapter is added to it and trained.
        reward: a callable ``(images, prompts) -> scores``, or a weighted sum of several.
        prompts: the training prompts.
        call: keyword arguments of the pipeline's call.
        steps: optimizer steps of the whole run, or the most of them where there is a budget.
        batch_size: images of a micro-batch on each process.
        accumulation: micro-batches of a step.
        images_per_prompt: pictures of each prompt in succession: several give an estimator that learns from
            advantages something to compare a picture with.
        seed: of everything random.
        spec: the pipeline's parts, where they cannot be known.
        lora: the adapter's settings, or that all of the denoiser is trained.
        optimizer: the optimizer's settings.
        estimator: turns rollouts into gradients.
        regularisation: what is taken off the reward, and what bounds its gradient.
        combination: how the gradients of several rewards become one: ``sum``, or a rule of
            :data:`alignprop.surgery.RULES`.
        max_images: the run ends once so many images have been scored; None for no bound.
        max_seconds: the run ends once its steps have taken so long, evaluations apart; None for no bound.
        callbacks: called in their order.
    """

    pipeline: Any
    reward: Reward
    prompts: Sequence[str]
    call: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 100
    batch_size: int = 4
    accumulation: int = 1
    images_per_prompt: int = 1
    seed: int = 0
    lora: Lora | Full = field(default_factory=Lora)
    optimizer: Optimizer = field(default_factory=Optimizer)
    estimator: Estimator = field(default_factory=AlignProp)
    regularisation: Regularisation = field(default_factory=Regularisation)
    combination: str = "sum"
    max_images: int | None = None
    max_seconds: float | None = None
    callbacks: Sequence[Callback] = ()
    spec: PipelineSpec | None = None

    def __post_init__(self) -> None:
        """Add the adapter and set up the optimizer.

        Raises:
            ValueError: a regulariser or the combination could have no effect.
        """
        self.objective = as_weighted_sum(self.reward)
        self._refuse_settings_without_effect()
        self.step, self.images_drawn, self.images_scored, self.denoiser_calls = 0, 0, 0, 0
        self.train_seconds = 0.0
        self.stopped: str | None = None  # why a callback has ended the run before its last step
        self.best: dict[str, Tensor] | None = None  # what an evaluation found best, kept for a run that is resumed
        self.sampler = Sampler(self.pipeline, self.call, self.spec)
        self.adapter: Trainable = self.lora.attach(self.pipeline, spec=self.spec, seed=self.seed)
        self.parameters = self.adapter.parameters
        half = self.adapter.base_dtype == torch.float16  # whose small gradients would be rounded to zero
        self.optimisation = Optimisation(self.optimizer, list(self.parameters.values()), self.steps, half=half)
        self.adamw, self.ema, self.scaler = self.optimisation.adamw, self.optimisation.ema, self.optimisation.scaler

    def _refuse_settings_without_effect(self) -> None:
        name, estimator = type(self.estimator).__name__, self.estimator
        problems = list(refusals(self.combination, list(self.objective.weights), name, estimator.needs_gradient))
        if self.regularisation.active:
            full = isinstance(self.lora, Full)
            problems += self.regularisation.refusals(name, estimator.regularisers, full=full)
        if problems:
            raise ValueError(" ".join(problems))

    def train(self) -> None:
        """Run to the last step; Ctrl-C ends the run after the step that it falls into, with KeyboardInterrupt."""
        for callback in self.callbacks:
            callback.start(self)
        distributed.check_identical(list(self.parameters.values()))
        with _interrupt_between_steps() as interrupted:
            while not any(distributed.gather([interrupted() or self.finished])):
                metrics = self.train_step()
                for callback in self.callbacks:
                    callback.step(self, metrics)
            for callback in self.callbacks:
                callback.end(self)
            if any(distributed.gather([interrupted()])):  # also in the last step, for who trains several runs
                raise KeyboardInterrupt

    def stop(self, reason: str) -> None:
        """End the run before its last step, on every process alike."""
        self.stopped = reason

    @property
    def finished(self) -> bool:
        """Whether the steps are done, the budget is spent, or a callback has ended the run."""
        return (
            self.stopped is not None
            or self.step >= self.steps
            or (self.max_images is not None and self.images_scored >= self.max_images)
            or (self.max_seconds is not None and self.train_seconds >= self.max_seconds)
        )

    def train_step(self) -> Metrics:
        """One optimizer step: rollouts, rewards, gradients, all-reduce, clipping, update."""
        began = time.perf_counter()
        if self.objective.needs_statistics:  # those of the step's own pictures, so that it is normalised as well
            self.objective.observe(_gathered(self._each_micro_batch(self._score)))
        self.adamw.zero_grad()  # what a step that failed has left
        descend, stream = self.descent(), distributed.derive_seed(self.seed, _SURGERY, self.step)
        for estimates in self._updates(descend):
            facts = descend.complete(list(self.parameters.values()), torch.Generator().manual_seed(stream))
            grad_norm = self._update()
            self._count(estimates)
        self.images_drawn += self.images_a_step
        self.step += 1
        # JSON has no infinity: a step that fp16 overflow made the scaler skip has no norm.
        norm = grad_norm if math.isfinite(grad_norm) else None
        metrics = {**self._summary(estimates), **facts, "grad_norm": norm}
        seconds = distributed.gather([time.perf_counter() - began])[0]
        self.train_seconds += seconds
        return {**metrics, "seconds": seconds}

    def _count(self, estimates: Sequence[Estimate]) -> None:
        num_processes = distributed.process().num_processes
        self.images_scored += num_processes * sum(estimate.num_scored for estimate in estimates)
        self.denoiser_calls += num_processes * sum(estimate.calls * len(estimate.scores) for estimate in estimates)

    def descent(self) -> Descent:
        """What backpropagates the rewards of one optimizer step."""
        if self.combination == "sum":
            return OneBackward()
        return Surgery(self.combination, list(self.objective.weights), list(self.parameters.values()))

    def _updates(self, descend: Descent) -> Iterator[Sequence[Estimate]]:
        """The gradients of the present step, once for each update; the caller has ``descend`` complete each of them."""
        step = Step(
            self.sampler,
            self.objective,
            each=lambda work: self._each_micro_batch(lambda index: self._on_batch(work, index, descend)),
            num_batches=self.accumulation,
            weight=lambda: self._loss_scale() / self.images_a_step,
            regularise=self.regularise,
        )
        self.adapter.train()
        try:
            yield from self.estimator.updates(step)
        finally:
            self.adapter.eval()

    @property
    def regularise(self) -> Callable[[float], Regulariser] | None:
        """From the weight of a picture's loss to what regularises a micro-batch; None for nothing."""
        return partial(Regulariser, self.regularisation, self.adapter.disabled) if self.regularisation.active else None

    def _each_micro_batch(self, work: Callable[[int], Result]) -> list[Result]:
        try:
            return distributed.together(lambda: [work(micro_batch) for micro_batch in range(self.accumulation)])
        except ValueError as error:
            raise TrainingStopped(f"step {self.step + 1}: {error}") from error

    def _score(self, micro_batch: int) -> dict[str, Tensor]:
        """The rewards of a micro-batch of the present step, by name, without a gradient."""
        prompts, seeds = self.batch(micro_batch)
        with torch.no_grad(), self.objective.views_of(_view_seeds(seeds)):
            pictures = self.sampler.sample(prompts, seeds)
            components = self.objective.components(pictures, prompts)
        for name, values in components.items():
            check_scores(values, pictures, name, prompts)
        return components

    def _on_batch(self, work: Callable[[MicroBatch], Result], index: int, descend: Descent) -> Result:
        """Do an estimator's work on a micro-batch, with all that is random set by the step and its place."""
        prompts, seeds = self.batch(index)
        stream = distributed.derive_seed(self.seed, _ESTIMATOR, self.step, index)
        with torch.random.fork_rng(), self.objective.views_of(_view_seeds(seeds)):
            torch.manual_seed(distributed.derive_seed(stream, _DROPOUT, distributed.process().process_index))
            return work(MicroBatch(index, prompts, seeds, torch.Generator().manual_seed(stream), descend))

    def _loss_scale(self) -> float:
        return self.optimisation.loss_scale

    @property
    def images_a_step(self) -> int:
        """Images of an optimizer step over all processes."""
        num_processes: int = distributed.process().num_processes
        return self.batch_size * self.accumulation * num_processes

    def batch(self, micro_batch: int) -> tuple[list[str], list[int]]:
        """This process's prompts and noise seeds of a micro-batch of the present step."""
        process = distributed.process()
        first = self.images_drawn + (micro_batch * process.num_processes + process.process_index) * self.batch_size
        seeds = [distributed.derive_seed(self.seed, _NOISE, first + i) for i in range(self.batch_size)]
        stream = distributed.derive_seed(self.seed, _PROMPTS)
        return prompt_batch(self.prompts, stream, first, self.batch_size, self.images_per_prompt), seeds

    def _update(self) -> float:
        """Clip and step; returns the gradient's norm before clipping."""
        norm = self.optimisation.clip()
        # In fp16 an overflow is part of the scaler's search, which skips the step, until the scale is down to one.
        if not math.isfinite(norm) and self._loss_scale() <= 1:
            prompts = [prompt for micro_batch in range(self.accumulation) for prompt in self.batch(micro_batch)[0]]
            raise TrainingStopped(
                f"step {self.step + 1}: the gradient of {' + '.join(self.objective.weights)} is not finite; "
                f"prompts: {sorted(set(prompts))}."
            )
        self.optimisation.update(self.step, norm)
        return norm

    def _summary(self, estimates: Sequence[Estimate]) -> Metrics:
        parts = _gathered([estimate.components for estimate in estimates])
        scores = self.objective.add_up(parts)
        optimised = self._optimised(parts)
        self.objective.observe(parts)
        return {
            "step": self.step,
            "reward": scores.mean().item(),
            "reward_std": scores.std(correction=0).item(),
            "rewards": {name: values.mean().item() for name, values in parts.items()},
            **optimised,
            "lr": self.adamw.param_groups[0]["lr"],
            **_mean_facts(estimates),
            "images_scored": self.images_scored,
            "denoiser_calls": self.denoiser_calls,
            "peak_memory_mb": peak_resident_bytes(estimates[0].scores.device) / 2**20,
        }

    def _optimised(self, parts: Mapping[str, Tensor]) -> Metrics:
        """The mean of what is optimised, where scores are clamped or normalised, and the share above each target."""
        if not self.objective.is_shaped:
            return {}
        shares = {name: clamped.share(parts[name]) for name, clamped in self.objective.clamped.items()}
        return {"objective": self.objective.combine(parts).mean().item(), **({"clamped": shares} if shares else {})}

    def evaluated_weights(self) -> dict[str, Tensor]:
        """What is evaluated and saved: the average if there is one, else the present weights."""
        return dict(zip(self.parameters, self.optimisation.averages, strict=True))

    def state(self) -> dict[str, Any]:
        """Everything that resuming needs: numbers and tensors in nested dictionaries."""
        return {
            "step": self.step,
            "images_drawn": self.images_drawn,
            "images_scored": self.images_scored,
            "denoiser_calls": self.denoiser_calls,
            "train_seconds": self.train_seconds,
            "estimator": self.estimator.state(),
            "adapter": {name: parameter.detach() for name, parameter in self.parameters.items()},
            **self.optimisation.state(),
            "best": self.best,
            "rewards": self.objective.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.step, self.images_scored = state["step"], state["images_scored"]
        # Checkpoints of the first versions knew one estimator, which scored each picture once.
        self.images_drawn = state.get("images_drawn", self.images_scored)
        self.denoiser_calls = state.get("denoiser_calls", 0)
        self.train_seconds = state.get("train_seconds", 0.0)
        self.estimator.load_state(state.get("estimator", {}))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["adapter"][name])
        self.optimisation.load_state(state)
        self.best = state["best"]
        self.objective.load_state(state.get("rewards", {}))  # which checkpoints of the first versions have not


def _view_seeds(seeds: Sequence[int]) -> list[int]:
    """Seeds of what is drawn for a picture beside its noise, given those of the noise."""
    return [distributed.derive_seed(seed, _VIEWS) for seed in seeds]


def _mean_facts(estimates: Sequence[Estimate]) -> dict[str, float]:
    """The live steps and what else micro-batches tell, in the mean over those of all processes."""
    told = distributed.gather([{"live_steps": estimate.live_steps, **estimate.facts} for estimate in estimates])
    return {name: sum(facts[name] for facts in told) / len(told) for name in told[0]}


def _gathered(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The scores of micro-batches by reward, of all processes, the same on each of them."""
    return {
        name: torch.cat(distributed.gather([torch.cat([part[name] for part in parts]).float().cpu()]))
        for name in parts[0]
    }


@contextmanager
def _interrupt_between_steps() -> Iterator[Any]:
    """Turn the first Ctrl-C into a question that the loop asks between two steps; the second one is immediate."""
    received: list[int] = []

    def remember(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before)

    try:
        before = signal.signal(signal.SIGINT, remember)
    except ValueError:  # not the main thread: nothing to catch there
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, before)
