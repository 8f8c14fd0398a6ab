"""ReFL: one random late denoising step, and the clean picture estimated from it (arXiv 2304.05977, algorithm 1).

Sampling without gradient to a random one of the last steps, then ``x_0 = (x_t - sigma_t e_theta(x_t)) / alpha_t`` with
gradient (or its equal for other predictions), decoded and scored. With pictures given, the loss of diffusion training
on them is added, which holds the model at what it was: ``lambda E || target - prediction ||^2``.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alignprop.denoising import clean_estimate
from alignprop.estimators.base import Estimate, MicroBatch, RewardGradient, ascend
from alignprop.estimators.pretraining import Pretraining
from alignprop.rewards import WeightedSum
from alignprop.rollout import Sampler
from alignprop.seams import Checkpointing
from alignprop.steps import Plan, Transition

LATE = 0.25
"""Share of the denoising steps that are late: steps 30 to 39 of 40 in the published code."""


@dataclass(frozen=True)
class ReFL(RewardGradient):
    """The reward of a one-step estimate.

    The published loss is ``1e-3 max(0, 2 - reward)``; use ``clamp_above`` of the reward for the bound.

    Attributes:
        late_steps: the step is one of the last so many; None for the last quarter.
        images: folder of pictures, their prompts as their names (``a_cat.png``), for the pretraining loss; None for
            none.
        pretraining_weight: lambda.
        checkpointing: activation checkpointing of the step.
    """

    late_steps: int | None = None
    images: str | None = None
    pretraining_weight: float = 1.0
    checkpointing: Checkpointing = "none"

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn or found before any model is loaded."""
        if self.late_steps is not None and self.late_steps < 1:
            raise ValueError(f"late_steps={self.late_steps} needs at least 1.")
        if self.images is not None and not Path(self.images).is_dir():
            raise ValueError(f"images={self.images!r} is no folder; give one of pictures named by their prompts.")

    def __call__(self, sampler: Sampler, reward: WeightedSum, batch: MicroBatch, weight: float) -> Estimate:
        """A rollout to a late step and its backward pass; see :class:`~alignprop.estimators.base.RewardGradient`."""
        chosen: list[int] = []

        def plan(num_steps: int) -> Plan:
            chosen.append(self.draw(num_steps, batch.generator))
            return Plan(live=chosen, held=range(chosen[0] + 1, num_steps))

        estimates: list[Tensor] = []

        def estimate(seen: Transition) -> Tensor | None:
            if seen.step != chosen[0]:
                return None
            estimates.append(clean_estimate(seen))
            return estimates[0]

        rollout = sampler.rollout(
            batch.prompts, batch.seeds, plan=plan, on_step=estimate, checkpointing=self.checkpointing
        )
        scores, components = ascend(reward, rollout, batch, weight)
        calls, facts = rollout.calls, {}
        if self.images is not None:
            share = weight * self.pretraining_weight
            loss, more = Pretraining.of(self.images)(sampler, batch, share, rollout, estimates[0], self.checkpointing)
            calls, facts = calls + more, {"pretraining_loss": loss}
        return Estimate(scores, components, rollout.num_steps, rollout.live_steps, calls, len(scores), facts)

    def draw(self, num_steps: int, generator: torch.Generator) -> int:
        """The step that is trained, counted from 0.

        Raises:
            ValueError: ``late_steps`` does not fit ``num_steps``.
        """
        late = math.ceil(LATE * num_steps) if self.late_steps is None else self.late_steps
        if late > num_steps:
            raise ValueError(f"late_steps={late} needs at most {num_steps}, the number of denoising steps.")
        return int(torch.randint(num_steps - late, num_steps, (), generator=generator))
