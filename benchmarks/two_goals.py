"""Mixing two adapters against training for two rewards, at equal total budget: one front, as a table and a picture.

    python benchmarks/two_goals.py COMPARISON --output FOLDER [--points 9]

COMPARISON is the folder of `alignprop compare` with docs/results/two-goals.yaml. For each seed the adapters of its
methods `aesthetic` and `alignment` are mixed along the line between them (`alignprop mix --sweep`) and measured on the
same pictures as all the others; figures are means over the seeds, with 95 % intervals. Other methods and other rewards
are named by `--ends` and `--axes`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from alignprop.comparison.statistics import mean_interval
from alignprop.guard import measured
from alignprop.runfolder import RunFolder, write_atomically

matplotlib.use("Agg")

COMMAND = Path(sys.executable).with_name("alignprop")


def ends_of(method: Path) -> list[dict[str, float]]:
    """Every reward at the end of each of its runs."""
    lines = [RunFolder(run).evaluations.read()[-1] for run in sorted(method.glob("seed-*"))]
    return [{name: found["mean"] for name, found in measured(line)["rewards"].items()} for line in lines]


def mixtures(comparison: Path, output: Path, ends: Sequence[str], num_points: int) -> dict[str, list[dict[str, float]]]:
    """Every reward at each point of the line, for each seed, by the share of the first adapter."""
    found: dict[str, list[dict[str, float]]] = {}
    for first in sorted((comparison / "runs" / ends[0]).glob("seed-*")):
        members = [str(comparison / "runs" / end / first.name) for end in ends]
        folder = output / "sweeps" / first.name
        asked = ["mix", *members, "--sweep", str(num_points), "--output", str(folder)]
        subprocess.run([str(COMMAND), *asked], check=True)
        for point in json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["points"]:
            rewards = {name: values["mean"] for name, values in point["measured"]["rewards"].items()}
            share, other = point["weights"]
            if share or other:  # the base model is measured too
                found.setdefault(f"mixture {share:.3g}", []).append(rewards)
    return found


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and half of the 95 % interval over seeds of every reward."""
    found = {name: mean_interval([run[name] for run in runs]) for name in runs[0]}
    return {name: {"mean": of.mean, "half_width": of.half_width or 0.0} for name, of in found.items()}


def draw(found: dict[str, dict[str, Any]], axes_of: Sequence[str], first_end: str, path: Path) -> None:
    """The front: each way a point with its intervals, the mixtures joined by a line."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    line = [name for name in found if name.startswith("mixture")]
    for name, values in found.items():
        (x, dx), (y, dy) = ((values[axis]["mean"], values[axis]["half_width"]) for axis in axes_of)
        axes.errorbar(x, y, xerr=dx, yerr=dy, fmt="o" if name in line else "s", color="C0" if name in line else "C1",
                      elinewidth=0.6, alpha=0.9)  # fmt: skip
        axes.annotate(name.removeprefix("mixture "), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    points = [[found[name][axis]["mean"] for name in line] for axis in axes_of]
    axes.plot(*points, color="C0", label=f"mixtures, by the share of {first_end}")
    axes.plot([], [], "s", color="C1", label="trained")
    axes.set(xlabel=axes_of[0], ylabel=axes_of[1])
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Measure what is missing, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--points", type=int, default=9)
    parser.add_argument("--ends", nargs=2, default=["aesthetic", "alignment"], metavar="METHOD")
    parser.add_argument("--axes", nargs=2, default=["emoji-aesthetic", "emoji-clip"], metavar="REWARD")
    arguments = parser.parse_args()
    trained = {method.name: ends_of(method) for method in sorted((arguments.comparison / "runs").iterdir())}
    mixed = mixtures(arguments.comparison, arguments.output, arguments.ends, arguments.points)
    found = {name: summary(runs) for name, runs in (trained | mixed).items()}
    write_atomically(arguments.output / "front.json", json.dumps(found, indent=1) + "\n")
    columns = list(found[arguments.ends[0]])
    print(f"| way | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, values in found.items():
        cells = [f"{values[column]['mean']:.3g} ± {values[column]['half_width']:.2g}" for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    draw(found, arguments.axes, arguments.ends[0], arguments.output / "front.svg")


if __name__ == "__main__":
    main()
