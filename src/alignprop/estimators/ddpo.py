"""DDPO: the denoising chain as a policy, improved by PPO's clipped objective (arXiv 2305.13301).

Each stochastic step draws ``x_{t-1} ~ N(mu_theta(x_t), sigma_t^2)``. With the advantage A of the finished picture and
the ratio ``rho_t = p_theta(x_{t-1} | x_t) / p_old(x_{t-1} | x_t)``,

    loss = mean over pictures and steps of  max(-A rho_t, -A clip(rho_t, 1 - c, 1 + c)),

whose gradient at ``theta = old`` is the score-function estimate ``-A grad log p``. As in the released code, log p is
the mean over a picture's elements, and A is the reward less its prompt's mean, over its prompt's deviation.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from alignprop.denoising import gaussian, log_probability
from alignprop.estimators.advantages import PromptStatistics
from alignprop.estimators.base import Estimate, MicroBatch, Step, scored, with_facts
from alignprop.regularisation import Prediction, Recorder, Regulariser
from alignprop.rewards import WeightedSum
from alignprop.rollout import Sampler
from alignprop.seams import Checkpointing
from alignprop.steps import EnoughError, Plan, Transition


@dataclass(frozen=True)
class Experience:
    """Pictures that were drawn, and how.

    Attributes:
        batch: their prompts and seeds.
        components: their rewards by name, each (B,).
        scores: (B,).
        latents: that each denoising step gave.
        log_probabilities: of those that a step drew, (B,), by step; deterministic steps have none.
        calls: denoiser calls.
        stand_in: what the denoiser returned last.
    """

    batch: MicroBatch
    components: Mapping[str, Tensor]
    scores: Tensor
    latents: Sequence[Tensor]
    log_probabilities: Mapping[int, Tensor]
    calls: int
    stand_in: Any = None


@dataclass
class DDPO:
    """Policy gradient with importance sampling; the reward needs no gradient.

    Every denoising step is backpropagated before the next is taken, so that memory does not grow with their number. A
    last step without noise is not part of the policy.

    Attributes:
        clip_range: c.
        max_advantage: bound of the advantage's absolute value.
        inner_epochs: updates that each step's pictures are used for, times ``minibatches``.
        minibatches: updates of an inner epoch, each with its share of the micro-batches.
        buffer_size: rewards of each prompt that its mean and deviation are taken over.
        min_count: rewards of a prompt below which those of the whole step are taken.
        eta: of DDIM's noise in training, where the run's own sampling sets none.
        checkpointing: activation checkpointing of a step: ``none`` or ``block``.
    """

    needs_gradient: ClassVar[bool] = False
    regularisers: ClassVar[tuple[str, ...]] = ("kl", "l2")

    clip_range: float = 1e-4
    max_advantage: float = 5.0
    inner_epochs: int = 1
    minibatches: int = 1
    buffer_size: int = 16
    min_count: int = 16
    eta: float = 1.0
    checkpointing: Checkpointing = "none"

    def __post_init__(self) -> None:
        """Refuse what cannot learn before any model is loaded."""
        for name in ("inner_epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} needs at least 1.")
        for name in ("clip_range", "max_advantage", "eta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name):g} needs to be above 0.")
        self.statistics = PromptStatistics(self.buffer_size, self.min_count)

    def updates(self, step: Step) -> Iterator[Sequence[Estimate]]:
        """Draw and score once, then improve; see :class:`~alignprop.estimators.base.Estimator`."""
        if step.num_batches % self.minibatches:
            raise ValueError(
                f"minibatches={self.minibatches} needs to divide training.accumulation={step.num_batches}."
            )
        experiences = step.each(lambda batch: self.collect(step.sampler, step.reward, batch))
        advantages = self._advantages(experiences)
        for epoch in range(self.inner_epochs):
            for part in range(self.minibatches):
                improve = partial(self._improve, step, experiences, advantages, epoch, part)
                yield [estimate for estimate in step.each(improve) if estimate is not None]

    def _improve(
        self,
        step: Step,
        experiences: Sequence[Experience],
        advantages: Sequence[Tensor],
        epoch: int,
        part: int,
        batch: MicroBatch,
    ) -> Estimate | None:
        if batch.index % self.minibatches != part:
            return None
        weight, experience = step.weight() * self.minibatches, experiences[batch.index]
        first = epoch == part == 0
        regulariser = step.regularise(weight) if step.regularise is not None else None
        estimate = self.improve(
            step.sampler, experience, advantages[batch.index], weight, first=first, regulariser=regulariser
        )
        if epoch:
            return estimate
        return replace(estimate, calls=estimate.calls + experience.calls, num_scored=len(experience.scores))

    @torch.no_grad()
    def collect(self, sampler: Sampler, reward: WeightedSum, batch: MicroBatch) -> Experience:
        """Draw pictures, and remember what each step drew and how likely it was.

        Raises:
            ValueError: no denoising step of the pipeline draws anything.
        """
        latents: list[Tensor] = []
        log_probabilities: dict[int, Tensor] = {}

        def remember(seen: Transition) -> None:
            latents.append(seen.latents)
            mean, deviation = gaussian(seen)
            if deviation > 0:  # some pipelines keep copies of their latents behind them
                log_probabilities[seen.step] = log_probability(seen.latents, mean, deviation)[: len(batch.seeds)]

        rollout = sampler.rollout(
            batch.prompts, batch.seeds, plan=lambda n: Plan(live=()), on_step=remember, **self._noise(sampler)
        )
        if not log_probabilities:
            raise ValueError(
                f"estimator ddpo learns from the noise of denoising steps, and {_name(sampler)} draws none: set "
                "sampling.eta=1 (DDIM), model.scheduler=EulerAncestralDiscreteScheduler or, for flow matching, "
                "model.scheduler_arguments={stochastic_sampling: true}."
            )
        components = scored(reward, rollout.pixels.detach(), batch.prompts)
        scores = reward.combine(components)
        return Experience(batch, components, scores, latents, log_probabilities, rollout.calls, rollout.stand_in)

    def improve(
        self,
        sampler: Sampler,
        experience: Experience,
        advantages: Tensor,
        weight: float,
        *,
        first: bool,
        regulariser: Regulariser | None = None,
    ) -> Estimate:
        """Go through the same steps again with gradient, and backpropagate the clipped objective of each.

        The estimate counts nothing as scored, and the denoiser calls of this pass alone.

        Args:
            sampler: the pipeline and the arguments of its call.
            experience: what was drawn.
            advantages: (B,).
            weight: one over the pictures of this update, times the loss scale.
            first: whether nothing has been learned since the pictures were drawn, so that every ratio must be 1.
            regulariser: adds its penalty of each step; None for none.
        """
        old, ratios, recorder = experience.log_probabilities, [], Recorder()
        base, calls = self._reference(sampler, experience, regulariser)

        def learn(seen: Transition) -> Tensor:
            reached = experience.latents[seen.step]
            tuned = recorder.step(seen)
            if seen.step in old:
                now = log_probability(reached, *gaussian(seen))[: len(advantages)]
                ratio = (now - old[seen.step]).exp()
                clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
                gain = advantages.to(ratio)
                loss = weight / len(old) * torch.maximum(-gain * ratio, -gain * clipped)
                if regulariser is not None and tuned is not None:
                    loss = loss + weight * regulariser.penalty(tuned, base[seen.step], len(gain), len(old))
                loss.sum().backward()
                ratios.append(ratio.detach())
            if len(ratios) == len(old):
                raise EnoughError
            return reached

        trace = sampler.walk(
            experience.batch.prompts,
            experience.batch.seeds,
            lambda num_steps: Plan(live=list(old)),
            learn,
            checkpointing=self.checkpointing,
            on_call=recorder.call,
            **self._noise(sampler),
        )
        tolerance = _tolerance(sampler) if first else math.inf
        estimate = self._estimate(experience, torch.stack(ratios), trace.calls + calls, tolerance)
        return with_facts(estimate, regulariser)

    def _reference(
        self, sampler: Sampler, experience: Experience, regulariser: Regulariser | None
    ) -> tuple[dict[int, Prediction], int]:
        """What the base model would have said of the same latents, and the denoiser calls that this took."""
        if regulariser is None:
            return {}, 0
        steps, batch = experience.log_probabilities, experience.batch
        return regulariser.reference(
            sampler,
            batch.prompts,
            batch.seeds,
            steps,
            experience.latents,
            experience.stand_in,
            **self._noise(sampler),
        )

    def _estimate(self, experience: Experience, ratios: Tensor, calls: int, tolerance: float) -> Estimate:
        off = (ratios - 1).abs()
        if off.max() > tolerance:
            raise ValueError(
                f"the policy that drew the pictures gives them a ratio off 1 by {off.max().item():.1e}: the denoiser "
                "keeps state or draws noise of its own between calls, so that no probability can be told."
            )
        return Estimate(
            experience.scores,
            experience.components,
            len(experience.latents),
            len(experience.log_probabilities),
            calls,
            0,
            {"clip_fraction": (off > self.clip_range).float().mean().item(), "ratio_error": off.mean().item()},
        )

    def _advantages(self, experiences: Sequence[Experience]) -> list[Tensor]:
        prompts = [prompt for experience in experiences for prompt in experience.batch.prompts]
        own, _ = self.statistics.judge(prompts, torch.cat([experience.scores for experience in experiences]))
        bounded = own.clamp(-self.max_advantage, self.max_advantage)
        return list(bounded.split([len(experience.scores) for experience in experiences]))

    def _noise(self, sampler: Sampler) -> dict[str, Any]:
        known = inspect.signature(sampler.pipeline.__call__).parameters
        return {"eta": self.eta} if "eta" in known and "eta" not in sampler.call else {}

    def state(self) -> dict[str, Any]:
        """The remembered rewards."""
        return self.statistics.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up remembered rewards."""
        self.statistics.load_state(state)


def _tolerance(sampler: Sampler) -> float:
    """How far ratios may be off 1 by rounding: with gradient a denoiser may take other kernels than without."""
    return 5e-2 if sampler.half_precision else 1e-5


def _name(sampler: Sampler) -> str:
    return type(sampler.pipeline.scheduler).__name__
