"""What it costs each method to reach one value of the trained reward on the unseen prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from alignprop.comparison.statistics import at_place, crossing, mean_interval

AXES = ("images", "denoiser_calls", "seconds")
SET = "unseen"
"""The prompts on which it is reached."""


def reach(methods: Mapping[str, Any], base: Mapping[str, Any], asked: float | None) -> dict[str, Any]:
    """The value, what each seed and method needed, and the ratios between methods.

    Args:
        methods: as `compare.json` holds them.
        base: the base model's values by set of prompts.
        asked: the value; None for halfway between the base's and the best method's mean at the end.
    """
    finals = {name: method["final"][SET]["reward"]["mean"] for name, method in methods.items() if method["final"]}
    start, best = base[SET]["reward"], max(finals, key=lambda name: float(finals[name]), default="")
    if asked is None and (not best or finals[best] <= start):
        return {"value": None, "chosen": "no method has raised the reward above the base model's", "methods": {}}
    value = asked if asked is not None else (start + finals[best]) / 2
    chosen = "given" if asked is not None else f"halfway between the base model's and the mean final one of {best}"
    costs = {name: cost for name, method in methods.items() if (cost := _cost(_over(method), value))}
    return {"value": value, "chosen": chosen, "methods": costs, "ratios": _ratios(costs)}


def _over(method: Mapping[str, Any]) -> dict[str, Any]:
    """The runs of a method that will not go on, by seed."""
    return {seed: run for seed, run in method["seeds"].items() if run["finished"] or run["failure"]}


def _cost(over: Mapping[str, Any], value: float) -> dict[str, Any] | None:
    """What each seed of a method needed first to reach a value; seeds that failed before have not reached it."""
    runs = {seed: run for seed, run in over.items() if run["series"]}
    if not runs:
        return None
    places = {seed: crossing(run["series"]["sets"][SET]["reward"], value) for seed, run in runs.items()}
    num_reached = sum(place is not None for place in places.values())
    cost: dict[str, Any] = {"reached": num_reached, "of": len(over)}
    for axis in AXES:
        series = {seed: run["series"][axis] for seed, run in runs.items()}
        seeds = {seed: None if p is None else at_place(series[seed], p) for seed, p in places.items()}
        needed = [x for x in seeds.values() if x is not None]
        spent = [series[seed][-1] if x is None else x for seed, x in seeds.items()]
        cost[axis] = {
            "seeds": seeds,
            "interval": asdict(mean_interval(needed)) if num_reached == len(over) else None,
            # Seeds that have not reached it count with what they spent: the true mean is above.
            "at_least": mean_interval(spent).mean,
        }
    return cost


def _ratios(costs: Mapping[str, Any]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """How many times as much each other method needs, by method, other method and axis."""
    return {
        name: {
            other: {axis: _ratio(cost[axis], costs[other][axis]) for axis in AXES} for other in costs if other != name
        }
        for name, cost in costs.items()
        if cost["reached"] == cost["of"]
    }


def _ratio(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """``bound`` says that the other method has not reached the value with every seed, so that it needs more."""
    needed = one["interval"]["mean"]
    if not needed:  # the base model's reward is enough
        return {"times": None, "bound": False}
    bound = other["interval"] is None
    return {"times": (other["at_least"] if bound else other["interval"]["mean"]) / needed, "bound": bound}
