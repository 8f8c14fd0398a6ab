"""The guard against a reward that is being fooled: which evaluation to keep, what to warn of, and when to stop.

Rewards are models of taste, and a policy that climbs one far enough finds what the model has wrong: the reward goes on
rising while the pictures fall apart (over-optimisation; Gao et al. 2023, arXiv 2210.10760, measure it with a gold
judge as here). What is not trained notices: other rewards, the diversity of the pictures, their saturation.
Everything here is a function of the lines of ``evaluation.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Line = Mapping[str, Any]
"""A line of ``evaluation.jsonl``."""

SELECTED_BY = "unseen"
"""The set of prompts by which adapters are chosen, where there is one."""


def measured(line: Line) -> Mapping[str, Any]:
    """What an evaluation measured on the prompts that adapters are chosen by."""
    found: Mapping[str, Any] = line["sets"].get(SELECTED_BY) or next(iter(line["sets"].values()))
    return found


def objective(line: Line) -> float:
    """What is optimised, on those prompts: the weighted sum of the trained rewards, clamped and normalised."""
    found = measured(line)
    return float(found.get("objective", found["reward"])["mean"])


@dataclass(frozen=True)
class Alarm:
    """Something that is not trained has become worse than is tolerated.

    Attributes:
        measure: the judge's name, ``diversity``, ``feature_diversity`` or ``saturated``.
        is_judge: whether it is a judge.
        reason: in a clause, with the numbers.
    """

    measure: str
    is_judge: bool
    reason: str


@dataclass(frozen=True)
class Guard:
    """Keeps the adapter with the highest trained reward among those that raise no alarm, and stops a lost run.

    Alarms compare an evaluation with the base model's, at the same prompts and seeds.

    Attributes:
        keep: ``guarded`` for the rule above; ``reward`` keeps the highest trained reward, whatever it cost.
        max_fall: a judge raises an alarm if its mean falls by more than so many standard deviations of its scores of
            the base model's single pictures; None never does.
        min_diversity: there is one if the diversity of a prompt's pictures, of pixels or of features, falls below
            this fraction of the base model's; None never does.
        max_saturated: there is one if the share of black or white values in the pictures rises by more than this;
            None never does.
        window: the run is stopped after so many evaluations in a row in which a judge raised an alarm and the reward
            was above that of every evaluation without alarms; None never stops.
    """

    keep: Literal["guarded", "reward"] = "guarded"
    max_fall: float | None = 1.0
    min_diversity: float | None = 0.5
    max_saturated: float | None = 0.2
    window: int | None = 3

    def alarms(self, first: Line, line: Line) -> list[Alarm]:
        """What has become worse than is tolerated since the base model's evaluation."""
        return [*self._judges(first, line), *self._diversities(first, line), *self._saturation(first, line)]

    def value(self, first: Line, line: Line) -> float:
        """The criterion by which adapters are compared: minus infinity for those that raise an alarm."""
        barred = self.keep == "guarded" and self.alarms(first, line)
        return float("-inf") if barred else objective(line)

    def verdict(self, lines: Sequence[Line]) -> str | None:
        """Why to stop after the last of these evaluations of a run; None to go on."""
        if self.window is None:
            return None
        first, latest = lines[0], lines[-self.window :]
        sound = max(objective(line) for line in lines if not self.alarms(first, line))  # the first always is
        fallen = [[alarm for alarm in self.alarms(first, line) if alarm.is_judge] for line in latest]
        if not all(fallen) or any(objective(line) <= sound for line in latest):
            return None
        reasons = ", ".join(alarm.reason for alarm in fallen[-1])
        return f"the reward rises and {reasons}, {self.window} evaluations in a row"

    def _judges(self, first: Line, line: Line) -> Iterator[Alarm]:
        before, after = measured(first)["rewards"], measured(line)["rewards"]
        for name in before:
            if self.max_fall is None or name in line["trained"] or name not in after:
                continue
            fall = before[name]["mean"] - after[name]["mean"]
            unit = before[name]["std"]
            if fall > self.max_fall * unit:
                by = f" by {fall / unit:.1f} deviations" if unit else ""
                yield Alarm(name, True, f"{name} fell{by} ({before[name]['mean']:.3g} → {after[name]['mean']:.3g})")

    def _diversities(self, first: Line, line: Line) -> Iterator[Alarm]:
        names = {"diversity": "diversity", "feature_diversity": "diversity of features"}
        for name, words in names.items():
            before, after = measured(first).get(name), measured(line).get(name)
            if self.min_diversity is None or not before or after is None:
                continue
            if after < self.min_diversity * before:
                yield Alarm(name, False, f"{words} fell to {after / before:.0%} of the base's")

    def _saturation(self, first: Line, line: Line) -> Iterator[Alarm]:
        before, after = measured(first).get("saturated"), measured(line).get("saturated")
        if self.max_saturated is None or before is None or after is None:
            return
        if after - before > self.max_saturated:
            yield Alarm("saturated", False, f"black and white values rose from {before:.0%} to {after:.0%}")


NO_GUARD = Guard(keep="reward", max_fall=None, min_diversity=None, max_saturated=None, window=None)
"""Keeps the highest trained reward, whatever it cost."""
