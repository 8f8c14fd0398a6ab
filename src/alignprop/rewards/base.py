"""What a reward is, sums of rewards, and the check of a reward's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from alignprop.rewards.modality import score


class Reward(Protocol):
    """Any callable that scores images; a plain function is enough.

    One that scores videos or sound has an attribute ``modality``, ``"video"`` or ``"audio"``, and gets frames
    (B, F, 3, H, W) in [0, 1] or waveforms (B, C, N) in place of images.
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
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        """Add up `rewards`.

        Args:
            rewards: By name.
            weights: By the same names; a negative weight penalises.

        Raises:
            ValueError: The names differ, or there are none.
        """
        super().__init__()
        if not rewards or rewards.keys() != weights.keys():
            raise ValueError(
                f"rewards ({', '.join(rewards) or 'none'}) and weights ({', '.join(weights) or 'none'}) "
                "need the same names, at least one."
            )
        self.rewards = {name: freeze(reward) for name, reward in rewards.items()}
        self.weights = dict(weights)
        self._modules_to_move = nn.ModuleList(r for r in rewards.values() if isinstance(r, nn.Module))

    def components(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score each reward alone, unweighted: by name, each of shape (B,)."""
        return {name: score(reward, images, prompts) for name, reward in self.rewards.items()}

    def combine(self, components: Mapping[str, Tensor]) -> Tensor:
        """Add up what `components` returned, with the weights."""
        return torch.stack([weight * components[name] for name, weight in self.weights.items()]).sum(0)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image with the weighted sum."""
        return self.combine(self.components(images, prompts))


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
    name = getattr(reward, "__name__", type(reward).__name__)
    return WeightedSum({name: reward}, {name: 1.0})
