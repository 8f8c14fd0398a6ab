"""Prompt sources: built-in lists, text and JSONL files, a function or a list, with a held-out part."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

PromptSource: TypeAlias = "str | Path | Sequence[str] | Callable[[], Sequence[str]]"
"""A name of `PROMPT_LISTS`, a `.txt` or `.jsonl` path, `module:function`, a function, or the prompts."""


@dataclass(frozen=True)
class Prompts:
    """Prompts to train on, and prompts that are only evaluated.

    Raises:
        ValueError: There is nothing to train on, a prompt is empty, or one is in both parts.
    """

    train: tuple[str, ...]
    unseen: tuple[str, ...] = ()

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
            with # are skipped; a JSONL file objects with a field `prompt`, whose other fields are ignored.
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
    return Prompts(_read(source), held_out)


def batch(prompts: Sequence[str], seed: int, position: int, size: int) -> list[str]:
    """Take `size` prompts of an endless shuffled sequence, from a global position on.

    Position p is place p mod N of epoch p // N, and each epoch is a permutation of its own. Nothing but the
    position is remembered, so a resumed run goes on exactly, and ranks take slices of one sequence.

    Args:
        prompts: The N prompts.
        seed: Not negative.
        position: How many prompts were taken before.
        size: How many to take.
    """
    num = len(prompts)
    epochs = range(position // num, (position + size - 1) // num + 1)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num) for epoch in epochs}
    return [prompts[orders[p // num][p % num]] for p in range(position, position + size)]


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


def _read(source: PromptSource) -> tuple[str, ...]:
    if callable(source):
        return tuple(source())
    if not isinstance(source, str | Path):
        return tuple(source)
    path = Path(source)
    if source in PROMPT_LISTS:
        prompts = _read_list(PROMPT_LISTS[str(source)].train)
    elif path.suffix in _READERS:
        prompts = _read_file(path)
    elif ":" in str(source):
        prompts = tuple(import_target(str(source), "prompts")())
    else:
        near = difflib.get_close_matches(str(source), PROMPT_LISTS, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"the lists are {', '.join(PROMPT_LISTS)}."
        raise ValueError(f"prompts={str(source)!r} is no list, .txt, .jsonl or module:function; {remedy}")
    if not prompts:
        raise ValueError(f"prompts={str(source)!r} holds no prompt.")
    return prompts


def _read_list(name: str | None) -> tuple[str, ...]:
    from alignprop import emoji

    return tuple(emoji.prompts(name)) if name else ()


def _read_file(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"prompts={str(path)!r} cannot be read: {error.strerror}.") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    return _READERS[path.suffix](path, numbered)


def _read_text(path: Path, lines: list[tuple[int, str]]) -> tuple[str, ...]:
    return tuple(line for _, line in lines if not line.startswith("#"))


def _read_jsonl(path: Path, lines: list[tuple[int, str]]) -> tuple[str, ...]:
    prompts = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"prompts={str(path)!r}, line {number}: no JSON ({error.msg}).") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'prompts={str(path)!r}, line {number}: needs {{"prompt": "..."}}.')
        prompts.append(row["prompt"])
    return tuple(prompts)


_READERS: dict[str, Callable[[Path, list[tuple[int, str]]], tuple[str, ...]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
}
