"""The runs of a comparison: where each is, what it is trained with, and what has become of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignprop.comparison.budget import Budget
from alignprop.comparison.declaration import Declaration
from alignprop.comparison.methods import Settings, overrides
from alignprop.config import Config, ConfigError, load_config, read_config
from alignprop.runfolder import RunFolder, write_atomically

_ANY_SEED = {"training.seed": None}


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Attributes:
        method: its name.
        part: what of the method it is, ``seed 3`` or ``trial 1``.
        folder: of the run.
        settings: over the recipe's, those of the budget and the seed included.
        budget: that it spends.
    """

    method: str
    part: str
    folder: Path
    settings: Settings
    budget: Budget

    @property
    def is_probed(self) -> bool:
        """Whether it is the first run with its settings."""
        return self.part == "seed 0" or self.part.startswith("trial")

    def is_like(self, other: Job) -> bool:
        """Whether another run has the same settings, but for the seed."""
        return self.method == other.method and {**self.settings, **_ANY_SEED} == {**other.settings, **_ANY_SEED}

    @property
    def lock(self) -> Path:
        """The claim on it, beside its folder."""
        return self.folder.with_name(f".{self.folder.name}.lock")

    @property
    def failure(self) -> str | None:
        """Why it could not be trained to the end."""
        path = self.folder / "failure.json"
        return str(json.loads(path.read_text(encoding="utf-8"))["reason"]) if path.exists() else None

    def fail(self, reason: str) -> None:
        """Record that it cannot be trained to the end."""
        write_atomically(self.folder / "failure.json", json.dumps({"reason": reason}) + "\n")

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """What has been measured so far."""
        return RunFolder(self.folder).evaluations.read()

    @property
    def is_finished(self) -> bool:
        """Whether it has spent its budget and been evaluated then."""
        lines = self.evaluations
        return bool(lines) and self.budget.is_spent(lines[-1])

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to do."""
        return self.is_finished or self.failure is not None


def trial_jobs(declaration: Declaration, folder: Path, method: str) -> list[Job]:
    """The trials of a method, in the order of the search."""
    search = declaration.search
    if search is None:
        return []
    base = _base(declaration, method)
    fixed = {**search.budget.settings(1), "training.seed": search.seed}
    return [
        Job(method, f"trial {i}", folder / "search" / method / f"trial-{i}", {**base, **trial, **fixed}, search.budget)
        for i, trial in enumerate(search.trials[method])
    ]


def seed_jobs(declaration: Declaration, folder: Path, method: str, chosen: Mapping[str, Any]) -> list[Job]:
    """The runs of a method, with the settings that its search has chosen."""
    budget = declaration.budget_of(method)
    base = {**_base(declaration, method), **chosen, **budget.settings(declaration.evaluations)}
    return [
        Job(method, f"seed {i}", folder / "runs" / method / f"seed-{i}", {**base, "training.seed": i}, budget)
        for i in range(declaration.seeds)
    ]


def _base(declaration: Declaration, method: str) -> Settings:
    """A method's settings, where the recipe's arguments of another estimator are left out."""
    settings = dict(declaration.methods[method])
    recipe = declaration.recipe_settings.get("estimator")
    if isinstance(recipe, Mapping) and recipe.get("arguments"):
        own = recipe.get("name", "alignprop")
        if settings.get("estimator.name", own) != own:
            return {"estimator.arguments": {}, **settings}
    return settings


def job_config(declaration: Declaration, job: Job) -> Config:
    """The configuration of a run.

    Raises:
        ConfigError: the settings do not fit.
    """
    return load_config(declaration.recipe, [*declaration.settings, *overrides(job.settings)])


def check_settings(declaration: Declaration, job: Job) -> None:
    """Check that what there is of a run was trained with its settings.

    Raises:
        ConfigError: it was not: the search has another winner, or this version of the library other defaults.
    """
    path = RunFolder(job.folder).config
    if not path.exists():
        return
    then, now = (
        config.model_dump(mode="json", exclude={"run"}) for config in (read_config(path), job_config(declaration, job))
    )
    if changed := list(_changed(then, now)):
        told = "; ".join(
            f"{name} was {json.dumps(before)} and is {json.dumps(after)}" for name, before, after in changed
        )
        raise ConfigError([f"{job.folder} was trained with other settings, {told}: delete it, to train it again."])


def _changed(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The settings in which two configurations differ, with both values."""
    for name in {**then, **now}:
        before, after = then.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changed(before, after, f"{prefix}{name}.")
        elif before != after:
            yield prefix + name, before, after


