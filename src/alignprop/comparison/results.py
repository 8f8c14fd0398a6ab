"""The numbers of a comparison, read from its run folders: what `compare.json` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from alignprop.comparison.budget import Budget
from alignprop.comparison.declaration import Declaration
from alignprop.comparison.jobs import Job, seed_jobs
from alignprop.comparison.reach import reach
from alignprop.comparison.search import Choice, choose_settings
from alignprop.comparison.statistics import at_place, common_grid, crossing, interpolate, mean_interval

Record: TypeAlias = dict[str, Any]

AXES = {"images": "images_scored", "denoiser_calls": "denoiser_calls", "seconds": "train_seconds"}
"""What methods are compared against, with the key of `evaluation.jsonl` that counts it."""


def results(declaration: Declaration, folder: Path) -> Record:
    """Everything that is known of a comparison, finished or not."""
    methods = {name: _method(declaration, folder, name) for name in declaration.methods}
    evaluated = [run for method in methods.values() for run in method["seeds"].values() if run["series"]]
    base = _at_base(evaluated) if evaluated else None
    return {
        "declaration": declaration.document(),
        "complete": all(method["complete"] for method in methods.values()),
        "trained": list(declaration.rewards) or (evaluated[0]["trained"] if evaluated else []),
        "base": base,
        "methods": methods,
        "reach": reach(methods, base, declaration.reach) if base else None,
    }


def _method(declaration: Declaration, folder: Path, name: str) -> Record:
    choice = choose_settings(declaration, folder, name)
    settings = choice.settings if choice else None
    jobs = seed_jobs(declaration, folder, name, settings) if settings is not None else []
    seeds = {str(place): _run(declaration, job, folder) for place, job in enumerate(jobs)}
    finished = [run["series"] for run in seeds.values() if run["finished"]]
    return {
        "settings": {**declaration.methods[name], **(settings or {})},
        "search": _search(choice, folder),
        "complete": choice is not None and all(job.is_over for job in jobs),
        "failures": {seed: run["failure"] for seed, run in seeds.items() if run["failure"]},
        "seeds": seeds,
        "final": _over_seeds([_at_budget(series, declaration.budget) for series in finished]) if finished else None,
        "end": _over_seeds([_at(series, -1) for series in finished])
        if finished and declaration.budget_of(name) != declaration.budget
        else None,
        "spent": {axis: mean_interval([series[axis][-1] for series in finished]).mean for axis in AXES}
        if finished
        else None,
        "aggregated": {axis: _aggregated(finished, axis) for axis in AXES} if finished else None,
    }


def _search(choice: Choice | None, folder: Path) -> Record | None:
    if choice is None or not choice.trials:
        return None
    trials = [{**trial, "folder": _inside(Path(trial["folder"]), folder)} for trial in choice.trials]
    return {"winner": choice.winner, "trials": trials}


def _at_base(evaluated: Sequence[Mapping[str, Any]]) -> Record:
    """The base model's values, of the rewards that every method has measured."""
    base = _at(evaluated[0]["series"], 0)
    for name, values in base.items():
        known = set.intersection(*(set(run["series"]["sets"][name]["rewards"]) for run in evaluated))
        values["rewards"] = {reward: value for reward, value in values["rewards"].items() if reward in known}
    return base


def _run(declaration: Declaration, job: Job, folder: Path) -> Record:
    """One seed of a method: its curve and its last values."""
    lines = job.evaluations
    series = _series(declaration, lines) if lines else None
    return {
        "folder": _inside(job.folder, folder),
        "finished": job.is_finished and job.failure is None,
        "failure": job.failure,
        "trained": lines[0]["trained"] if lines else [],
        "series": series,
        "final": _at(series, -1) if series else None,
    }


def _inside(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _series(declaration: Declaration, lines: Sequence[Mapping[str, Any]]) -> Record:
    """The evaluations of a run, turned from a list of records into lists of numbers."""
    return {
        "step": [line["step"] for line in lines],
        **{axis: [line[key] for line in lines] for axis, key in AXES.items()},
        "sets": {
            name: {
                "reward": [declaration.reward_of(line["sets"][name]) for line in lines],
                "rewards": {
                    reward: [line["sets"][name]["rewards"][reward]["mean"] for line in lines]
                    for reward in lines[0]["sets"][name]["rewards"]
                },
                "diversity": [line["sets"][name]["diversity"] for line in lines],
            }
            for name in lines[0]["sets"]
        },
    }


def _at(series: Mapping[str, Any], place: int) -> Record:
    """The values of a curve's point, by set of prompts."""
    return {name: _each(measured, lambda values: values[place]) for name, measured in series["sets"].items()}


def _at_budget(series: Mapping[str, Any], budget: Budget) -> Record:
    """The values where a curve has spent the budget of all, between two evaluations if it goes on; else at its end."""
    spent = series[budget.unit]
    if spent[-1] <= budget.amount:
        return _at(series, -1)
    place = crossing(spent, budget.amount)
    assert place is not None, "the last of them is above the budget"
    return {name: _each(measured, lambda values: at_place(values, place)) for name, measured in series["sets"].items()}


def _each(measured: Mapping[str, Any], change: Any) -> Record:
    """Apply a function to each measure of a set of prompts."""
    return {
        "reward": change(measured["reward"]),
        "rewards": {name: change(values) for name, values in measured["rewards"].items()},
        "diversity": change(measured["diversity"]),
    }


def _paired(records: Sequence[Mapping[str, Any]], join: Any) -> Record:
    """Apply a function to the list of each measure's values over seeds, by set of prompts."""
    return {
        name: {
            "reward": join([record[name]["reward"] for record in records]),
            "rewards": {
                reward: join([record[name]["rewards"][reward] for record in records])
                for reward in records[0][name]["rewards"]
            },
            "diversity": join([record[name]["diversity"] for record in records]),
        }
        for name in records[0]
    }


def _over_seeds(records: Sequence[Mapping[str, Any]]) -> Record:
    return _paired(records, lambda values: asdict(mean_interval(values)))


def _aggregated(runs: Sequence[Mapping[str, Any]], axis: str) -> Record:
    """The mean curve over seeds with its interval, on the grid that all of them cover."""
    grid = common_grid([run[axis] for run in runs])

    def curve(values: Sequence[Sequence[float]]) -> Record:
        on_grid = [interpolate(grid, run[axis], ys) for run, ys in zip(runs, values, strict=True)]
        points = [mean_interval(column) for column in zip(*on_grid, strict=True)]
        return {key: [getattr(point, key) for point in points] for key in ("mean", "low", "high")}

    return {"x": grid, "seeds": len(runs), "sets": _paired([run["sets"] for run in runs], curve)}
