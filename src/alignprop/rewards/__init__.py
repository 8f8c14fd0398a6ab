"""Rewards: named ones, the user's own, and sums of them."""

from __future__ import annotations

import difflib
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from alignprop.prompts import import_target
from alignprop.rewards.augmented import Augmented
from alignprop.rewards.base import Reward, WeightedSum, as_weighted_sum, check_scores, freeze
from alignprop.rewards.checkpointed import Checkpointed
from alignprop.rewards.clamped import Clamped
from alignprop.rewards.differentiable import is_differentiable
from alignprop.rewards.modality import OnFrames, modality_of, score, stills
from alignprop.rewards.normalised import Normalised
from alignprop.rewards.per_prompt import PerPrompt, load_per_prompt


@dataclass(frozen=True)
class RewardCard:
    """A row of `REWARDS`.

    Attributes:
        target: `module:attribute`, imported when the reward is loaded.
        summary: What it measures.
        value_range: Its scores and their unit, in words.
        differentiable: Whether gradient reaches the pixels.
        downloads: What it gets from the hub when it is first used; empty if all is in the package.
        weights: How many numbers its model has been trained to, in words; empty if it has none.
        license: Of the model, or of our code where there is none.
    """

    target: str
    summary: str
    value_range: str
    differentiable: bool = True
    downloads: str = ""
    weights: str = ""
    license: str = "Apache-2.0"


