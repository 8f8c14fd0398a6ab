"""Prompt sources: built-in lists, text and JSONL files, a function or a list, with a held-out part."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

PromptSource: TypeAlias = "str | Path | Sequence[str] | Callable[[], Sequence[str]]"
"""A name of `PROMPT_LISTS`, a `.txt` or `.jsonl` path, `module:function`, a function, or the prompts."""


@dataclass(frozen=True)
class Choice:
    """The reward that a line of a JSONL file chooses for its prompt.

    Attributes:
        reward: A reward's name or `module:attribute`; None for the run's own.
        arguments: Of the reward.
        place: The file and the line, for messages.
    """

    reward: str | None
    arguments: Mapping[str, Any]
    place: str = field(compare=False)

    def resolve(self, name: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The reward and all its arguments, given those of the run's own reward, which hold for that one alone."""
        if self.reward in (None, name):
            return name, {**arguments, **self.arguments}
        assert self.reward is not None
        return self.reward, dict(self.arguments)


@dataclass(frozen=True)
class Prompts:
    """Prompts to train on, and prompts that are only evaluated.

    Attributes:
        train: Prompts to train on.
        unseen: Prompts that are only evaluated.
        choices: The rewards of prompts that have one of their own, by prompt.

    Raises:
        ValueError: There is nothing to train on, a prompt is empty, or one is in both parts.
    """

    train: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    choices: Mapping[str, Choice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("prompts are empty; give at least one to train on.")
        for prompt in self.train + self.unseen:
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"prompts hold {prompt!r}; each must be a string that is not blank.")
        shared = sorted(set(self.train) & set(self.unseen))
        if shared:
            raise ValueError(f"prompts both in training and unseen: {', '.join(shared)}; remove them from one.")


@dataclass(frozen=True)
class PromptList:
    """A row of `PROMPT_LISTS`: text files of the embedded model.

    Attributes:
        summary: What the prompts are.
        train: The file to train on.
        unseen: The file that is only evaluated.
    """

    summary: str
    train: str
    unseen: str | None = None


PROMPT_LISTS = {
    "animals": PromptList("45 simple animals of DDPO and AlignProp; 8 others unseen", "animals", "unseen"),
    "drift": PromptList("4 objects that show whether training for animals spoils the rest", "drift"),
}
"""Prompt lists that have a name."""


def load_prompts(source: PromptSource, unseen: PromptSource | None = None) -> Prompts:
    """Load prompts.

    Args:
        source: What to train on. A text file holds one prompt a line, where blank lines and lines that begin
            with # are skipped. A JSONL file holds objects with a field `prompt`; `reward` (a name) and `arguments`
            (an object), which may be there, choose the prompt's own reward, and other fields are ignored.
        unseen: What is only evaluated; without it, the held-out part of a named list.

    Raises:
        ValueError: The source is missing, malformed or empty, or a prompt is in both parts.
    """
    if unseen is not None:
        held_out = _read(unseen)
    elif isinstance(source, str) and source in PROMPT_LISTS:
        held_out = _read_list(PROMPT_LISTS[source].unseen)
    else:
        held_out = ()
    train = _read(source)
    return Prompts(_texts(train), _texts(held_out), _choices(train + held_out))


def _texts(lines: Sequence[_Line]) -> tuple[str, ...]:
    return tuple(line.prompt for line in lines)


def _choices(lines: Sequence[_Line]) -> dict[str, Choice]:
    """The rewards that lines choose, by prompt.

    Raises:
        ValueError: Two lines choose differently for one prompt.
    """
    choices: dict[str, Choice | None] = {}
    for prompt, choice in lines:
        other = choices.setdefault(prompt, choice)
        if other != choice:
            told = [each.place for each in (other, choice) if each is not None]
            raise ValueError(
                f"{told[-1]}: prompt {prompt!r} has another reward {f'in {told[0]}' if told[1:] else 'elsewhere'}; "
                "change the prompt or take one of them out."
            )
    return {prompt: choice for prompt, choice in choices.items() if choice is not None}


