"""The methods to compare: names of estimators, or keys of a file that gives each its settings and trials."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from alignprop.comparison.budget import Budget, read_budget
from alignprop.config import ConfigError, read_overrides
from alignprop.config.errors import suggestion, unknown
from alignprop.config.settings import ESTIMATORS, Config

Settings: TypeAlias = dict[str, Any]
"""Dotted names and values, as ``--set`` takes them."""

RESERVED = (
    "training.seed",
    "training.steps",
    "training.max_images",
    "training.max_seconds",
    "evaluation.every",
    "evaluation.every_images",
    "evaluation.every_seconds",
    "evaluation.seed",
    "run",
)
"""Settings that a comparison gives, the same to every method; the evaluation's seed is the recipe's."""

COMMON = ("prompts", "evaluation")
"""Sections by which methods are measured, so that none has its own."""

_OPEN_SECTIONS = ("rewards", "judges")
"""Sections whose keys are the user's own: a mapping replaces them whole."""


_KEYS = ("methods", "search", "budgets")
"""Of a methods file."""


@dataclass(frozen=True)
class Search:
    """Settings tried for each method before the comparison.

    Attributes:
        budget: of each trial.
        seed: of the trials, which the comparison does not use.
        trials: settings over those of the method, by method, as many for each.
    """

    budget: Budget
    seed: int
    trials: Mapping[str, Sequence[Settings]]