REWARDS = {
    "emoji-aesthetic": RewardCard(
        "alignprop.rewards.emoji:EmojiAesthetic",
        "rating of the drawing, by the embedded head",
        "1 to 10",
        weights="4.9 M",
    ),
    "emoji-clip": RewardCard(
        "alignprop.rewards.emoji:EmojiClip",
        "agreement with the prompt, by the embedded CLIP",
        "cosine, -1 to 1",
        weights="3.8 M",
    ),
    "emoji-style": RewardCard(
        "alignprop.rewards.emoji_style:EmojiStyle",
        "a style of drawing or its absence, by the embedded classifier",
        "log-probability, below 0",
        weights="4.1 M",
    ),
    "emoji-names": RewardCard(
        "alignprop.rewards.emoji_names:EmojiNames",
        "shows what the prompt names, by the embedded namer",
        "log-probability, below 0",
        weights="0.4 M",
    ),
    "emoji-rating": RewardCard(
        "alignprop.rewards.emoji_rating:EmojiRating",
        "a second rating of the drawing, by the embedded rater",
        "1 to 10",
        weights="0.019 M",
    ),
    "laion-aesthetic": RewardCard(
        "alignprop.rewards.laion_aesthetic:LaionAesthetic",
        "rating of the picture, by LAION's aesthetic predictor v2",
        "about 1 to 10",
        downloads="1.7 GB (CLIP ViT-L/14)",
        weights="305 M",
        license="Apache-2.0; MIT (CLIP)",
    ),
    "clip-score": RewardCard(
        "alignprop.rewards.clip_score:ClipScore",
        "agreement with the prompt, by any CLIP",
        "cosine, -1 to 1",
        downloads="1.7 GB (CLIP ViT-L/14)",
        weights="428 M",
        license="MIT (default model)",
    ),
    "pickscore": RewardCard(
        "alignprop.rewards.pickscore:PickScore",
        "human preference, by PickScore",
        "about 20",
        downloads="3.9 GB (CLIP ViT-H/14)",
        weights="986 M",
        license="see the model card",
    ),
    "hpsv2": RewardCard(
        "alignprop.rewards.hpsv2:hpsv2",
        "human preference, by HPS v2",
        "cosine, about 0.2 to 0.3",
        downloads="2.0 GB (CLIP ViT-H/14)",
        weights="986 M",
    ),
    "hpsv2.1": RewardCard(
        "alignprop.rewards.hpsv2:hpsv2_1",
        "human preference, by HPS v2.1",
        "cosine, about 0.2 to 0.4",
        downloads="2.0 GB (CLIP ViT-H/14)",
        weights="986 M",
    ),
    "image-reward": RewardCard(
        "alignprop.rewards.image_reward:ImageReward",
        "human preference, by ImageReward",
        "standard deviations, about -2 to 2",
        downloads="1.8 GB (BLIP ViT-L/16)",
        weights="446 M",
    ),
    "image-classifier": RewardCard(
        "alignprop.rewards.classifier:ImageClassifier",
        "a label or its absence, by any image classifier",
        "log-probability, below 0",
        downloads="the model that is named",
        weights="the model's",
        license="the model's",
    ),
    "objects": RewardCard(
        "alignprop.rewards.objects:Objects",
        "contains X, no X or n X, by an open-vocabulary detector",
        "log-probability, below 0",
        downloads="0.6 GB (OWLv2 base)",
        weights="155 M",
        license="Apache-2.0 (default model)",
    ),
    "vlm-question": RewardCard(
        "alignprop.rewards.vlm:VlmQuestion",
        "answer yes to a question about the picture, by a LLaVA",
        "log-probability, below 0",
        downloads="the model that is named",
        weights="the model's",
        license="the model's",
    ),
    "jpeg-compressibility": RewardCard(
        "alignprop.rewards.jpeg:compressibility", "minus the size of a JPEG file, estimated", "kB, below 0"
    ),
    "jpeg-incompressibility": RewardCard(
        "alignprop.rewards.jpeg:incompressibility", "size of a JPEG file, estimated", "kB, above 0"
    ),
    "brightness": RewardCard("alignprop.rewards.colour:brightness", "mean luma", "0 to 1"),
    "redness": RewardCard("alignprop.rewards.colour:redness", "red minus mean of green and blue", "-1 to 1"),
    "jpeg-size": RewardCard(
        "alignprop.rewards.jpeg_size:JpegFileSize", "minus the size of the real JPEG file", "kB, below 0", False
    ),
    "command": RewardCard("alignprop.rewards.command:Command", "what a program of yours says", "its own", False),
    "http": RewardCard("alignprop.rewards.http_scorer:HttpScorer", "what a server of yours says", "its own", False),
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
    reward = _apply(find_reward(name), name, arguments)
    if not callable(reward):
        raise ValueError(f"reward={name!r} is no callable but {reward!r}; give a function of (images, prompts).")
    return freeze(reward)


def find_reward(name: str) -> Any:
    """What a name stands for: a reward, or the class or function that builds one.

    Args:
        name: As for `load_reward`.

    Raises:
        ValueError: There is no such reward.
    """
    if name not in REWARDS and ":" not in name:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"the rewards are {', '.join(REWARDS)}."
        raise ValueError(f"reward={name!r} is no named reward and no module:attribute; {remedy}")
    return import_target(REWARDS[name].target if name in REWARDS else name, "reward")


def arguments_of(name: str) -> dict[str, inspect.Parameter]:
    """The arguments that a reward takes, by name; none if it is built already.

    Args:
        name: As for `load_reward`.

    Raises:
        ValueError: There is no such reward.
    """
    found = find_reward(name)
    if isinstance(found, torch.nn.Module) or not callable(found):
        return {}
    parameters = inspect.signature(found).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in ("images", "prompts")}


def explanation_of(name: str) -> str:
    """The docstrings of a reward and of its constructor.

    Args:
        name: As for `load_reward`.

    Raises:
        ValueError: There is no such reward.
    """
    found = find_reward(name)
    if isinstance(found, type):
        texts = [found.__doc__, found.__dict__.get("__init__", found).__doc__]
    else:
        texts = [found.__doc__ if callable(found) else None]
    explained = dict.fromkeys(inspect.cleandoc(text) for text in texts if text)
    return "\n\n".join(explained) or "It has no docstring."


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
    "Augmented",
    "Checkpointed",
    "Clamped",
    "Normalised",
    "OnFrames",
    "PerPrompt",
    "Reward",
    "RewardCard",
    "WeightedSum",
    "arguments_of",
    "as_weighted_sum",
    "check_scores",
    "explanation_of",
    "find_reward",
    "is_differentiable",
    "load_per_prompt",
    "load_reward",
    "modality_of",
    "score",
    "stills",
]
