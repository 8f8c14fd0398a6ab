"""What an estimator is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from alignprop import distributed
from alignprop.regularisation import Regulariser
from alignprop.rewards import WeightedSum, check_scores, is_differentiable
from alignprop.rollout import Rollout, Sampler

Result = TypeVar("Result")


class Descent(Protocol):
    """How the rewards of an optimizer step are backpropagated."""

    def __call__(
        self, reward: WeightedSum, rollout: Rollout, prompts: Sequence[str], weight: float | Tensor
    ) -> dict[str, Tensor]:
        """Score pictures and, if they have a graph, backpropagate ``-sum(weight * (scores - penalty))``.

        Returns:
            The rewards by name, each (B,), detached.

        Raises:
            ValueError: scores are not usable.
        """
        ...

    def num_passes(self, rollout: Rollout) -> int:
        """How many backward passes go through a rollout."""
        ...

    def complete(self, parameters: Sequence[nn.Parameter], generator: torch.Generator) -> dict[str, Any]:
        """Leave the gradient of all processes in ``parameter.grad``.

        Args:
            parameters: what is trained.
            generator: the same on every rank.

        Returns:
            Further numbers for the metrics.
        """
        ...


@dataclass(frozen=True)
class MicroBatch:
    """Pictures that are sampled together.

    Attributes:
        index: its place among the micro-batches of the step on this process.
        prompts: B prompts.
        seeds: B seeds, one a picture.
        generator: of what an estimator draws for all of them; the same on every rank.
        descend: backpropagates their rewards, for estimators that need that.
    """

    index: int
    prompts: Sequence[str]
    seeds: Sequence[int]
    generator: torch.Generator
    descend: Descent = field(default_factory=lambda: OneBackward())


@dataclass(frozen=True)
class Step:
    """An optimizer step, as an estimator sees it.

    Attributes:
        sampler: the pipeline and the arguments of its call.
        reward: scores pictures.
        each: does some work for each micro-batch of this process, and returns the results; a ValueError of one
            process ends the step on all. It may be called several times.
        num_batches: micro-batches of this process.
        weight: what to multiply each picture's loss with: one over the pictures of the step, times the loss scale.
        regularise: from that weight to what regularises one micro-batch; None for nothing.
    """

    sampler: Sampler
    reward: WeightedSum
    each: Callable[[Callable[[MicroBatch], Any]], list[Any]]
    num_batches: int
    weight: Callable[[], float]
    regularise: Callable[[float], Regulariser] | None = None


@dataclass(frozen=True)
class Estimate:
    """What is known of a micro-batch once its gradient has been accumulated.

    Attributes:
        scores: (B,), the reward of each image, detached.
        components: the rewards that the scores are made of, by name, each (B,), detached and unweighted.
        num_steps: denoising steps of the rollout.
        live_steps: how many of them carried gradient.
        calls: denoiser calls, those of all passes; what activation checkpointing computes again is not counted.
        num_scored: images on which the reward was computed.
        facts: further numbers for the metrics, by name.
    """

    scores: Tensor
    components: Mapping[str, Tensor]
    num_steps: int
    live_steps: int
    calls: int
    num_scored: int
    facts: Mapping[str, float] = field(default_factory=dict)


class Estimator(Protocol):
    """Turns rollouts and a reward into gradients of the adapter.

    Attributes:
        needs_gradient: whether it backpropagates the reward, so that it must be differentiable.
        regularisers: settings of :class:`~alignprop.regularisation.Regularisation` that it heeds.
    """

    needs_gradient: ClassVar[bool]
    regularisers: ClassVar[tuple[str, ...]]

    def updates(self, step: Step) -> Iterator[Sequence[Estimate]]:
        """Add to ``parameter.grad`` of the adapter, and yield whenever the gradient is complete for an update.

        Raises:
            ValueError: the reward or the pipeline is not usable.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What it must know again after resuming: numbers and tensors in nested dictionaries."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        ...


class RewardGradient(ABC):
    """An estimator that backpropagates the reward, once for each micro-batch, for one update a step."""

    needs_gradient: ClassVar[bool] = True
    regularisers: ClassVar[tuple[str, ...]] = ("kl", "l2", "max_step_grad_norm")

    @abstractmethod
    def __call__(self, sampler: Sampler, reward: WeightedSum, batch: MicroBatch, weight: float) -> Estimate:
        """Backpropagate ``-weight * sum(scores - penalty)`` into the adapter, by :func:`ascend`.

        There is a penalty where the sampler has a regulariser. What an estimator multiplies a picture's score with, it
        multiplies its penalty with.

        Raises:
            ValueError: the reward is not usable (shape, not finite, no gradient).
        """

    def updates(self, step: Step) -> Iterator[Sequence[Estimate]]:
        """One update; see :meth:`Estimator.updates`."""
        require_gradient(step.reward, type(self).__name__)
        yield step.each(lambda batch: self._estimate(step, batch))

    def _estimate(self, step: Step, batch: MicroBatch) -> Estimate:
        weight = step.weight()
        regulariser = step.regularise(weight) if step.regularise is not None else None
        estimate = self(replace(step.sampler, regulariser=regulariser), step.reward, batch, weight)
        return with_facts(estimate, regulariser)

    def state(self) -> dict[str, Any]:
        """Nothing: all that is drawn comes from the step's generator."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""
        del state


def with_facts(estimate: Estimate, regulariser: Regulariser | None) -> Estimate:
    """An estimate that also tells what was regularised."""
    return estimate if regulariser is None else replace(estimate, facts={**estimate.facts, **regulariser.facts()})


def ascend(
    reward: WeightedSum, rollout: Rollout, batch: MicroBatch, weight: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Score pictures and backpropagate ``-sum(weight * (scores - penalty))``, as the micro-batch says.

    Args:
        reward: scores pictures.
        rollout: their pixels, with a graph, and their penalty; without a graph nothing is backpropagated.
        batch: whose B pictures they are.
        weight: one number, or one for each picture.

    Returns:
        Scores (B,) and the rewards that they are made of, by name, all detached.
    """
    components = batch.descend(reward, rollout, batch.prompts, weight)
    return reward.combine(components), components


@dataclass(frozen=True)
class OneBackward:
    """Adds the rewards up, and backpropagates their sum once."""

    def __call__(
        self, reward: WeightedSum, rollout: Rollout, prompts: Sequence[str], weight: float | Tensor
    ) -> dict[str, Tensor]:
        """Score pictures and backpropagate; see :class:`Descent`."""
        components = scored(reward, rollout.pixels, prompts)
        if rollout.pixels.requires_grad:
            scores = reward.combine(components)
            objective = scores if rollout.penalty is None else scores - rollout.penalty
            (-weight * objective).sum().backward()
        return {name: values.detach() for name, values in components.items()}

    def num_passes(self, rollout: Rollout) -> int:
        """One, with the penalty in it."""
        del rollout
        return 1

    def complete(self, parameters: Sequence[nn.Parameter], generator: torch.Generator) -> dict[str, Any]:
        """Sum over processes; there is nothing to draw, and nothing to tell."""
        del generator
        distributed.sum_gradients(parameters)
        return {}


def scored(reward: WeightedSum, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The rewards of pictures by name, each (B,).

    Raises:
        ValueError: scores are of a wrong shape or not finite.
    """
    components = reward.components(pixels, prompts)
    for name, values in components.items():
        check_scores(values, pixels, name, prompts)
    return components


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
