"""The choice of each method's settings among its trials."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignprop.comparison.declaration import Declaration
from alignprop.comparison.jobs import Job, trial_jobs
from alignprop.comparison.methods import Settings

CHOSEN_BY = "train"
"""The prompts by which trials are judged: never the unseen ones, on which the methods are compared."""


@dataclass(frozen=True)
class Choice:
    """What the search of a method came to.

    Attributes:
        winner: the place of the best trial; None if there was no search, or every trial failed.
        settings: of the winner, empty without a search; None if every trial failed.
        trials: what each tried and reached, as `compare.json` holds it.
    """

    winner: int | None
    settings: Settings | None
    trials: tuple[dict[str, Any], ...] = ()


def choose_settings(declaration: Declaration, folder: Path, method: str) -> Choice | None:
    """The settings that win; None while a trial is not over. Of equal ones the first wins."""
    search = declaration.search
    if search is None:
        return Choice(None, {})
    jobs = trial_jobs(declaration, folder, method)
    if not all(job.is_over for job in jobs):
        return None
    tried = search.trials[method]
    trials = tuple(_told(declaration, job, settings) for job, settings in zip(jobs, tried, strict=True))
    finished = [i for i, trial in enumerate(trials) if trial["failure"] is None]
    winner = max(finished, key=lambda i: float(trials[i]["reward"]), default=None)
    return Choice(winner, None if winner is None else dict(tried[winner]), trials)


def _told(declaration: Declaration, job: Job, settings: Settings) -> dict[str, Any]:
    """A trial that is over, as `compare.json` holds it."""
    last = job.evaluations[-1] if job.evaluations else None
    return {
        "settings": dict(settings),
        "folder": str(job.folder),
        "failure": job.failure,
        "reward": declaration.reward_of(last["sets"][CHOSEN_BY]) if last and job.failure is None else None,
        "images": last["images_scored"] if last else 0,
        "denoiser_calls": last["denoiser_calls"] if last else 0,
        "seconds": last["train_seconds"] if last else 0.0,
    }
