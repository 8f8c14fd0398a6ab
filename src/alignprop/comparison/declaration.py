"""What is compared, and `compare.yaml`, which says so and holds a folder to one comparison."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from alignprop.comparison.budget import Budget, read_budget
from alignprop.comparison.methods import Search, Settings, read_search
from alignprop.config import ConfigError
from alignprop.runfolder import write_atomically

_FORMAT = "alignprop-comparison-1"
_LOCK = ".compare.lock"


@dataclass(frozen=True)
class Declaration:
    """A comparison.

    Attributes:
        recipe: its name or path.
        recipe_settings: what the recipe's file says, so that another content is noticed.
        settings: over the recipe's, the same for every method.
        methods: settings of each over those.
        seeds: how many, 0 to ``seeds - 1``.
        budget: of each run.
        evaluations: of each run, beside the base model's.
        search: for settings; None for none.
        rewards: of the recipe with their weights; methods are compared by their sum, whatever they train on.
        budgets: of the methods that go on beyond ``budget``, to learn how much more they need.
        reach: the value of the trained reward to tell the cost of; None to choose it from the outcome.
        command: that was called last.
    """

    recipe: str
    recipe_settings: Mapping[str, Any]
    settings: tuple[str, ...]
    methods: Mapping[str, Settings]
    seeds: int
    budget: Budget
    evaluations: int
    search: Search | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    reach: float | None = None
    command: str = ""

    def budget_of(self, method: str) -> Budget:
        """What each run of a method spends."""
        return self.budgets.get(method, self.budget)

    def reward_of(self, measured: Mapping[str, Any]) -> float:
        """The mean by which methods are compared, of what an evaluation measured on a set of prompts."""
        if not self.rewards:  # comparisons of the first versions, where all trained on the same
            return float(measured["reward"]["mean"])
        return sum(weight * float(measured["rewards"][name]["mean"]) for name, weight in self.rewards.items())

    def document(self) -> dict[str, Any]:
        """The content of `compare.yaml`."""
        search = self.search
        return {
            "format": _FORMAT,
            "command": self.command,
            "recipe": self.recipe,
            "settings": list(self.settings),
            "methods": {name: dict(settings) for name, settings in self.methods.items()},
            "seeds": self.seeds,
            "budget": str(self.budget),
            "budgets": {name: str(budget) for name, budget in self.budgets.items()},
            "evaluations": self.evaluations,
            "reach": self.reach,
            "rewards": dict(self.rewards),
            "search": search
            and {
                "budget": str(search.budget),
                "seed": search.seed,
                "trials": {name: [dict(trial) for trial in trials] for name, trials in search.trials.items()},
            },
            "recipe_settings": copy.deepcopy(dict(self.recipe_settings)),
        }


def declaration_path(folder: Path) -> Path:
    """The file that declares the comparison of a folder."""
    return folder / "compare.yaml"


def read_declaration(folder: Path) -> Declaration:
    """The comparison that a folder holds.

    Raises:
        ValueError: it holds none, or the file cannot be read.
    """
    path = declaration_path(folder)
    if not path.is_file():
        raise ValueError(f"{folder} is no comparison: it has no compare.yaml.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f"{path} is not of this library's format {_FORMAT!r}.")
    return Declaration(
        recipe=data["recipe"],
        recipe_settings=data["recipe_settings"],
        settings=tuple(data["settings"]),
        methods=data["methods"],
        seeds=data["seeds"],
        budget=read_budget("budget", data["budget"]),
        budgets={name: read_budget("budget", text) for name, text in data.get("budgets", {}).items()},
        evaluations=data["evaluations"],
        search=read_search(data["search"]),
        reach=data["reach"],
        rewards=data.get("rewards", {}),
        command=data["command"],
    )


def declare(folder: Path, asked: Declaration) -> Declaration:
    """Write `compare.yaml`, or hold what is asked against the one there; returns what the folder compares now.

    Processes that start together take turns, so that each is held against what the first one has written.

    Raises:
        ConfigError: the folder holds another comparison; more seeds and more methods are no other one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / _LOCK):
        return _declare(folder, asked)


def _declare(folder: Path, asked: Declaration) -> Declaration:
    if declaration_path(folder).exists():
        before = read_declaration(folder)
        if differences := list(_differences(before.document(), asked.document())):
            remedy = "ask for the same (more seeds or methods may be added), or give another folder: --output DIR."
            raise ConfigError([f"{folder} holds another comparison, {'; '.join(differences)}: {remedy}"])
        if asked.reach is None:
            asked = replace(asked, reach=before.reach)
    elif any(path.name != _LOCK for path in folder.iterdir()):
        raise ConfigError([f"{folder} is not empty and no comparison: give another folder, --output DIR."])
    text = yaml.safe_dump(asked.document(), sort_keys=False, allow_unicode=True)
    write_atomically(declaration_path(folder), text)
    return asked


def _differences(before: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """What a second declaration changes, in words."""
    if before["recipe_settings"] != asked["recipe_settings"]:
        same = before["recipe"] == asked["recipe"]
        yield "the recipe's file has changed" if same else f"recipe was {before['recipe']} and is {asked['recipe']}"
    for key in ("settings", "budget", "evaluations"):
        if before[key] != asked[key]:
            yield f"{key} was {_shown(before[key])} and is {_shown(asked[key])}"
    if asked["seeds"] < before["seeds"]:
        yield f"seeds was {before['seeds']} and is {asked['seeds']}"
    for name in before["methods"]:
        then, now = (each.get("budgets", {}).get(name, each["budget"]) for each in (before, asked))
        if then != now and before["budget"] == asked["budget"]:
            yield f"budgets.{name} was {then} and is {now}"
    yield from _method_differences("methods", before["methods"], asked["methods"])
    then, now = before["search"], asked["search"]
    if (then is None) != (now is None):
        yield f"it {'had no' if then is None else 'had a'} search, and {'none' if now is None else 'one'} is asked for"
    elif then is not None and now is not None:
        for key in ("budget", "seed"):
            if then[key] != now[key]:
                yield f"search.{key} was {then[key]} and is {now[key]}"
        yield from _method_differences("search.trials", then["trials"], now["trials"])


def _method_differences(place: str, before: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    for name, settings in before.items():
        if name not in asked:
            if place == "methods":  # told once
                yield f"{name} is left out"
        elif asked[name] != settings:
            yield f"{place}.{name} was {_shown(settings)} and is {_shown(asked[name])}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {inner}" for name, inner in value.items()) + "}"
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
