"""The outcome of a comparison in words, computed from what `compare.json` holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from alignprop.comparison.budget import read_budget
from alignprop.report import duration, lower_bound, number

Results: TypeAlias = Mapping[str, Any]

AXES = {"images": "images scored", "denoiser_calls": "denoiser calls", "seconds": "training seconds"}
"""What methods are compared against, as a person says it."""

_UNITS = {"images": "images", "denoiser_calls": "denoiser calls", "seconds": "seconds of training"}


def trained_reward(results: Results) -> str:
    """What the recipe trains on, and every method is measured by, as the page calls it."""
    return " + ".join(results["trained"]) or "reward"


def lead_axis(results: Results) -> str:
    """The axis of the budget, which the outcome is told in."""
    return read_budget("budget", results["declaration"]["budget"]).unit


def fastest(results: Results, axis: str) -> str | None:
    """The method that reached the value with every seed and the least of an axis."""
    costs = (results["reach"] or {}).get("methods", {})
    reached = {name: cost[axis]["interval"]["mean"] for name, cost in costs.items() if cost[axis]["interval"]}
    return min(reached, key=lambda name: float(reached[name]), default=None)


def headline(results: Results) -> str:
    """Which method reached the value at what cost, and how much more the others needed."""
    reach, axis = results["reach"], lead_axis(results)
    if reach is None:
        return "No run has been evaluated yet"
    if reach["value"] is None:
        return f"No method raised {trained_reward(results)} above the base model's on the unseen prompts"
    goal = f"{trained_reward(results)} {number(reach['value'])} on unseen prompts"
    first = fastest(results, axis)
    if first is None:
        told = ", ".join(f"{name} with {_seeds(cost)}" for name, cost in reach["methods"].items())
        return f"No method reached {goal} with every seed: {told}"
    needed = reach["methods"][first][axis]["interval"]["mean"]
    return f"{first} reached {goal} with {number(needed)} {_UNITS[axis]}{_others(reach['ratios'][first], axis)}"


def _others(ratios: Mapping[str, Any], axis: str) -> str:
    """What the other methods need, the cheapest first."""
    ranked = sorted(ratios, key=lambda name: (ratios[name][axis]["bound"], ratios[name][axis]["times"] or 1))
    told = [f"{name} {times(ratios[name][axis]).removesuffix(' times')}" for name in ranked]
    if not told:
        return ""
    *most, last = told
    return f"; {' and '.join([', '.join(most), last]) if most else last} times as many"


def other_axes(results: Results) -> str | None:
    """Which method reached the value with the least of what the budget does not bound."""
    lead = lead_axis(results)
    cheapest = [(axis, name) for axis in AXES if axis != lead and (name := fastest(results, axis)) is not None]
    if not cheapest:
        return None
    costs = results["reach"]["methods"]
    told: dict[str, list[str]] = {}
    for axis, name in cheapest:
        told.setdefault(name, []).append(f"{AXES[axis]} ({number(costs[name][axis]['interval']['mean'])})")
    also = " also" if list(told) == [fastest(results, lead)] else ""
    sentences = [f"{name}{also} needed the fewest {' and '.join(parts)}" for name, parts in told.items()]
    return f"{', '.join(sentences)}."


def times(ratio: Mapping[str, Any] | None) -> str:
    """A ratio in words: ``3.4 times``, ``more than 3.4 times``."""
    if ratio is None or ratio["times"] is None:
        return "–"
    return f"{(lower_bound if ratio['bound'] else number)(ratio['times'], 2)} times"


def _seeds(cost: Mapping[str, Any]) -> str:
    return f"{cost['reached']} of {cost['of']} seeds"


def with_half_width(interval: Mapping[str, Any] | None) -> str:
    """``7.91 ± 0.12``, to two digits of the half width; the mean alone where a single seed gives no interval."""
    if interval is None:
        return "–"
    if interval["high"] is None:
        return number(interval["mean"])
    mean, half = interval["mean"], interval["high"] - interval["mean"]
    if half <= 1e-9 * abs(mean):  # rounding, where all seeds agree
        return f"{number(mean)} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return f"{mean:,.{decimals}f} ± {half:,.{decimals}f}".replace("-", "−")


def finals(results: Results) -> str | None:
    """The trained reward of every method at the end, the best first."""
    ends = {name: m["final"]["unseen"]["reward"] for name, m in results["methods"].items() if m["final"]}
    if not ends or not results["base"]:
        return None
    ranked = sorted(ends, key=lambda name: -float(ends[name]["mean"]))
    told = ", ".join(f"{name} {with_half_width(ends[name])}" for name in ranked)
    start = number(results["base"]["unseen"]["reward"])
    return f"With the budget spent, {trained_reward(results)} on unseen prompts: {told}; the base model {start}."


def amount(budget: str) -> str:
    """A budget as a person says it."""
    read = read_budget("budget", budget)
    return f"{read.amount:,.0f} images" if read.unit == "images" else f"{duration(read.amount)} of training"


def what_was_compared(results: Results) -> str:
    """The comparison in a sentence."""
    declaration = results["declaration"]
    spent = amount(declaration["budget"])
    n = declaration["seeds"]
    runs = "one run" if n == 1 else f"{n} runs"
    num = len(declaration["methods"])
    methods = "one method" if num == 1 else f"{num} methods"
    return f"{methods.capitalize()} on the recipe {declaration['recipe']}: {runs} of each, {spent} each."


def warnings(results: Results) -> Iterator[str]:
    """What a reader must know before believing the numbers."""
    if not results["complete"]:
        yield "The comparison is not finished; runs that are under way are left out of means and tables."
    for name, method in results["methods"].items():
        search = method["search"]
        if search and search["winner"] is None:
            yield f"{name}: every trial of the search failed, so that it was not compared."
        for seed, reason in method["failures"].items():
            folder = method["seeds"][seed]["folder"]
            again = f"to try it again, delete {folder}"
            yield f"{name} failed with seed {seed}, which its means leave out ({again}): {reason}"
    if own := [name for name, method in results["methods"].items() if _has_own_rewards(method)]:
        told = f"{trained_reward(results)}, the recipe's, by which all are compared"
        yield f"Not trained on {told}, but on rewards of their own: {', '.join(own)}."
    bases = [run["series"]["sets"]["unseen"]["reward"][0] for run in _runs(results)]
    if bases and max(bases) - min(bases) > 1e-6 * max(map(abs, bases)):
        yield "The methods do not start from the same pictures: their settings change the model or its sampling."
    if results["declaration"]["seeds"] == 1:
        yield "One seed of each method: nothing is known of how much another seed would differ."


def _has_own_rewards(method: Mapping[str, Any]) -> bool:
    return any(name.split(".")[0] == "rewards" for name in method["settings"])


def _runs(results: Results) -> list[Mapping[str, Any]]:
    return [run for method in results["methods"].values() for run in method["seeds"].values() if run["series"]]
