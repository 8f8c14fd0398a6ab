"""A reward of its own for each prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alignprop.rewards.checkpoints import shared_models
from alignprop.rewards.differentiable import is_differentiable
from alignprop.rewards.modality import modality_of

if TYPE_CHECKING:
    from alignprop.prompts import Choice
    from alignprop.rewards.base import Reward


class PerPrompt(nn.Module):
    """Scores each picture with the reward of its prompt."""

    def __init__(self, rewards: Mapping[str, Reward], default: Reward | None = None) -> None:
        """Assign the rewards.

        Args:
            rewards: By prompt; one object may stand at several.
            default: Of all other prompts; without it they are refused.

        Raises:
            ValueError: There is none, or some score pictures and others something else.
        """
        super().__init__()
        self.by_prompt, self.default = dict(rewards), default
        distinct = {id(reward): reward for reward in (*rewards.values(), default) if reward is not None}
        modalities = {modality_of(reward) for reward in distinct.values()}
        if len(modalities) != 1:
            found = " and ".join(sorted(modalities)) or "nothing"
            raise ValueError(f"rewards per prompt score {found}; give some that all score the same.")
        self.modality = modalities.pop()
        self.differentiable = all(is_differentiable(reward) for reward in distinct.values())
        self._modules_to_move = nn.ModuleList(r for r in distinct.values() if isinstance(r, nn.Module))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image.

        Raises:
            ValueError: A prompt has no reward.
        """
        chosen = [self._reward(prompt) for prompt in prompts]
        parts, order = [], []
        for reward in {id(reward): reward for reward in chosen}.values():
            places = [place for place, other in enumerate(chosen) if other is reward]
            own = reward(images[places], [prompts[place] for place in places])
            if own.shape != (len(places),):
                raise ValueError(f"the reward of prompt {prompts[places[0]]!r} returned shape {tuple(own.shape)}.")
            parts.append(own)
            order += places
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def _reward(self, prompt: str) -> Reward:
        reward = self.by_prompt.get(prompt, self.default)
        if reward is None:
            raise ValueError(f"prompt {prompt!r} has no reward of its own, and there is none for the others; give one.")
        return reward


def load_per_prompt(
    name: str, arguments: Mapping[str, Any], prompts: Sequence[str], choices: Mapping[str, Choice]
) -> PerPrompt:
    """Load what the lines of a prompt file choose.

    Rewards that differ in other arguments than their checkpoint share its weights in memory.

    Args:
        name: The reward of lines that name none, as for `load_reward`; it is only loaded if there are some.
        arguments: Of that reward; a line's own are added and win.
        prompts: All of them.
        choices: By prompt.

    Raises:
        ValueError: A reward cannot be loaded; the message begins with the file and the line.
    """
    from alignprop.rewards import load_reward  # which imports this module

    loaded: dict[str, Reward] = {}
    rewards: dict[str, Reward] = {}
    with shared_models():
        for prompt, choice in choices.items():
            reward, own = choice.resolve(name, arguments)
            key = json.dumps([reward, own], sort_keys=True, default=repr)
            if key not in loaded:
                try:
                    loaded[key] = load_reward(reward, **own)
                except ValueError as error:
                    raise ValueError(f"{choice.place}: {error}") from error
            rewards[prompt] = loaded[key]
        default = load_reward(name, **arguments) if set(prompts) - choices.keys() else None
    return PerPrompt(rewards, default)
