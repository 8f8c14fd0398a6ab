"""Rewards: named ones, the user's own, and sums of them."""

from __future__ import annotations

import difflib
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from alignprop.prompts import import_target
from alignprop.rewards.base import Reward, WeightedSum, as_weighted_sum, check_scores, freeze
from alignprop.rewards.modality import OnFrames, modality_of, score, stills


@dataclass(frozen=True)
class RewardCard:
    """A row of `REWARDS`.

    Attributes:
        target: `module:attribute`, imported when the reward is loaded.
        summary: What it measures.
        value_range: Its scores and their unit, in words.
        differentiable: Whether gradient reaches the pixels.
        downloads: What it gets from the hub when it is first used; empty if all is in the package.
    """

    target: str
    summary: str
    value_range: str
    differentiable: bool = True
    downloads: str = ""


REWARDS = {
    "emoji-aesthetic": RewardCard(
        "alignprop.rewards.emoji:EmojiAesthetic", "rating of the drawing, by the embedded head", "1 to 10"
    ),
    "emoji-clip": RewardCard(
        "alignprop.rewards.emoji:EmojiClip",
        "agreement with the prompt, by the embedded CLIP",
        "cosine, -1 to 1",
    ),
    "laion-aesthetic": RewardCard(
        "alignprop.rewards.laion_aesthetic:LaionAesthetic",
        "rating of the picture, by LAION's aesthetic predictor v2",
        "about 1 to 10",
        downloads="1.7 GB (CLIP ViT-L/14)",
    ),
    "clip-score": RewardCard(
        "alignprop.rewards.clip_score:ClipScore",
        "agreement with the prompt, by any CLIP",
        "cosine, -1 to 1",
        downloads="1.7 GB (CLIP ViT-L/14)",
    ),
    "pickscore": RewardCard(
        "alignprop.rewards.pickscore:PickScore",
        "human preference, by PickScore",
        "about 20",
        downloads="3.9 GB (CLIP ViT-H/14)",
    ),
    "hpsv2": RewardCard(
        "alignprop.rewards.hpsv2:hpsv2",
        "human preference, by HPS v2",
        "cosine, about 0.2 to 0.3",
        downloads="2.0 GB (CLIP ViT-H/14)",
    ),
    "hpsv2.1": RewardCard(
        "alignprop.rewards.hpsv2:hpsv2_1",
        "human preference, by HPS v2.1",
        "cosine, about 0.2 to 0.4",
        downloads="2.0 GB (CLIP ViT-H/14)",
    ),
    "image-reward": RewardCard(
        "alignprop.rewards.image_reward:ImageReward",
        "human preference, by ImageReward",
        "standard deviations, about -2 to 2",
        downloads="1.8 GB (BLIP ViT-L/16)",
    ),
    "image-classifier": RewardCard(
        "alignprop.rewards.classifier:ImageClassifier",
        "a label or its absence, by any image classifier",
        "log-probability, below 0",
        downloads="the model that is named",
    ),
    "objects": RewardCard(
        "alignprop.rewards.objects:Objects",
        "contains X, no X or n X, by an open-vocabulary detector",
        "log-probability, below 0",
        downloads="0.6 GB (OWLv2 base)",
    ),
    "vlm-question": RewardCard(
        "alignprop.rewards.vlm:VlmQuestion",
        "answer yes to a question about the picture, by a LLaVA",
        "log-probability, below 0",
        downloads="the model that is named",
    ),
    "jpeg-compressibility": RewardCard(
        "alignprop.rewards.jpeg:compressibility", "minus the size of a JPEG file, estimated", "kB, below 0"
    ),
    "jpeg-incompressibility": RewardCard(
        "alignprop.rewards.jpeg:incompressibility", "size of a JPEG file, estimated", "kB, above 0"
    ),
    "brightness": RewardCard("alignprop.rewards.colour:brightness", "mean luma", "0 to 1"),
    "redness": RewardCard("alignprop.rewards.colour:redness", "red minus mean of green and blue", "-1 to 1"),
}
"""Rewards that have a name: one row and one file each."""


def load_reward(name: str, **arguments: Any) -> Reward:
    """Load a named reward or the user's own.

    Args:
        name: A name of `REWARDS`, or `module:attribute` of a function of (images, prompts), a module, or a
            class or function that builds a reward.
        arguments: Given to the class or the building function, or to the reward function at every call.

    Raises:
        ValueError: There is no such reward, or it does not take the arguments.
    """
    if name not in REWARDS and ":" not in name:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"the rewards are {', '.join(REWARDS)}."
        raise ValueError(f"reward={name!r} is no named reward and no module:attribute; {remedy}")
    found = import_target(REWARDS[name].target if name in REWARDS else name, "reward")
    reward = _apply(found, name, arguments)
    if not callable(reward):
        raise ValueError(f"reward={name!r} is no callable but {reward!r}; give a function of (images, prompts).")
    return freeze(reward)


def _apply(found: Any, name: str, arguments: dict[str, Any]) -> Any:
    """Bind the arguments if `found` then still needs (images, prompts), and call it if it needs nothing."""
    if isinstance(found, torch.nn.Module) or not callable(found):
        if arguments:
            raise ValueError(f"reward={name!r} is built already and takes no arguments; leave them out.")
        return found
    signature = inspect.signature(found)
    unknown = arguments.keys() - signature.parameters.keys()
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        raise ValueError(f"reward={name!r} takes no {', '.join(sorted(unknown))}; its arguments: {signature}.")
    required = [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    needed = [parameter for parameter in required if parameter not in arguments]
    if not needed:
        return found(**arguments)
    if len(needed) != 2 or isinstance(found, type):
        raise ValueError(f"reward={name!r} needs {', '.join(needed)}; give them as arguments.")
    return functools.partial(found, **arguments) if arguments else found


__all__ = [
    "REWARDS",
    "OnFrames",
    "Reward",
    "RewardCard",
    "WeightedSum",
    "as_weighted_sum",
    "check_scores",
    "load_reward",
    "modality_of",
    "score",
    "stills",
]
