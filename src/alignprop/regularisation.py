"""Keep a model near what it was, and its gradient within bounds, while a reward changes it.

With p and p' the transitions of the tuned and of the base model, from the same latents, in each live denoising step,

    kl = sum over live steps  KL(p || p') = mean over elements of (mu - mu')^2 / (2 sigma^2)
    l2 = mean over live steps and their denoiser calls  mean over elements of (prediction - prediction')^2

for each picture. Both are means over a picture's elements and not sums, as the log-probabilities of DDPO are, so that a
weight means the same for pictures of every size. mu' and prediction' differ from mu and prediction in what the denoiser
says, which is a constant: the base model is not differentiated, neither in its weights nor in its latents.

sigma is the deviation of what the sampler draws in the step, as in DPOK (arXiv 2305.16381). A deterministic step (DDIM
with eta 0, the ODE of flow matching, the last step of most samplers) has none: there it is that of the forward process
from the step's end s to its beginning t, ``sigma^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2``, one of the two
choices of DDPM (arXiv 2006.11239, section 3.2). The other, the posterior's, would be zero in the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from alignprop.denoising import gaussian, noise_level
from alignprop.rollout import Rollout, Sampler
from alignprop.steps import Call, EnoughError, OnStep, Plan, Transition


@dataclass(frozen=True)
class Regularisation:
    """What is taken off the reward, and what bounds its gradient.

    Attributes:
        kl: weight of the divergence from the base model along the live denoising steps.
        l2: weight of the squared difference between its predictions and the tuned model's.
        max_step_grad_norm: bound of the norm of the gradient that arrives at the latents of each live denoising step,
            for each picture; of the picture's own loss, whatever the batch size and the loss scale. None for no bound.
    """

    kl: float = 0.0
    l2: float = 0.0
    max_step_grad_norm: float | None = None

    def __post_init__(self) -> None:
        """Refuse what would reward moving away, or stop all gradient."""
        for name, weight in (("kl", self.kl), ("l2", self.l2)):
            if weight < 0:
                raise ValueError(f"regularisation.{name}={weight:g} needs at least 0.")
        if self.max_step_grad_norm is not None and self.max_step_grad_norm <= 0:
            raise ValueError(
                f"regularisation.max_step_grad_norm={self.max_step_grad_norm:g} needs to be above 0, or None for none."
            )

    @property
    def active(self) -> dict[str, float]:
        """The settings that are not off, by name."""
        return {name: value for name, value in asdict(self).items() if value}

    @property
    def weights(self) -> dict[str, float]:
        """Of the penalties that are not off, by name."""
        return {name: value for name, value in self.active.items() if name in MEASURES}

    def refusals(self, estimator: str, taken: Collection[str], *, full: bool) -> Iterator[str]:
        """One sentence for each setting that can have no effect.

        Args:
            estimator: its name.
            taken: the settings that it heeds.
            full: whether all of the denoiser is trained, so that the base model is not at hand.
        """
        for name, value in self.active.items():
            setting = f"regularisation.{name}={value:g}"
            if name not in taken:
                known = f"which heeds {' and '.join(sorted(taken))}" if taken else "which heeds no regulariser"
                yield f"{setting} is not for estimator {estimator}, {known}: leave it out."
            elif full and name in MEASURES:
                yield (
                    f"{setting} compares with the base model, which full training overwrites: use adapter.kind=lora, "
                    "or leave it out."
                )


@dataclass(frozen=True)
class Prediction:
    """What a model predicted in one denoising step.

    Attributes:
        seen: what the scheduler was asked; its ``model_output`` is what the pipeline made of the denoiser's, guided.
        outputs: of each call of the denoiser, a row for each picture in it.
    """

    seen: Transition
    outputs: Sequence[Tensor]


@dataclass
class Recorder:
    """Puts together what was predicted in each denoising step.

    Attributes:
        everything: whether also by calls that carry no gradient.
        outputs: of the calls of the present step.
    """

    everything: bool = False
    outputs: list[Tensor] = field(default_factory=list)

    def call(self, call: Call) -> None:
        """Remember a call of the denoiser until the step ends."""
        if call.is_live or self.everything:
            self.outputs.append(_rows(call.output))

    def step(self, seen: Transition) -> Prediction | None:
        """What was predicted in the step that ends; None if no call of it was remembered."""
        outputs, self.outputs = self.outputs, []
        return Prediction(seen, outputs) if outputs else None


def _rows(output: Any) -> Tensor:
    """What a denoiser returned as (N, ...), also if it is a list of N."""
    first = output if isinstance(output, Tensor) else output[0]
    return first if isinstance(first, Tensor) else torch.stack(list(first))


def divergence(tuned: Prediction, base: Prediction) -> Tensor:
    """KL divergence of the tuned model's transition from the base model's, a mean over elements; one for each row.

    Raises:
        ValueError: the step is deterministic, and its scheduler does not say how it noises.
    """
    seen = tuned.seen
    arguments = {**seen.arguments, "model_output": base.seen.arguments["model_output"]}
    mean, deviation = gaussian(seen)
    other, _ = gaussian(replace(seen, arguments=arguments))
    if deviation == 0:
        deviation = forward_deviation(seen)
    return ((mean - other) / deviation).square().flatten(1).mean(1) / 2


def distance(tuned: Prediction, base: Prediction) -> Tensor:
    """Mean squared difference of what the denoiser said, over elements and calls; one for each row."""
    pairs = zip(tuned.outputs, base.outputs, strict=True)
    return torch.stack([(_wide(ours) - _wide(theirs)).square().flatten(1).mean(1) for ours, theirs in pairs]).mean(0)


MEASURES: Mapping[str, Callable[[Prediction, Prediction], Tensor]] = {"kl": divergence, "l2": distance}
"""How far from the base model one denoising step is, by the name of the weight."""
_AVERAGED = ("l2",)
"""Of these the mean over the live steps is taken, of the others the sum."""


def forward_deviation(seen: Transition) -> Tensor:
    """That of the forward process from the end of a denoising step to its beginning; a clean picture is the last end.

    Raises:
        ValueError: the scheduler does not say how it noises.
    """
    try:
        alpha, sigma = noise_level(seen, seen.step)
        if seen.is_last:
            return sigma
        end_alpha, end_sigma = noise_level(seen, seen.step + 1)
    except ValueError as error:
        raise ValueError(
            f"regularisation.kl needs the noise of each live denoising step: {type(seen.scheduler).__name__} draws "
            "none and does not say how it noises. Use regularisation.l2, or a scheduler such as DDIMScheduler."
        ) from error
    return (sigma**2 - (alpha / end_alpha * end_sigma) ** 2).sqrt()


@dataclass
class Regulariser:
    """Regularises the gradient of one micro-batch.

    Attributes:
        settings: what is regularised.
        base: the model as it was before training, inside the context.
        weight: what the loss of each picture is multiplied with.
        totals: the penalties so far, unweighted, summed over rollouts; each (B,), detached.
        num_rollouts: how many that were.
        clipped: for each gradient that has arrived at a denoising step, which pictures' was bounded; each (B,).
    """

    settings: Regularisation
    base: Callable[[], AbstractContextManager[None]]
    weight: float
    totals: dict[str, Tensor] = field(default_factory=dict)
    num_rollouts: int = 0
    clipped: list[Tensor] = field(default_factory=list)

    def rollout(
        self, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], on_step: OnStep | None = None, **own: Any
    ) -> Rollout:
        """A rollout with its penalty; its ``calls`` are those of the reference as well.

        Args:
            sampler: has no regulariser.
            prompts: of the B pictures.
            seeds: of the B pictures.
            on_step: of the estimator.
            **own: further arguments of :meth:`alignprop.rollout.Sampler.rollout`.
        """
        recorder, tuned, latents = Recorder(), {}, {}

        def look(seen: Transition) -> Tensor | None:
            other = on_step(seen) if on_step is not None else None
            reached = seen.latents if other is None else other
            if self.settings.weights:  # copies, since pipelines may write into them
                latents[seen.step] = reached.detach().clone()
            if (prediction := recorder.step(seen)) is not None:
                tuned[seen.step] = prediction
                self._bound(reached, len(seeds))
            return other

        rollout = sampler.rollout(prompts, seeds, on_step=look, on_call=recorder.call, **own)
        if not self.settings.weights or not tuned:
            return rollout
        changes = {name: value for name, value in own.items() if name not in ("live_steps", "plan", "checkpointing")}
        base, calls = self.reference(sampler, prompts, seeds, tuned, latents, rollout.stand_in, **changes)
        parts = [self.penalty(tuned[step], base[step], len(seeds), len(tuned)) for step in tuned]
        self.num_rollouts += 1
        return replace(rollout, penalty=torch.stack(parts).sum(0), calls=rollout.calls + calls)

    def reference(
        self,
        sampler: Sampler,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: Collection[int],
        latents: Mapping[int, Tensor] | Sequence[Tensor],
        stand_in: Any,
        **changes: Any,
    ) -> tuple[dict[int, Prediction], int]:
        """What the base model predicts in some denoising steps, led from one to the next by given latents.

        Args:
            sampler: has no regulariser.
            prompts: of the pictures.
            seeds: of the pictures.
            steps: the denoising steps; in the others the denoiser is not called.
            latents: that each denoising step led to.
            stand_in: any output of the denoiser of the same shape.
            **changes: of the pipeline's call.

        Returns:
            The predictions by denoising step, and how many denoiser calls they took.
        """
        recorder, base = Recorder(everything=True), {}

        def plan(num_steps: int) -> Plan:
            return Plan(live=(), held=[step for step in range(num_steps) if step not in steps], stand_in=stand_in)

        def replay(seen: Transition) -> Tensor:
            if (prediction := recorder.step(seen)) is not None:
                base[seen.step] = prediction
            if seen.step == max(steps):
                raise EnoughError
            return latents[seen.step]

        # Whatever is drawn from torch's own stream must not shift what training draws from it.
        with torch.random.fork_rng(), self.base():
            trace = sampler.walk(prompts, seeds, plan, replay, on_call=recorder.call, **changes)
        return base, trace.calls

    def penalty(self, tuned: Prediction, base: Prediction, num_pictures: int, num_live: int) -> Tensor:
        """What one of ``num_live`` denoising steps adds to the penalty of each picture, (B,)."""
        total = torch.zeros(num_pictures, device=tuned.seen.latents.device)
        for name, weight in self.settings.weights.items():
            value = _of_pictures(MEASURES[name](tuned, base), num_pictures) / (num_live if name in _AVERAGED else 1)
            self.totals[name] = self.totals.get(name, 0) + value.detach()
            total = total + weight * value
        return total

    def _bound(self, latents: Tensor, num_pictures: int) -> None:
        """Let no more than the bound of each picture's gradient through latents."""
        limit = self.settings.max_step_grad_norm
        if limit is None or not latents.requires_grad:
            return

        def bounded(gradient: Tensor) -> Tensor:
            copies = _wide(gradient).reshape(-1, num_pictures, *gradient.shape[1:])
            norms = copies.transpose(0, 1).flatten(1).norm(dim=1)
            over = norms > limit * self.weight
            self.clipped.append(over)
            factors = torch.where(over, limit * self.weight / norms, 1.0).view(-1, *[1] * (gradient.ndim - 1))
            return (copies * factors).reshape(gradient.shape).to(gradient.dtype)

        latents.register_hook(bounded)

    def facts(self) -> dict[str, float]:
        """For the metrics: the mean of each penalty, unweighted, and the share of gradients that were bounded."""
        facts = {
            name: (self.totals[name].mean() / max(self.num_rollouts, 1)).item() if name in self.totals else 0.0
            for name in self.settings.weights
        }
        if self.settings.max_step_grad_norm is not None:
            facts["step_clip_fraction"] = torch.cat(self.clipped).float().mean().item() if self.clipped else 0.0
        return facts


def _of_pictures(rows: Tensor, num_pictures: int) -> Tensor:
    """The mean over the rows of each picture, which come again and again in the same order where there is guidance."""
    if len(rows) % num_pictures:
        raise ValueError(
            f"regularisation compares whole pictures, and the denoiser was given {len(rows)} rows for {num_pictures} "
            "of them: leave it out."
        )
    return rows.reshape(-1, num_pictures).mean(0)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
