"""Training the runs of a comparison, one after another, beside other processes that do the same."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop.comparison.claims import claimed
from alignprop.comparison.declaration import Declaration
from alignprop.comparison.jobs import Job, check_settings, job_config, known_jobs
from alignprop.comparison.search import Choice, choose_settings
from alignprop.config import Run, build, probe_trainer, save
from alignprop.runfolder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable

    from alignprop.trainer import Trainer

POLL_S = 5.0
"""Time between looks at what another process is doing."""


@dataclass(frozen=True)
class Ended:
    """A run that has just ended.

    Attributes:
        job: the run.
        place: among the runs that are over, from 1.
        total: runs of the comparison.
        seconds: that it took here.
    """

    job: Job
    place: int
    total: int
    seconds: float


@dataclass(frozen=True)
class Progress:
    """Called after every step of a run with what it has scored.

    Attributes:
        job: the run.
        tell: takes the trainer.
    """

    job: Job
    tell: Callable[[Job, Trainer], None]

    def start(self, trainer: Trainer) -> None:
        """Tell that it begins."""
        self.tell(self.job, trainer)

    def step(self, trainer: Trainer, metrics: Mapping[str, Any]) -> None:
        """Tell where it is."""
        self.tell(self.job, trainer)

    def end(self, trainer: Trainer) -> None:
        """Nothing to do."""


def choices_of(declaration: Declaration, folder: Path) -> dict[str, Choice | None]:
    """What the search has chosen for each method so far."""
    return {method: choose_settings(declaration, folder, method) for method in declaration.methods}


def jobs_of(declaration: Declaration, folder: Path) -> list[Job]:
    """The runs that are known already."""
    choices = choices_of(declaration, folder)
    chosen = {name: choice.settings for name, choice in choices.items() if choice and choice.settings is not None}
    return known_jobs(declaration, folder, chosen)


def is_complete(declaration: Declaration, folder: Path) -> bool:
    """Whether every run is over."""
    decided = None not in choices_of(declaration, folder).values()
    return decided and all(job.is_over for job in jobs_of(declaration, folder))


def train_all(
    declaration: Declaration,
    folder: Path,
    progress: Callable[[Job, Trainer], None],
    waiting: Callable[[list[Job]], None],
) -> Iterator[Ended]:
    """Train every run that is not over and that no other process has claimed.

    Args:
        declaration: of the comparison.
        folder: of the comparison.
        progress: told after every step of a run.
        waiting: told of the runs of other processes that must end before this one can go on.

    Yields:
        Each run that this process has brought to an end.

    Raises:
        ConfigError: a run that is there was trained with other settings.
        KeyboardInterrupt: between two steps, with a checkpoint written.
    """
    checked: set[Path] = set()
    while True:
        moved, known = False, jobs_of(declaration, folder)
        for job in (job for job in known if job.folder not in checked):
            check_settings(declaration, job)
        checked |= {job.folder for job in known}
        for job in [job for job in known if not job.is_over]:
            began, trained = time.perf_counter(), False
            with claimed(job.lock) as mine:
                if mine and not job.is_over:
                    train(declaration, folder, job, progress)
                    trained = True
            if trained:
                yield _ended(declaration, folder, job, time.perf_counter() - began)
            moved = moved or mine
        if moved:
            continue
        if None not in choices_of(declaration, folder).values():
            return
        waiting([job for job in known if not job.is_over])  # trials: their winners' settings are to be trained with
        time.sleep(POLL_S)


def train(declaration: Declaration, folder: Path, job: Job, progress: Callable[[Job, Trainer], None]) -> None:
    """Train one run from its last checkpoint, or from the beginning; what stops it for good is recorded."""
    import torch

    from alignprop.checkpointing import list_checkpoints, load_checkpoint
    from alignprop.probe import ProbeError, require
    from alignprop.trainer import TrainingStopped

    config, files = job_config(declaration, job), RunFolder(job.folder)
    trainer = build(config, job.folder, callbacks=[Progress(job, progress)])
    if checkpoints := list_checkpoints(files.checkpoints):
        load_checkpoint(trainer, checkpoints[-1])
    place = Run(name=job.folder.name, folder=str(job.folder.parent))
    save(config.model_copy(update={"run": place}), files.config)
    try:
        if not checkpoints and job.is_probed:  # a method without gradient would show as a flat line
            require(probe_trainer(trainer))
        trainer.train()
    except ProbeError as error:  # an outcome of its settings, with any seed
        for other in jobs_of(declaration, folder):
            if other.is_like(job) and not other.is_finished:
                other.fail(str(error))
    except (TrainingStopped, ValueError, torch.OutOfMemoryError) as error:  # an outcome of this run, not of the others
        job.fail(str(error))
    finally:
        del trainer
        gc.collect()


def _ended(declaration: Declaration, folder: Path, job: Job, seconds: float) -> Ended:
    trials = sum(map(len, declaration.search.trials.values())) if declaration.search else 0
    total = trials + declaration.seeds * len(declaration.methods)
    return Ended(job, sum(other.is_over for other in jobs_of(declaration, folder)), total, seconds)
