"""The outcome of a run, read from its folder: what the page's head, the card and the command line say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignprop.guard import objective
from alignprop.report.records import Record, config_of, is_trained, kept_of, prompt_sets, scores_of
from alignprop.report.watch import guard_notes
from alignprop.report.wording import number, prompts_in_words, signed
from alignprop.runfolder import RunFolder, measured_alike

MAX_FALL = 0.05
"""A reward that is not trained may fall by this fraction of the base's before the page warns."""


@dataclass(frozen=True)
class Change:
    """One reward on one set of prompts, at the first evaluation and at a later one.

    `before` and `after` hold `mean`, `std` over single images and `sem`, the standard error over prompts.
    """

    reward: str
    trained: bool
    prompts: str
    num_prompts: int
    before: Record
    after: Record

    @property
    def gain(self) -> float:
        """The change of the mean."""
        return float(self.after["mean"] - self.before["mean"])

    @property
    def deviations(self) -> float | None:
        """The gain in standard deviations of the base's images; None where these do not vary."""
        return self.gain / self.before["std"] if self.before["std"] > 0 else None

    @property
    def fraction(self) -> float | None:
        """What is left of the base's score; None where that is not positive."""
        return self.after["mean"] / self.before["mean"] if self.before["mean"] > 0 else None

    @property
    def fell(self) -> bool:
        """Whether a reward that is not trained lost more than `MAX_FALL` of the base's score.

        Of scores below zero, such as logarithms, a share says nothing: there it is more than a standard deviation.
        """
        if self.fraction is not None:
            return not self.trained and self.fraction < 1 - MAX_FALL
        return not self.trained and self.gain < -self.before["std"]


@dataclass(frozen=True)
class Summary:
    """The outcome of a run, finished or not: what the page's head and the command line say."""

    name: str
    lead: str
    others: tuple[str, ...]
    steps: int
    planned_steps: int
    images_scored: int
    seconds: float
    peak_memory_mb: float
    first_step: int | None
    kept_step: int | None
    compared_step: int | None
    changes: tuple[Change, ...]
    guard_notes: tuple[str, ...]

    @property
    def headline(self) -> str:
        """The outcome in one sentence."""
        return "; ".join((self.lead, *self.others))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the guard did, and each reward that is not trained and fell (see :attr:`Change.fell`)."""
        fallen = [change for change in self.changes if change.fell]
        return self.guard_notes + tuple(
            f"{fall.reward}, not trained, fell on the {prompts_in_words(fall.prompts)}: {_arrow(fall)}{_of_base(fall)}."
            for fall in fallen
        )


def summarise(run_dir: Path) -> Summary:
    """Read the outcome of a run from its folder."""
    folder = RunFolder(run_dir)
    metrics, evaluations = folder.metrics.read(), measured_alike(folder.evaluations.read())
    steps = metrics[-1]["step"] if metrics else 0
    first = evaluations[0] if evaluations else None
    kept = kept_of(evaluations)
    # Where nothing beat the base model, the latest evaluation is what there is to compare it with.
    compared = kept if kept and kept is not first else evaluations[-1] if evaluations else None
    changes = _changes(first, compared) if first and compared and compared is not first else ()
    lead, others = _headline(metrics, first, kept, compared, changes)
    stopped = evaluations and evaluations[-1].get("stopped")
    return Summary(
        name=run_dir.resolve().name,
        lead=lead,
        others=others,
        steps=steps,
        planned_steps=steps if stopped else _planned_steps(config_of(folder).get("training", {}), metrics),
        images_scored=metrics[-1]["images_scored"] if metrics else 0,
        seconds=sum(record["seconds"] for record in (*metrics, *evaluations)),
        peak_memory_mb=max((record["peak_memory_mb"] for record in metrics), default=0.0),
        first_step=first["step"] if first else None,
        kept_step=kept["step"] if kept else None,
        compared_step=compared["step"] if changes and compared else None,
        changes=changes,
        guard_notes=guard_notes(evaluations),
    )


def _planned_steps(training: Record, metrics: Sequence[Record]) -> int:
    """Steps of the whole run: those that there are, where its budget is spent."""
    steps = metrics[-1]["step"] if metrics else 0
    images = metrics[-1]["images_scored"] if metrics else 0
    budgets = ((training.get("max_images"), images), (training.get("max_seconds"), sum(m["seconds"] for m in metrics)))
    spent = any(budget is not None and used >= budget for budget, used in budgets)
    return int(steps if spent else training.get("steps", steps))


def _changes(first: Record, compared: Record) -> tuple[Change, ...]:
    return tuple(
        Change(
            reward=reward,
            trained=is_trained(reward, first),
            prompts=prompts,
            num_prompts=first["sets"][prompts]["num_prompts"],
            before=before,
            after=scores_of(compared, prompts)[reward],
        )
        for prompts in prompt_sets([first])
        for reward, before in scores_of(first, prompts).items()
    )


def _headline(
    metrics: Sequence[Record],
    first: Record | None,
    kept: Record | None,
    compared: Record | None,
    changes: Sequence[Change],
) -> tuple[str, tuple[str, ...]]:
    """What became of the trained reward, and of the others, on the first set of prompts."""
    if first is None:
        so_far = f": reward {number(metrics[-1]['reward'])} at step {metrics[-1]['step']}" if metrics else ""
        return f"No evaluation yet{so_far}", ()
    if not changes:
        prompts = prompt_sets([first])[0]
        name, score = next(iter(scores_of(first, prompts).items()))
        on = f"{first['sets'][prompts]['num_prompts']} {prompts_in_words(prompts)}"
        return f"One evaluation so far, at step {first['step']}: {name} on {on}: {number(score['mean'])}", ()
    lead, *others = (change for change in changes if change.prompts == changes[0].prompts)
    start = ""
    if kept is first:
        rose = compared is not None and objective(compared) > objective(first)
        start = f"{'The guard kept the base model' if rose else 'No evaluation beat the first one'}; the latest: "
    where = f"{lead.num_prompts} {prompts_in_words(lead.prompts)}"
    sentence = f"{start}{lead.reward} on {where}: {_arrow(lead)}{_in_deviations(lead)}"
    return sentence, tuple(f"{other.reward} {_arrow(other)}{_of_base(other)}" for other in others if not other.trained)


def _arrow(change: Change) -> str:
    return f"{number(change.before['mean'])} → {number(change.after['mean'])}"


def _in_deviations(change: Change) -> str:
    if change.deviations is None:
        return ""
    return f" ({signed(change.deviations)} standard deviations of the base model's images)"


def _of_base(change: Change) -> str:
    return "" if change.fraction is None else f" ({100 * change.fraction:.0f} % of the base)"
