"""What a reward is, sums of rewards, and the check of a reward's scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from alignprop.rewards.augmented import Augmented
from alignprop.rewards.checkpointed import Checkpointed
from alignprop.rewards.clamped import Clamped
from alignprop.rewards.modality import score
from alignprop.rewards.normalised import Normalised


class Reward(Protocol):
    """Any callable that scores images; a plain function is enough.

    One that scores videos or sound has an attribute ``modality``, ``"video"`` or ``"audio"``, and gets frames
    (B, F, 3, H, W) in [0, 1] or waveforms (B, C, N) in place of images.

    One whose scores have no gradient has an attribute ``differentiable = False``: it can be watched, and trained on
    by estimators that need none. One whose model was published with an image processor may have a method
    ``reference_pixels(images)``, which returns what the model is given and what the image processor gives it, for
    the reward doctor to compare.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str], /) -> Tensor:
        """Score each image.

        Args:
            images: Floating point, shape (B, 3, H, W), in [0, 1], carrying gradient.
            prompts: B strings.

        Returns:
            Shape (B,), higher is better.
        """
        ...


class WeightedSum(nn.Module):
    """Rewards added up with weights: a reward itself, whose parts can be logged.

    Rewards that are modules are frozen (no parameter gradient, evaluation mode) and move with `.to(device)`.

    A reward may come in wrappers, each of them optional, in this order:
    ``Normalised(Clamped(Augmented(Checkpointed(reward))))``. The outer two change what is optimised, and the scores
    of the parts stay in the reward's own unit; the inner two change how scores are computed in training.

    Attributes:
        rewards: by name, out of their wrappers: what evaluation measures.
        weights: by name.
        clamped: those that have a target, by name.
        normalised: those with running statistics, by name.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        """Add up `rewards`.

        Args:
            rewards: By name.
            weights: By the same names; a negative weight penalises.

        Raises:
            ValueError: The names differ, or there are none, or a reward's wrappers are in another order.
        """
        super().__init__()
        if not rewards or rewards.keys() != weights.keys():
            raise ValueError(
                f"rewards ({', '.join(rewards) or 'none'}) and weights ({', '.join(weights) or 'none'}) "
                "need the same names, at least one."
            )
        self.weights = dict(weights)
        self.rewards: dict[str, Reward] = {}
        self.clamped: dict[str, Clamped] = {}
        self.normalised: dict[str, Normalised] = {}
        self._scored: dict[str, Reward] = {}
        for name, reward in rewards.items():
            self._add(name, freeze(reward))
        self._modules_to_move = nn.ModuleList(r for r in rewards.values() if isinstance(r, nn.Module))

    def _add(self, name: str, reward: Reward) -> None:
        if isinstance(reward, Normalised):
            self.normalised[name], reward = reward, reward.reward
        if isinstance(reward, Clamped):
            self.clamped[name], reward = reward, reward.reward
        self._scored[name], plain = reward, out_of_wrappers(reward, Augmented, Checkpointed)
        within = plain.modules() if isinstance(plain, nn.Module) else ()
        misplaced = [type(module).__name__ for module in within if isinstance(module, (Normalised, Clamped, Augmented))]
        if misplaced:
            raise ValueError(
                f"reward {name!r} has {misplaced[0]} in another wrapper than it goes into; the order is "
                "Normalised(Clamped(Augmented(Checkpointed(reward))))."
            )
        self.rewards[name] = plain

    @property
    def is_shaped(self) -> bool:
        """Whether more than the weighted sum of the scores is optimised: one of them is clamped or normalised."""
        return bool(self.clamped or self.normalised)

    @property
    def terms(self) -> dict[str, dict[str, Any]]:
        """What is optimised, in the words of a recipe."""
        return {
            name: {
                "weight": weight,
                "clamp_above": self.clamped[name].above if name in self.clamped else None,
                "normalise": name in self.normalised,
            }
            for name, weight in self.weights.items()
        }

    def components(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score each reward alone, in its own unit: by name, each of shape (B,)."""
        return {name: self.component(name, images, prompts) for name in self._scored}

    def component(self, name: str, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score one of the rewards, in its own unit: (B,)."""
        return score(self._scored[name], images, prompts)

    def combine(self, components: Mapping[str, Tensor]) -> Tensor:
        """What is optimised, given what `components` returned: clamped, normalised, and added up with the weights."""
        return self.add_up({name: self._shaped(name, components[name]) for name in self.weights})

    def term(self, name: str, scores: Tensor) -> Tensor:
        """What one of the rewards adds to what is optimised, given its scores (B,)."""
        return self.weights[name] * self._shaped(name, scores)

    def clamp(self, components: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The components, those that have a target up to it."""
        return {name: self._clamped(name, components[name]) for name in self.weights}

    def _clamped(self, name: str, scores: Tensor) -> Tensor:
        return self.clamped[name].clamp(scores) if name in self.clamped else scores

    def _shaped(self, name: str, scores: Tensor) -> Tensor:
        clamped = self._clamped(name, scores)
        return self.normalised[name].normalise(clamped) if name in self.normalised else clamped

    def add_up(self, components: Mapping[str, Tensor]) -> Tensor:
        """The components added up with the weights."""
        return torch.stack([weight * components[name] for name, weight in self.weights.items()]).sum(0)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image with what is optimised."""
        return self.combine(self.components(images, prompts))

    @contextmanager
    def views_of(self, seeds: Sequence[int]) -> Iterator[None]:
        """Draw the views of augmented rewards from these seeds, one a picture, inside the context."""
        augmented = [module for module in self.modules() if isinstance(module, Augmented)]
        for module in augmented:
            module.seeds = seeds
        try:
            yield
        finally:
            for module in augmented:
                module.seeds = None

    @property
    def needs_statistics(self) -> bool:
        """Whether a normalised reward has seen no scores yet."""
        return any(not normalised.num_updates for normalised in self.normalised.values())

    def observe(self, components: Mapping[str, Tensor]) -> None:
        """Take the components of a whole step into the running statistics."""
        for name, normalised in self.normalised.items():
            normalised.observe(components[name])

    def state(self) -> dict[str, Any]:
        """The running statistics, for a checkpoint."""
        return {name: normalised.state() for name, normalised in self.normalised.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; rewards that it does not know begin anew."""
        for name in self.normalised.keys() & state.keys():
            self.normalised[name].load_state(state[name])


def out_of_wrappers(reward: Reward, *wrappers: type[Normalised | Clamped | Augmented | Checkpointed]) -> Reward:
    """The reward within wrappers of some kinds, of which any number may be around it."""
    while isinstance(reward, wrappers):
        reward = reward.reward
    return reward


def freeze(reward: Reward) -> Reward:
    """Give the parameters of a reward that is a module no gradient, and set it to evaluation mode."""
    if isinstance(reward, nn.Module):
        reward.requires_grad_(False).eval()
    return reward


def check_scores(scores: Tensor, images: Tensor, name: str, prompts: Sequence[str] = ()) -> None:
    """Refuse scores that cannot train; costs no backward pass.

    Args:
        scores: What the reward returned.
        images: What it was given; gradient is only asked for if they carry some.
        name: The reward's name, for the message.
        prompts: What it was given, for the message.

    Raises:
        ValueError: The scores are no float tensor of shape (B,), not finite, or cut off from the pixels.
    """
    batch = len(images)
    if prompts and len(prompts) != batch:
        raise ValueError(f"{batch} images were made for {len(prompts)} prompts: one of each is needed.")
    if not isinstance(scores, Tensor):
        raise ValueError(f"reward {name!r} returned {scores!r}; return a tensor of shape ({batch},).")
    if scores.shape != (batch,):
        raise ValueError(f"reward {name!r} returned shape {tuple(scores.shape)}; it must be ({batch},).")
    if not scores.is_floating_point():
        raise ValueError(f"reward {name!r} returned {scores.dtype}; return floating point scores.")
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        culprits = ", ".join(f"{scores[i].item()} for {prompts[i] if prompts else f'image {i}'!r}" for i in bad)
        raise ValueError(f"reward {name!r} is not finite: {culprits}.")
    if images.requires_grad and not _depends(scores, images):
        raise ValueError(
            f"reward {name!r} gives no gradient to the pixels: compute it in torch from `images`, "
            "without detach, no_grad, numpy or Pillow."
        )


def _depends(scores: Tensor, images: Tensor) -> bool:
    """Whether the autograd graph of `scores` reaches `images`; it never walks past them into the rollout."""
    target, seen = get_gradient_edge(images).node, set[Node]()
    stack = [scores.grad_fn]
    while stack:
        node = stack.pop()
        if node is target:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return False


def as_weighted_sum(reward: Reward) -> WeightedSum:
    """A reward as a sum of one, named after its function or class, unless it is a weighted sum already."""
    if isinstance(reward, WeightedSum):
        return reward
    plain = out_of_wrappers(reward, Normalised, Clamped, Augmented, Checkpointed)
    name = getattr(plain, "__name__", type(plain).__name__)
    return WeightedSum({name: reward}, {name: 1.0})
