"""The guard against a reward that is being fooled: which evaluation to keep, what to warn of, and when to stop.

Rewards are models of taste, and a policy that climbs one far enough finds what the model has wrong: the reward goes on
rising while the pictures fall apart (over-optimisation; Gao et al. 2023, arXiv 2210.10760, measure it with a gold
judge as here). What is not trained notices: other rewards, the diversity of the pictures, their saturation.
Everything here is a function of the lines of ``evaluation.jsonl``.
"""

from __future__ import annotations

import math
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
    return float(_objective_scores(line)["mean"])


def _objective_scores(line: Line) -> Mapping[str, float]:
    found = measured(line)
    scores: Mapping[str, float] = found.get("objective", found["reward"])
    return scores


def _unit(scores: Mapping[str, float]) -> float:
    """What single pictures vary by; 1 where they do not, as a change has no other unit then than the scores' own."""
    return scores["std"] or 1.0


def _judged(first: Line, line: Line) -> Iterator[tuple[str, float, str]]:
    """Each judge with its change since the base model's evaluation, in deviations, and both means in words."""
    before, after = measured(first)["rewards"], measured(line)["rewards"]
    for name in before:
        if name not in line["trained"]:
            then, now = before[name]["mean"], after[name]["mean"]
            yield name, (now - then) / _unit(before[name]), f"{then:.3g} → {now:.3g}"


def _fall(name: str, change: float, means: str) -> str:
    return f"{name} fell by {-change:.1f} deviations ({means})"


def _tempered(change: float) -> float:
    return math.copysign(math.log1p(abs(change)), change)


@dataclass(frozen=True)
class Alarm:
    """Something that is not trained has become worse than is tolerated.

    Attributes:
        measure: the judge's name, ``diversity``, ``feature_diversity`` or ``saturated``.
        reason: in a clause, with the numbers.
    """

    measure: str
    reason: str


@dataclass(frozen=True)
class Guard:
    """Keeps the adapter whose reward has risen most for what its judges have lost, and stops a lost run.

    An evaluation is compared with the base model's, at the same prompts and seeds. Changes of a reward or a judge are
    in standard deviations of its scores of the base model's single pictures, so that they can be added up:

        worth = min(gain of the trained reward, max_gain) + judge_weight · mean of s(change of a judge)

    with s(d) = sign(d) ln(1 + |d|), since deviations are a rough unit where a judge gives nearly all of the base
    model's pictures its best: a fall of ten of them counts as 2.4.

    An adapter whose pictures have lost their diversity or are burnt out is not kept, whatever it is worth.

    Attributes:
        keep: ``guarded`` for the rule above; ``reward`` keeps the highest trained reward, whatever it cost.
        judge_weight: what a small change of the mean judge is worth, in deviations of the trained reward.
        max_gain: a gain of the trained reward counts no more above so many deviations, beyond which the judges alone
            decide; None counts all of it, and so does a run without judges.
        max_fall: a judge raises an alarm if its mean falls by more than so many deviations; None never does.
        min_diversity: there is one if the diversity of a prompt's pictures, of pixels or of features, falls below
            this fraction of the base model's; None never does.
        max_saturated: there is one if the share of black or white values in the pictures rises by more than this;
            None never does.
        window: the run is stopped after so many evaluations in a row with a higher reward than the best one that are
            worth less than it by more than ``max_loss``: the judges have lost what the reward has gained, and more.
            None never stops.
        max_loss: in deviations of the trained reward.
    """

    keep: Literal["guarded", "reward"] = "guarded"
    judge_weight: float = 1.5
    max_gain: float | None = 2.0
    max_fall: float | None = 1.0
    min_diversity: float | None = 0.1
    max_saturated: float | None = 0.2
    window: int | None = 3
    max_loss: float = 0.3

    def alarms(self, first: Line, line: Line) -> list[Alarm]:
        """What has become worse than is tolerated since the base model's evaluation."""
        return [*self._judges(first, line), *self._diversities(first, line), *self._saturation(first, line)]

    def told(self, first: Line, line: Line) -> dict[str, Any]:
        """What an evaluation is worth, None where nothing is weighed, and the reasons of its alarms."""
        worth = self.worth(first, line) if self.keep == "guarded" else None
        return {"worth": worth, "alarms": [alarm.reason for alarm in self.alarms(first, line)]}

    def value(self, first: Line, line: Line) -> float:
        """The criterion by which adapters are compared; 0 for the base model, where it is guarded."""
        return objective(line) if self.keep == "reward" else self._guarded_value(first, line)

    def _guarded_value(self, first: Line, line: Line) -> float:
        barred = [*self._diversities(first, line), *self._saturation(first, line)]
        return float("-inf") if barred else self.worth(first, line)

    def worth(self, first: Line, line: Line) -> float:
        """What an adapter is worth by the reward and the judges, in deviations; 0 for the base model."""
        gain = (objective(line) - objective(first)) / _unit(_objective_scores(first))
        changes = [_tempered(change) for _, change, _ in _judged(first, line)]
        if not changes:
            return gain  # nobody else is there to decide
        watched = self.judge_weight * sum(changes) / len(changes)
        return (gain if self.max_gain is None else min(gain, self.max_gain)) + watched

    def verdict(self, lines: Sequence[Line]) -> str | None:
        """Why to stop after the last of these evaluations of a run; None to go on."""
        if self.window is None:
            return None
        first, latest = lines[0], lines[-self.window :]
        best = max(lines, key=lambda line: self._guarded_value(first, line))  # the first of equal ones
        enough = self.worth(first, best) - self.max_loss
        if any(objective(line) <= objective(best) or self.worth(first, line) >= enough for line in latest):
            return None
        fallen = [_fall(name, change, means) for name, change, means in _judged(first, latest[-1]) if change < 0]
        return f"the reward rises and {', '.join(fallen)}, {self.window} evaluations in a row"

    def _judges(self, first: Line, line: Line) -> Iterator[Alarm]:
        for name, change, means in _judged(first, line):
            if self.max_fall is not None and change < -self.max_fall:
                yield Alarm(name, _fall(name, change, means))

    def _diversities(self, first: Line, line: Line) -> Iterator[Alarm]:
        names = {"diversity": "diversity", "feature_diversity": "diversity of features"}
        for name, words in names.items():
            before, after = measured(first).get(name), measured(line).get(name)
            if self.min_diversity is None or not before:
                continue
            if after < self.min_diversity * before:
                yield Alarm(name, f"{words} fell to {after / before:.0%} of the base's")

    def _saturation(self, first: Line, line: Line) -> Iterator[Alarm]:
        before, after = measured(first).get("saturated"), measured(line).get("saturated")
        if self.max_saturated is None or before is None:
            return
        if after - before > self.max_saturated:
            yield Alarm("saturated", f"black and white values rose from {before:.0%} to {after:.0%}")


NO_GUARD = Guard(keep="reward", max_fall=None, min_diversity=None, max_saturated=None, window=None)
"""Keeps the highest trained reward, whatever it cost."""
