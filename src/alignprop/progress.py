"""A training as one sees it in a terminal: a bar that moves, and a line for each evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

from alignprop.runfolder import RunFolder, measured_alike
from alignprop.trainer import Callback, Metrics, Trainer

_RECENT = 5
"""Steps over which the reward is averaged."""


@dataclass
class ProgressBar(Callback):
    """Shows the steps, the reward and its change since the start, the images scored and the time left.

    It stands after the evaluation among the callbacks, whose lines it tells.

    Attributes:
        console: where to draw.
        folder: of the run.
    """

    console: Console
    folder: RunFolder
    _rewards: list[float] = field(default_factory=list)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draw the bar for as long as the training goes on."""
        columns = (
            SpinnerColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        with Progress(*columns, console=self.console, transient=True) as self._progress:
            self._task: TaskID = self._progress.add_task("measuring the base model", total=None)
            yield

    def start(self, trainer: Trainer) -> None:
        """Tell the base model's evaluation, or where a resumed run stands."""
        self._told = len(self.folder.evaluations.read()) if trainer.step else 0
        if trainer.step:
            self.console.print(f"Going on after step {trainer.step}.")
            self._rewards = [line["reward"] for line in self.folder.metrics.read()]
        self._tell_evaluations()
        done, total, where = _place(trainer)
        self._progress.reset(self._task)
        self._progress.update(self._task, total=total, completed=done, description=where)

    def step(self, trainer: Trainer, metrics: Metrics) -> None:
        """Move the bar."""
        self._rewards.append(metrics["reward"])
        recent, first = mean(self._rewards[-_RECENT:]), mean(self._rewards[:_RECENT])
        done, total, where = _place(trainer)
        told = f"{where}  reward {recent:.3g} ({recent - first:+.2g})  {trainer.images_scored} images"
        self._progress.update(self._task, total=total, completed=done, description=told)
        self._tell_evaluations()

    def end(self, trainer: Trainer) -> None:
        """Tell the last evaluation."""
        self._tell_evaluations()

    def _tell_evaluations(self) -> None:
        lines = self.folder.evaluations.read()
        for line in lines[self._told :]:
            self.console.print(evaluation_line(line, measured_alike(lines)[0]))
        self._told = len(lines)


def _place(trainer: Trainer) -> tuple[float, float, str]:
    """How much is done, of how much, and the step in words; of the bound that will end the run first."""
    places: list[tuple[float, float, str]] = []
    if trainer.max_images is not None:
        places.append((trainer.images_scored, trainer.max_images, f"step {trainer.step}"))
    if trainer.max_seconds is not None:
        places.append((trainer.train_seconds, trainer.max_seconds, f"step {trainer.step}"))
    places.append((trainer.step, trainer.steps, f"step {trainer.step}/{trainer.steps}"))
    return max(places, key=lambda place: place[0] / place[1])


def evaluation_line(line: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """An evaluation in a line: each reward on the first set of prompts, and what it was in the first evaluation."""
    name, measured = next(iter(line["sets"].items()))
    before = first["sets"][name]["rewards"]
    parts = []
    for reward, score in measured["rewards"].items():
        change = f" ({score['mean'] - before[reward]['mean']:+.2g})" if line is not first and reward in before else ""
        parts.append(f"{reward} {score['mean']:.3g}{change}")
    kept = " [green]best so far[/]" if line["kept"] and line is not first else ""
    alarms = f"\n    [yellow]warning: {escape(', '.join(line['alarms']))}[/]" if line.get("alarms") else ""
    return f"[bold]step {line['step']}[/] on {name} prompts: {', '.join(parts)}{kept}{alarms}"


def mean(values: list[float]) -> float:
    """The mean of at least one value."""
    return sum(values) / len(values)