def check(declaration: Declaration, folder: Path) -> dict[str, float]:
    """Check the settings of every method and trial before anything heavy is loaded.

    Returns:
        The rewards of the recipe with their weights, by which methods are compared.

    Raises:
        ConfigError: with all that is wrong, each with its method unless it is wrong for all of them.
    """
    found: dict[str, list[str]] = {}
    measured: list[tuple[str, set[str]]] = []
    samples = list(_samples(declaration, folder))
    for name, job in samples:
        try:
            config = job_config(declaration, job)
            problems = list(_unsuited(config, searched=declaration.search is not None))
            measured.append((name, {*config.rewards, *config.judges}))
        except ConfigError as error:
            problems = error.problems
        for problem in problems:
            found.setdefault(problem, []).append(name)
    if found:
        everywhere = len(samples)
        raise ConfigError(
            [
                problem if len(names) == everywhere else f"{name}: {problem}"
                for problem, names in found.items()
                for name in (names[:1] if len(names) == everywhere else names)
            ]
        )
    rewards = {
        name: term.weight for name, term in load_config(declaration.recipe, declaration.settings).rewards.items()
    }
    if problems := [
        f"{name}: {reward}, by which methods are compared, is none of its rewards and judges: add it to the judges."
        for name, known in measured
        for reward in rewards
        if reward not in known
    ]:
        raise ConfigError(problems)
    return rewards


def _samples(declaration: Declaration, folder: Path) -> Iterator[tuple[str, Job]]:
    """A run of each method, and each trial."""
    for method in declaration.methods:
        trials = trial_jobs(declaration, folder, method)
        yield from ((f"{method}, {job.part}", job) for job in trials)
        if not trials:
            yield method, seed_jobs(declaration, folder, method, {})[0]


def _unsuited(config: Config, *, searched: bool) -> Iterator[str]:
    """What is sound in a recipe and cannot be compared."""
    from alignprop.prompts import load_prompts

    schedule = config.optimizer.schedule
    if not schedule.startswith("constant"):
        yield (
            f"optimizer.schedule={schedule} follows the number of steps, which a budget does not fix: "
            "--set optimizer.schedule=constant_with_warmup."
        )
    assert config.prompts.train is not None, "checked when the configuration was loaded"
    if not load_prompts(config.prompts.train, config.prompts.unseen).unseen:
        yield "prompts.unseen needs prompts, on which the methods are compared: a file, or a list of prompts."
    assert config.evaluation is not None, "a comparison sets when to evaluate"
    if searched and not config.evaluation.num_train_prompts:
        yield "evaluation.num_train_prompts=0 leaves nothing to choose the settings by: raise it."


def known_jobs(declaration: Declaration, folder: Path, chosen: Mapping[str, Settings]) -> list[Job]:
    """The runs that are known already: all trials, then every seed of the methods whose settings are chosen.

    Args:
        declaration: of the comparison.
        folder: of the comparison.
        chosen: what the search chose, by method; methods that it has not decided on are left out.
    """
    trials = [job for method in declaration.methods for job in trial_jobs(declaration, folder, method)]
    seeds = [seed_jobs(declaration, folder, method, settings) for method, settings in chosen.items()]
    return trials + [job for one_seed in zip(*seeds, strict=True) for job in one_seed]
