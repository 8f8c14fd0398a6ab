"""The lines of `metrics.jsonl` and `evaluation.jsonl`, as pages and summaries read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from alignprop.runfolder import RunFolder

Record = Mapping[str, Any]
"""One line of `metrics.jsonl` or `evaluation.jsonl`."""

PICTURES = {
    "diversity": "of the pictures of one prompt",
    "feature_diversity": "the same, of what they show",
    "distance": "from the base model's pictures",
    "feature_distance": "the same, of what they show",
    "saturated": "share of black and white values",
}
"""What is measured of the pictures themselves, with a note on each."""

_FIRST_SETS = ("unseen", "train")


def config_of(folder: RunFolder) -> dict[str, Any]:
    """Everything that made the run, as far as it is written."""
    return dict(yaml.safe_load(folder.config.read_text(encoding="utf-8")) if folder.config.exists() else {})


def kept_of(evaluations: Sequence[Record]) -> Record | None:
    """The evaluation whose adapter is kept."""
    return next((record for record in reversed(evaluations) if record["kept"]), None)


def prompt_sets(evaluations: Sequence[Record]) -> list[str]:
    """The names of the sets of prompts, in the order of a page."""
    return in_order(prompts for record in evaluations for prompts in record["sets"])


def in_order(sets: Iterable[str]) -> list[str]:
    """The distinct names, unseen prompts first, training prompts second."""
    names = sorted(set(sets))
    return [
        *(name for name in _FIRST_SETS if name in names),
        *(name for name in names if name not in _FIRST_SETS),
    ]


def scores_of(evaluation: Record, prompts: str) -> dict[str, Record]:
    """The scores of a set, trained ones first; their weighted sum leads where there are several."""
    measured, trained = evaluation["sets"][prompts], evaluation["trained"]
    total = {} if len(trained) == 1 else {_total(trained): measured["reward"]}
    return total | dict(sorted(measured["rewards"].items(), key=lambda item: item[0] not in trained))


def _total(trained: Sequence[str]) -> str:
    return f"weighted sum of {' and '.join(trained)}"


def is_trained(reward: str, evaluation: Record) -> bool:
    """Whether a name of :func:`scores_of` is that of a reward that is trained, or of their sum."""
    return reward in (*evaluation["trained"], _total(evaluation["trained"]))


def measures_of(evaluation: Record, prompts: str) -> dict[str, Record]:
    """The scores of a set, and what was measured of its pictures, which comes without an error."""
    found = evaluation["sets"][prompts]
    pictures = {name: {"mean": found[name], "sem": 0} for name in PICTURES if name in found}
    return {**scores_of(evaluation, prompts), **pictures}
