"""DRTune: train sparse denoising steps whose input is cut, and stop early at random (arXiv 2405.00760, algorithm 1).

With t = T the noisiest step: the trained ones are ``{s + i floor(T / K)}``, i = 0 .. K - 1, with s uniform in
``1 .. T - (K - 1) floor(T / K)``; sampling ends with the one-step estimate of the clean picture at t_min, uniform in
``1 .. m``. The denoiser's input is detached at every step, so that gradients add up along the scheduler's linear path
instead of multiplying along the denoiser's. Trained steps below t_min are not reached.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alignprop.denoising import clean_estimate
from alignprop.estimators.base import Estimate, MicroBatch, RewardGradient, ascend
from alignprop.rewards import WeightedSum
from alignprop.rollout import Sampler
from alignprop.seams import Checkpointing
from alignprop.steps import Plan, Transition

EARLIEST_STOP = 0.4
"""Share of the denoising steps that the random stop may leave out, where no number is given."""


@dataclass(frozen=True)
class DRTune(RewardGradient):
    """Sparse steps with their inputs detached.

    Attributes:
        steps: K; at most the number of denoising steps are used.
        early_stop: m; None for 40 % of the denoising steps, 1 for no early stop.
        checkpointing: activation checkpointing of the trained steps.
    """

    steps: int = 3
    early_stop: int | None = None
    checkpointing: Checkpointing = "none"

    def __post_init__(self) -> None:
        """Refuse what trains nothing before any model is loaded."""
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} needs at least 1: no trained step means no gradient.")
        if self.early_stop is not None and self.early_stop < 1:
            raise ValueError(f"early_stop={self.early_stop} needs at least 1, which is no early stop.")

    def __call__(self, sampler: Sampler, reward: WeightedSum, batch: MicroBatch, weight: float) -> Estimate:
        """One rollout and its backward pass; see :class:`~alignprop.estimators.base.RewardGradient`."""
        drawn: list[Plan] = []

        def plan(num_steps: int) -> Plan:
            drawn.append(self.draw(num_steps, batch.generator))
            return drawn[-1]

        def stopped(seen: Transition) -> Tensor | None:
            stops = seen.step + 1 in drawn[-1].held and seen.step not in drawn[-1].held
            return clean_estimate(seen) if stops else None

        rollout = sampler.rollout(
            batch.prompts, batch.seeds, plan=plan, on_step=stopped, checkpointing=self.checkpointing
        )
        scores, components = ascend(reward, rollout, batch, weight)
        return Estimate(scores, components, rollout.num_steps, rollout.live_steps, rollout.calls, len(scores))

    def draw(self, num_steps: int, generator: torch.Generator) -> Plan:
        """Which steps are trained and where sampling ends.

        Raises:
            ValueError: ``early_stop`` does not fit ``num_steps``.
        """
        earliest = max(round(EARLIEST_STOP * num_steps), 1) if self.early_stop is None else self.early_stop
        if earliest > num_steps:
            raise ValueError(f"early_stop={earliest} needs at most {num_steps}, the number of denoising steps.")
        count = min(self.steps, num_steps)
        stride = num_steps // count
        first = int(torch.randint(1, num_steps - (count - 1) * stride + 1, (), generator=generator))
        end = int(torch.randint(1, earliest + 1, (), generator=generator))
        live = [num_steps - (first + i * stride) for i in range(count)]
        held = range(num_steps - end + 1, num_steps)
        return Plan(live=[step for step in live if step not in held], held=held, input_gradient=0.0)
