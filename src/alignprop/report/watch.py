"""What the guard saw of a run: the reward and its judges on one picture, its warnings, and what it did about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from alignprop.charts import MAX_CURVES, Curve, watch_chart
from alignprop.guard import measured, objective
from alignprop.report.records import Record, is_trained, kept_of, prompt_sets, scores_of
from alignprop.report.wording import number


@dataclass(frozen=True)
class Watch:
    """The section of the page.

    Attributes:
        trained: name of what is trained, above in the chart, in its own unit.
        judges: names of what watches it, below, in the order of the curves' colours: the change since the base
            model's evaluation, in standard deviations of its scores of single pictures then.
        chart: both, along one axis.
        floor: what the judges may fall to before the guard warns; None where there is no such bound.
        has_worth: whether it also draws what the guard found each evaluation worth.
        warnings: of each evaluation that the guard warned of, by step.
    """

    trained: str
    judges: tuple[str, ...]
    chart: Markup
    floor: float | None
    has_worth: bool
    warnings: dict[float, str]


def watch_of(evaluations: Sequence[Record], kept_step: float | None, max_fall: float | None) -> Watch | None:
    """The section for the evaluations of a run, the base model's first; None if there are too few to say anything.

    Args:
        evaluations: lines of `evaluation.jsonl`.
        kept_step: of the adapter that is kept.
        max_fall: the guard's.
    """
    if len(evaluations) < 2:
        return None
    first, prompts = evaluations[0], prompt_sets(evaluations)[0]  # the unseen ones, by which the guard judges
    scores = scores_of(first, prompts)
    trained = next(name for name in scores if is_trained(name, first))
    judges = [name for name in scores if not is_trained(name, first) and scores[name]["std"] > 0][: MAX_CURVES - 1]
    floor = -max_fall if max_fall is not None else None
    worth = worth_curve(evaluations)
    return Watch(
        trained=trained,
        judges=tuple(judges),
        chart=watch_chart(
            trained_curve(evaluations),
            [in_deviations(evaluations, prompts, name) for name in judges],
            worth,
            kept_step,
            floor,
        ),
        has_worth=worth is not None,
        floor=floor,
        warnings={line["step"]: "; ".join(line["alarms"]) for line in evaluations if line.get("alarms")},
    )


def trained_curve(evaluations: Sequence[Record]) -> Curve:
    """What is optimised, by step, in its own unit."""
    found = [measured(line) for line in evaluations]
    scores = [each.get("objective", each["reward"]) for each in found]
    return _curve(evaluations, [(score["mean"], score["sem"]) for score in scores])


def worth_curve(evaluations: Sequence[Record]) -> Curve | None:
    """What the guard found each evaluation worth, in deviations; None in a run without a guard."""
    if any(line.get("worth") is None for line in evaluations):
        return None
    return _curve(evaluations, [(line["worth"], 0.0) for line in evaluations])


def in_deviations(evaluations: Sequence[Record], prompts: str, name: str) -> Curve:
    """The change of a judge since the first evaluation, in deviations of its scores of single pictures then."""
    lines = [line for line in evaluations if name in scores_of(line, prompts)]
    found = [scores_of(line, prompts)[name] for line in lines]
    mean, unit = found[0]["mean"], found[0]["std"]
    return _curve(lines, [((score["mean"] - mean) / unit, score["sem"] / unit) for score in found])


def _curve(lines: Sequence[Record], values: Sequence[tuple[float, float]]) -> Curve:
    points = sorted((line["step"], *value) for line, value in zip(lines, values, strict=True))
    return Curve(*map(list, zip(*points, strict=True)))


def guard_notes(evaluations: Sequence[Record]) -> tuple[str, ...]:
    """What the guard did, in sentences: why it ended the run, and why it kept no adapter of a higher reward."""
    return tuple(_notes(evaluations))


def _notes(evaluations: Sequence[Record]) -> Iterator[str]:
    kept = kept_of(evaluations)
    if kept is None:
        return
    if reason := evaluations[-1].get("stopped"):
        yield f"The guard ended the run after step {evaluations[-1]['step']}: {reason}."
    highest = max(evaluations, key=objective)
    if objective(highest) > objective(kept):
        what = "the base model" if kept is evaluations[0] else f"step {kept['step']}"
        rewards = f"reward {number(objective(highest))} in place of {number(objective(kept))}"
        why = ", ".join(highest.get("alarms", ())) or "its judges have lost what the reward has gained"
        yield f"The guard keeps {what}, and not step {highest['step']} ({rewards}): {why}."