def batch(prompts: Sequence[str], seed: int, position: int, size: int, repeats: int = 1) -> list[str]:
    """Take `size` prompts of an endless shuffled sequence, from a global position on.

    Position p is place p mod N of epoch p // N, and each epoch is a permutation of its own. Nothing but the
    position is remembered, so a resumed run goes on exactly, and ranks take slices of one sequence.

    Args:
        prompts: The N prompts.
        seed: Not negative.
        position: How many prompts were taken before.
        size: How many to take.
        repeats: How often each prompt comes in succession.
    """
    num = len(prompts)
    places = [p // repeats for p in range(position, position + size)]
    epochs = {place // num for place in places}
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num) for epoch in epochs}
    return [prompts[orders[place // num][place % num]] for place in places]


def import_target(target: str, setting: str) -> Any:
    """Import the user's own `module:attribute`; modules in the working directory are found.

    Args:
        target: As in `my_rewards:redness`.
        setting: What the target is for, for the message.

    Raises:
        ValueError: There is no such module or attribute, or importing it fails to import something else.
    """
    module_name, _, attribute = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script, unlike `python -m`, does not look beside the user
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{setting}={target!r} cannot be imported ({error}); run where its module is, or install it."
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"{setting}={target!r}: {module_name} has no {attribute!r}; check the spelling.")
    return getattr(module, attribute)


class _Line(NamedTuple):
    prompt: str
    choice: Choice | None = None


def _read(source: PromptSource) -> tuple[_Line, ...]:
    if callable(source):
        return _lines(source())
    if not isinstance(source, str | Path):
        return _lines(source)
    path = Path(source)
    if source in PROMPT_LISTS:
        lines = _read_list(PROMPT_LISTS[str(source)].train)
    elif path.suffix in _READERS:
        lines = _read_file(path)
    elif ":" in str(source):
        lines = _lines(import_target(str(source), "prompts")())
    else:
        near = difflib.get_close_matches(str(source), PROMPT_LISTS, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"the lists are {', '.join(PROMPT_LISTS)}."
        raise ValueError(f"prompts={str(source)!r} is no list, .txt, .jsonl or module:function; {remedy}")
    if not lines:
        raise ValueError(f"prompts={str(source)!r} holds no prompt.")
    return lines


def _lines(prompts: Sequence[str]) -> tuple[_Line, ...]:
    return tuple(_Line(prompt) for prompt in prompts)


def _read_list(name: str | None) -> tuple[_Line, ...]:
    from alignprop import emoji

    return _lines(emoji.prompts(name)) if name else ()


def _read_file(path: Path) -> tuple[_Line, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"prompts={str(path)!r} cannot be read: {error.strerror}.") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    return _READERS[path.suffix](path, numbered)


def _read_text(path: Path, lines: list[tuple[int, str]]) -> tuple[_Line, ...]:
    return _lines([line for _, line in lines if not line.startswith("#")])


def _read_jsonl(path: Path, lines: list[tuple[int, str]]) -> tuple[_Line, ...]:
    return tuple(_read_row(f"prompts={str(path)!r}, line {number}", line) for number, line in lines)


def _read_row(place: str, line: str) -> _Line:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: no JSON ({error.msg}).") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{place}: needs {{"prompt": "..."}}.')
    reward, arguments = row.get("reward"), row.get("arguments")
    if reward is not None and not isinstance(reward, str):
        raise ValueError(f"{place}: reward={reward!r} needs the name of a reward; call the field otherwise.")
    if arguments is not None and not isinstance(arguments, dict):
        raise ValueError(f'{place}: arguments={arguments!r} needs an object, such as {{"contains": "a hat"}}.')
    if reward is None and arguments is None:
        return _Line(row["prompt"])
    return _Line(row["prompt"], Choice(reward, arguments or {}, place))


_READERS: dict[str, Callable[[Path, list[tuple[int, str]]], tuple[_Line, ...]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
}
