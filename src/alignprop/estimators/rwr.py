"""RWR: go on training on the model's own pictures, the better ones more (arXiv 2305.13301).

    loss = mean over pictures and steps of  w(A) || target - prediction(x_t) ||^2

with ``w = N softmax(beta A)`` over the N pictures of a step or, filtered, ``w = N / |kept|`` for those whose A is in
the upper share and 0 for the others. A is the reward in deviations from its prompt's mean. The prediction is the guided
one that the pictures were drawn by: to imitate them without guidance, and then draw with guidance again, adds guidance
to guidance until pictures burn out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from alignprop import distributed
from alignprop.estimators.advantages import PromptStatistics
from alignprop.estimators.base import Estimate, MicroBatch, Step, scored
from alignprop.estimators.denoising_loss import denoising_loss
from alignprop.rewards import WeightedSum
from alignprop.rollout import Sampler
from alignprop.seams import Checkpointing
from alignprop.steps import Plan, Transition


@dataclass(frozen=True)
class Drawn:
    """Pictures that were drawn.

    Attributes:
        batch: their prompts and seeds.
        components: their rewards by name, each (B,).
        scores: (B,).
        x_0: their clean latents, in the scheduler's units.
        num_steps: denoising steps.
        calls: denoiser calls.
    """

    batch: MicroBatch
    components: Mapping[str, Tensor]
    scores: Tensor
    x_0: Tensor
    num_steps: int
    calls: int


@dataclass
class RWR:
    """Reward-weighted regression; the reward needs no gradient, and the sampler no noise.

    Attributes:
        inverse_temperature: beta; the published 0.2 is for rewards as they are, this one for rewards in deviations.
        keep: share of the pictures that are kept, all alike; None to weigh them all by ``inverse_temperature``.
        guided: whether the guided prediction learns, or the plain one.
        inner_epochs: updates that each step's pictures are used for, with fresh noise.
        buffer_size: rewards of each prompt that its mean and deviation are taken over.
        min_count: rewards of a prompt below which those of the whole step are taken.
        checkpointing: activation checkpointing of a step: ``none`` or ``block``.
    """

    needs_gradient: ClassVar[bool] = False
    regularisers: ClassVar[tuple[str, ...]] = ()

    inverse_temperature: float = 1.0
    keep: float | None = None
    guided: bool = True
    inner_epochs: int = 1
    buffer_size: int = 16
    min_count: int = 16
    checkpointing: Checkpointing = "none"

    def __post_init__(self) -> None:
        """Refuse what cannot learn before any model is loaded."""
        if self.inner_epochs < 1:
            raise ValueError(f"inner_epochs={self.inner_epochs} needs at least 1.")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep:g} needs 0 < keep <= 1.")
        if self.inverse_temperature <= 0:
            raise ValueError(f"inverse_temperature={self.inverse_temperature:g} needs to be above 0.")
        self.statistics = PromptStatistics(self.buffer_size, self.min_count)

    def updates(self, step: Step) -> Iterator[Sequence[Estimate]]:
        """Draw and score once, then imitate; see :class:`~alignprop.estimators.base.Estimator`."""
        drawn = step.each(lambda batch: collect(step.sampler, step.reward, batch))
        weights = self._weights(drawn)
        for epoch in range(self.inner_epochs):
            yield step.each(partial(self._imitate, step, drawn, weights, epoch))

    def _imitate(
        self, step: Step, drawn: Sequence[Drawn], weights: Sequence[Tensor], epoch: int, batch: MicroBatch
    ) -> Estimate:
        share = weights[batch.index] * step.weight()
        return self.imitate(step.sampler, drawn[batch.index], share, epoch)

    def imitate(self, sampler: Sampler, drawn: Drawn, weights: Tensor, epoch: int) -> Estimate:
        """Backpropagate the weighted denoising loss of pictures.

        Args:
            sampler: the pipeline and the arguments of its call.
            drawn: the pictures.
            weights: (B,), of each one's loss.
            epoch: tells the noise of one from that of another.
        """
        seeds = [distributed.derive_seed(seed, epoch) for seed in drawn.batch.seeds]
        prompts = drawn.batch.prompts
        losses, calls = denoising_loss(
            sampler, prompts, seeds, drawn.x_0, weights, self.checkpointing, guided=self.guided
        )
        return Estimate(
            drawn.scores,
            drawn.components,
            drawn.num_steps,
            drawn.num_steps,
            calls + (0 if epoch else drawn.calls),
            0 if epoch else len(drawn.scores),
            {"denoising_loss": losses.mean().item()},
        )

    def _weights(self, drawn: Sequence[Drawn]) -> list[Tensor]:
        """Of each picture, 1 on average over all processes."""
        prompts = [prompt for each in drawn for prompt in each.batch.prompts]
        own, advantages = self.statistics.judge(prompts, torch.cat([each.scores for each in drawn]))
        if self.keep is None:
            weights = torch.exp(self.inverse_temperature * (own - advantages.max()))
            mean = torch.exp(self.inverse_temperature * (advantages - advantages.max())).mean()
        else:
            bound = advantages.topk(max(round(self.keep * len(advantages)), 1)).values.min()
            weights, mean = (own >= bound).float(), (advantages >= bound).float().mean()
        return list((weights / mean).split([len(each.scores) for each in drawn]))

    def state(self) -> dict[str, Any]:
        """The remembered rewards."""
        return self.statistics.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up remembered rewards."""
        self.statistics.load_state(state)


@torch.no_grad()
def collect(sampler: Sampler, reward: WeightedSum, batch: MicroBatch) -> Drawn:
    """Draw and score pictures."""
    last: list[Tensor] = []

    def remember(seen: Transition) -> None:
        last[:] = [seen.latents]

    rollout = sampler.rollout(batch.prompts, batch.seeds, plan=lambda n: Plan(live=()), on_step=remember)
    components = scored(reward, rollout.pixels.detach(), batch.prompts)
    return Drawn(batch, components, reward.combine(components), last[0], rollout.num_steps, rollout.calls)
