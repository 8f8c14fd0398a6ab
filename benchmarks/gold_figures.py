"""The pictures of the gold standard: gold.svg with every run's gold score, and collapse.jpg, what one of them draws.

    PYTHONPATH=training/emoji python benchmarks/gold_figures.py FOLDER --output docs/assets [--seed 0]

FOLDER is one of `benchmarks/gold_standard.py`. The strip shows the weak reward's run of a seed: the base model, what
the guard keeps, and what there is at the end without a guard.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from gold_standard import REWARDS, gold, outcome, run_folder
from PIL import Image

from alignprop.guard import Guard, Line, measured, objective
from alignprop.runfolder import RunFolder

matplotlib.use("Agg")

WEAK = "weak:WeakAesthetic"
TITLES = {"emoji-aesthetic": "emoji-aesthetic", WEAK: "weak reward", "emoji-clip": "emoji-clip"}
COLUMNS, ROWS = 6, 2


def curves(folder: Path, seeds: Sequence[int], path: Path) -> None:
    """The gold score by step: a line a run, with the reward below it and the adapters that the guard keeps marked."""
    figure, panels = plt.subplots(2, len(REWARDS), figsize=(10, 5), layout="constrained", sharex=True, sharey="row")
    for column, reward in enumerate(REWARDS):
        for seed in seeds:
            lines = RunFolder(run_folder(folder, reward, seed)).evaluations.read()
            steps, found = [line["step"] for line in lines], outcome(lines, Guard(), REWARDS[reward])
            kept = steps.index(found["kept_step"])
            unit = measured(lines[0])["reward"]["std"]
            gains = [(objective(line) - objective(lines[0])) / unit for line in lines]
            for axes, values in zip(panels[:, column], (gains, [gold(line) for line in lines]), strict=True):
                axes.plot(steps, values, color=f"C{seed % 10}", linewidth=1)
                axes.plot(steps[kept], values[kept], "o", color=f"C{seed % 10}", markersize=6)
        panels[0, column].set_title(TITLES[reward], fontsize=10)
        panels[1, column].axhline(gold(lines[0]), color="0.6", linewidth=0.8, linestyle=":")
        panels[1, column].set_xlabel("step")
    panels[0, 0].set_ylabel("trained reward, gain in deviations")
    panels[1, 0].set_ylabel("gold score")
    figure.savefig(path)


def strip(lines: Sequence[Line], files: RunFolder, path: Path) -> None:
    """Grids of the unseen prompts one below another, the same seeds in each: their first rows and columns."""
    found = outcome(lines, Guard(), REWARDS[WEAK])
    chosen = {"base model": 0, "kept by the guard": found["kept_step"], "without a guard": lines[-1]["step"]}
    by_step = {line["step"]: line for line in lines}
    figure, panels = plt.subplots(len(chosen), 1, figsize=(7, 7.4), layout="constrained")
    for axes, (name, step) in zip(panels, chosen.items(), strict=True):
        line, grid = by_step[step], Image.open(files.samples(step) / "unseen.png").convert("RGB")
        prompts = measured(line)["num_prompts"]
        cell, height = grid.width / prompts, grid.height
        rows = measured(line)["num_images"] // prompts
        axes.imshow(grid.crop((0, 0, round(cell * COLUMNS), round(height - cell * (rows - ROWS)))))
        scores = f"weak reward {objective(line):.1f}, gold {gold(line):.1f}"
        axes.set_title(f"{name}, step {step}: {scores}", fontsize=10, loc="left")
        axes.axis("off")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--seed", type=int, default=0, help="of the strip")
    arguments = parser.parse_args()
    curves(arguments.folder, list(map(int, arguments.seeds.split(","))), arguments.output / "gold.svg")
    files = RunFolder(run_folder(arguments.folder, WEAK, arguments.seed))
    strip(files.evaluations.read(), files, arguments.output / "collapse.jpg")


if __name__ == "__main__":
    main()
