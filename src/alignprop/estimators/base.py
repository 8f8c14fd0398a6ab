"""What an estimator is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from alignprop.rewards import WeightedSum, is_differentiable
from alignprop.rollout import Sampler


@dataclass(frozen=True)
class Estimate:
    """What is known of a micro-batch once its gradient has been accumulated.

    Attributes:
        scores: (B,), the reward of each image, detached.
        components: the rewards that the scores are made of, by name, each (B,), detached and unweighted.
        num_steps: denoising steps of the rollout.
        live_steps: how many of them carried gradient.
    """

    scores: Tensor
    components: Mapping[str, Tensor]
    num_steps: int
    live_steps: int


class Estimator(Protocol):
    """Accumulates the gradient of the expected reward.

    Attributes:
        needs_gradient: whether it backpropagates the reward, so that it must be differentiable.
    """

    needs_gradient: ClassVar[bool]

    def __call__(
        self,
        sampler: Sampler,
        reward: WeightedSum,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        generator: torch.Generator,
        weight: float,
    ) -> Estimate:
        """Add the gradient of ``-weight * sum(scores)`` to ``parameter.grad`` of the adapter.

        Args:
            sampler: the pipeline and the arguments of its call.
            reward: scores pictures.
            prompts: B prompts.
            seeds: B seeds, one a picture.
            generator: of what the estimator draws; the same on every rank.
            weight: one over the number of images of the whole optimizer step.

        Raises:
            ValueError: the reward is not usable (shape, not finite, no gradient).
        """
        ...


def require_gradient(reward: WeightedSum, estimator: str) -> None:
    """Refuse rewards that have no gradient, before anything is sampled.

    Args:
        reward: what an estimator is about to backpropagate.
        estimator: its name.

    Raises:
        ValueError: one of the rewards says that it is not differentiable.
    """
    from alignprop import estimators  # which imports this module

    blind = [name for name, part in reward.rewards.items() if not is_differentiable(part)]
    if blind:
        known = {name: getattr(estimators, name) for name in estimators.__all__}
        free = [name for name, found in known.items() if not getattr(found, "needs_gradient", True)]
        raise ValueError(f"reward {', '.join(map(repr, blind))} {no_gradient(estimator, free)}")


def no_gradient(estimator: str, others: Sequence[str]) -> str:
    """The second half of the sentence that refuses a reward.

    Args:
        estimator: what it is refused by.
        others: estimators that can train on it.
    """
    use = f"train on it with {' or '.join(others)}, or" if others else "no estimator of this version does without;"
    return f"has no gradient, which {estimator} needs: {use} watch it as a judge."
