"""LeapAlign: two leaps stand for the chain in the backward pass (arXiv 2604.15311).

Two steps k > j of a sampled trajectory are drawn (k the noisier). From the real, detached ``x_k`` one leap leads to j,
from there another to the picture, each connected to the real trajectory by a straight-through estimate:
``x_j := leap(x_k) + sg(x_j - leap(x_k))`` and likewise ``x_0``. So the reward sees the real picture, and gradient
reaches any step through two denoiser calls. What flows through the second call's input, a product of two Jacobians, is
scaled by ``discount``. Each picture weighs ``1 / (max(d_j, tau) + max(d_0, tau))``, d the mean absolute distance of
leap and real.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alignprop.denoising import clean_estimate, leap
from alignprop.estimators.base import Estimate, MicroBatch, RewardGradient, ascend
from alignprop.rewards import WeightedSum
from alignprop.rollout import Sampler
from alignprop.seams import Checkpointing
from alignprop.steps import Plan, Transition


@dataclass(frozen=True)
class LeapAlign(RewardGradient):
    """Gradient through two leaps between random steps.

    Attributes:
        discount: factor of the gradient that flows through both denoiser calls; 1 for all of it.
        similarity_floor: tau, below which distances count as alike.
        checkpointing: activation checkpointing of the two calls.
    """

    discount: float = 0.3
    similarity_floor: float = 0.1
    checkpointing: Checkpointing = "none"

    def __post_init__(self) -> None:
        """Refuse what weighs by infinity before any model is loaded."""
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount={self.discount:g} needs 0 <= discount <= 1.")
        if self.similarity_floor <= 0:
            raise ValueError(f"similarity_floor={self.similarity_floor:g} needs to be above 0.")

    def __call__(self, sampler: Sampler, reward: WeightedSum, batch: MicroBatch, weight: float) -> Estimate:
        """A sampling, its two leaps and their backward pass; see :class:`~.base.RewardGradient`."""
        real: list[Transition] = []
        trace = sampler.walk(batch.prompts, batch.seeds, lambda num_steps: Plan(live=()), real.append)
        if trace.num_steps < 2:
            raise ValueError("leapalign leaps between two of at least 2 denoising steps; there is 1.")
        far, near = draw(trace.num_steps, batch.generator)
        distances: list[Tensor] = []

        def connected(leapt: Tensor, reached: Tensor) -> Tensor:
            apart = (reached - leapt).detach().float().abs().flatten(1).mean(1)
            distances.append(apart[: len(batch.seeds)])  # some pipelines keep copies of their latents behind them
            return reached + leapt - leapt.detach()  # the straight-through estimate: real numbers, the leap's gradient

        def lead(seen: Transition) -> Tensor | None:
            if seen.step == near:
                return connected(clean_estimate(seen), real[-1].latents)
            if seen.step == far:
                return connected(leap(seen, near), real[near].arguments["sample"])
            return real[far].arguments["sample"] if seen.step == far - 1 else None

        rollout = sampler.rollout(
            batch.prompts,
            batch.seeds,
            plan=lambda num_steps: Plan(
                live=[far, near],
                held=[step for step in range(num_steps) if step not in (far, near)],
                input_gradient=self.discount,
                stand_in=trace.output,
            ),
            on_step=lead,
            checkpointing=self.checkpointing,
        )
        floors = [distance.clamp(min=self.similarity_floor) for distance in distances]
        scores, components = ascend(reward, rollout, batch, weight / torch.stack(floors).sum(0).to(rollout.pixels))
        calls = trace.calls + rollout.calls
        return Estimate(scores, components, rollout.num_steps, rollout.live_steps, calls, len(scores))


def draw(num_steps: int, generator: torch.Generator) -> tuple[int, int]:
    """Two different denoising steps, the noisier first."""
    far, near = torch.randperm(num_steps, generator=generator)[:2].sort().values.tolist()
    return far, near