@dataclass(frozen=True)
class MethodsFile:
    """What a methods file says.

    Attributes:
        methods: settings over the recipe's.
        search: None for none.
        budgets: of the methods that go on beyond the budget of all.
    """

    methods: Mapping[str, Settings]
    search: Search | None
    budgets: Mapping[str, Budget] = field(default_factory=dict)


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """Settings in the form that ``--set`` takes."""
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def choose(names: Sequence[str], file: MethodsFile) -> dict[str, Settings]:
    """The settings of the named methods, an estimator's name for its own if nothing else is said.

    Raises:
        ConfigError: a name is neither in the file nor an estimator, or is given twice.
    """
    problems = [
        unknown("--methods", name, (*file.methods, *ESTIMATORS), f"give keys of --methods-file or {_estimators()}.")
        for name in names
        if name not in file.methods and name not in ESTIMATORS
    ]
    problems += [
        f"--methods names {name} twice; name it once." for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if not names:
        problems.append(
            f"--methods needs names, as in --methods alignprop,ddpo: keys of --methods-file or {_estimators()}."
        )
    if problems:
        raise ConfigError(problems)
    own = {name: {"estimator.name": name} if name in ESTIMATORS else {} for name in names}
    return {name: {**own[name], **file.methods.get(name, {})} for name in names}


def _estimators() -> str:
    return f"estimators ({', '.join(ESTIMATORS)})"


def trials_of(search: Search | None, names: Sequence[str], num_seeds: int) -> Search | None:
    """The search of the named methods alone, checked to be fair and apart from the comparison's seeds.

    Raises:
        ConfigError: methods have different numbers of trials, or the seed is one of the comparison's.
    """
    if search is None:
        return None
    counts = {name: len(search.trials.get(name, ())) for name in names}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ConfigError([f"search.trials needs as many trials for each method that is compared, and {told}."])
    if not all(counts.values()):
        return None
    if search.seed < num_seeds:
        problem = f"search.seed={search.seed} is one of the comparison's seeds, 0 to {num_seeds - 1}"
        raise ConfigError([f"{problem}; choose one above them, as in seed: 100."])
    return Search(search.budget, search.seed, {name: tuple(search.trials[name]) for name in names})


def read_methods(path: Path | None) -> MethodsFile:
    """Read a methods file; None reads as an empty one.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    if path is None:
        return MethodsFile({}, None)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"--methods-file={path} cannot be read: {error}"]) from error
    problems = list(_problems(data))
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    methods = {str(name): dotted(settings or {}) for name, settings in (data.get("methods") or {}).items()}
    budgets = {str(name): read_budget(f"budgets.{name}", text) for name, text in (data.get("budgets") or {}).items()}
    return MethodsFile(methods, read_search(data.get("search")), budgets)


def read_search(data: Mapping[str, Any] | None) -> Search | None:
    """The search that a sound mapping describes."""
    if not data:
        return None
    trials = {str(name): tuple(dotted(trial or {}) for trial in rows) for name, rows in data["trials"].items()}
    return Search(read_budget("search.budget", data["budget"]), data.get("seed", 100), trials)


def dotted(settings: Mapping[str, Any]) -> Settings:
    """Settings by dotted names, their texts read as YAML 1.2 does; ``training: {batch_size: 2}`` is two of them."""
    flat: Settings = {}
    for name, value in settings.items():
        inside = name in Config.model_fields and name not in _OPEN_SECTIONS and isinstance(value, Mapping)
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if inside else {str(name): value}
    return {name: _number(value) for name, value in flat.items()}


def _number(value: Any) -> Any:
    """PyYAML reads 1e-3 as a text."""
    return read_overrides([f"value={value}"])["value"] if isinstance(value, str) and value[:1].isdigit() else value


def reserved(settings: Mapping[str, Any], where: str) -> list[str]:
    """A sentence for each setting that a comparison gives itself."""
    return [
        f"{where}{name} is set by the comparison, the same for every method; leave it out."
        for name in settings
        if name in RESERVED or name.startswith("run.")
    ]


def uncommon(settings: Mapping[str, Any], where: str) -> list[str]:
    """A sentence for each setting of a method or a trial by which methods would be measured differently."""
    return [
        f"{where}{name} is to be the same for every method, which are measured by it: give it with --set."
        for name in settings
        if name.split(".")[0] in COMMON and name not in RESERVED
    ]


def _problems(data: Any) -> Iterator[str]:
    """What is wrong with the form of a methods file."""
    if not isinstance(data, dict):
        yield "needs the keys methods or search, as in `alignprop compare --help`."
        return
    for key in data:
        if key not in _KEYS:
            yield f"{key} is no key of a methods file; {suggestion(str(key), _KEYS) or 'leave it out.'}"
    methods = data.get("methods") or {}
    if not isinstance(methods, dict):
        yield "methods needs a mapping from a method's name to its settings."
        return
    for name, settings in methods.items():
        if not re.fullmatch(r"\w[\w.+-]*", str(name)):
            yield f"methods.{name} names a folder: use letters, digits, '-', '_', '.' and '+'."
        if not isinstance(settings, dict | None):
            yield f"methods.{name} needs a mapping of settings, as in {{optimizer.learning_rate: 1.0e-3}}."
    if data.get("search") is not None:
        yield from _search_problems(data["search"])
    yield from _budget_problems(data.get("budgets") or {})


def _budget_problems(budgets: Any) -> Iterator[str]:
    if not isinstance(budgets, dict):
        yield "budgets needs a mapping from a method's name to a budget, as in {ddpo: images=6400}."
        return
    for name, text in budgets.items():
        try:
            read_budget(f"budgets.{name}", text)
        except ValueError as error:
            yield str(error)


def _search_problems(search: Any) -> Iterator[str]:
    known = ("budget", "seed", "trials")
    if not isinstance(search, dict) or not {"budget", "trials"} <= set(search):
        yield "search needs the keys budget and trials."
        return
    for key in search:
        if key not in known:
            yield f"search.{key} is none of {', '.join(known)}; {suggestion(str(key), known) or 'leave it out.'}"
    try:
        read_budget("search.budget", search["budget"])
    except ValueError as error:
        yield str(error)
    seed, trials = search.get("seed", 100), search["trials"]
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        yield f"search.seed={seed} needs a whole number, at least 0."
    if not isinstance(trials, dict):
        yield "search.trials needs a mapping from a method's name to a list of settings."
        return
    for name, rows in trials.items():
        if not isinstance(rows, list) or not all(isinstance(row, dict | None) for row in rows):
            yield f"search.trials.{name} needs a list of settings, as in [{{optimizer.learning_rate: 1.0e-3}}]."
