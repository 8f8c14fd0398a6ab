"""DRaFT-LV: the last denoising step, from several re-noised copies of the picture (arXiv 2309.17400, algorithm 1).

After the last step gave ``x_0``, each copy draws ``x_1 = alpha_1 sg(x_0) + sigma_1 epsilon`` and takes that step again.
The gradient is the mean over the picture and its n copies, where the paper adds them up: its size does not depend on n.
"""

from dataclasses import dataclass

from torch import Tensor

from alignprop.denoising import noised
from alignprop.estimators.base import Estimate, MicroBatch, RewardGradient, ascend
from alignprop.estimators.denoising_loss import noise_of
from alignprop.rewards import WeightedSum
from alignprop.rollout import Sampler
from alignprop.seams import Checkpointing
from alignprop.steps import Plan, Transition


@dataclass(frozen=True)
class DraftLV(RewardGradient):
    """The gradient of DRaFT-1 with less variance, for n further denoiser calls.

    Every copy is decoded and scored, and counts as an image scored.

    Attributes:
        copies: n.
        checkpointing: activation checkpointing of the last step.
    """

    copies: int = 2
    checkpointing: Checkpointing = "none"

    def __post_init__(self) -> None:
        """Refuse what draws nothing before any model is loaded."""
        if self.copies < 1:
            raise ValueError(f"copies={self.copies} needs at least 1; without copies this is draft-k with steps=1.")

    def __call__(self, sampler: Sampler, reward: WeightedSum, batch: MicroBatch, weight: float) -> Estimate:
        """A rollout, its copies and their backward passes; see :class:`~alignprop.estimators.base.RewardGradient`."""
        last: list[Tensor] = []

        def remember(seen: Transition) -> None:
            if seen.num_steps < 2:
                raise ValueError(
                    "draft-lv re-noises what comes before the last of at least 2 denoising steps; there is 1."
                )
            last[:] = [seen.latents.detach()]  # sg(x_0): the copies' gradient is of their own last step alone

        rollout = sampler.rollout(
            batch.prompts,
            batch.seeds,
            live_steps=1,
            checkpointing=self.checkpointing,
            on_step=remember,
        )
        share = weight / (self.copies + 1)
        scores, components = ascend(reward, rollout, batch, share)
        x_0, calls = last[0], rollout.calls
        for copy in range(self.copies):
            noise = noise_of(x_0, batch.seeds, copy)
            again = sampler.rollout(
                batch.prompts,
                batch.seeds,
                plan=lambda n: Plan(live=[n - 1], held=range(n - 1), stand_in=rollout.stand_in),
                on_step=lambda seen, noise=noise: _renoised(seen, x_0, noise),
                checkpointing=self.checkpointing,
            )
            ascend(reward, again, batch, share)
            calls += again.calls
        num_scored = len(scores) * (self.copies + 1)
        return Estimate(scores, components, rollout.num_steps, rollout.live_steps, calls, num_scored)


def _renoised(seen: Transition, x_0: Tensor, noise: Tensor) -> Tensor | None:
    """What the last denoising step is given."""
    if seen.step != seen.num_steps - 2:
        return None
    return noised(seen, x_0, noise, seen.num_steps - 1)
