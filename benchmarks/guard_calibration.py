"""Which settings of the guard keep most of the gold? On runs whose seeds the gold standard does not report.

    PYTHONPATH=training/emoji python benchmarks/guard_calibration.py FOLDER --seeds 100,101,102,103

FOLDER is one of `benchmarks/gold_standard.py`, which has trained these seeds. For every combination of the settings
below: the share of the best gold score that is kept, its mean and its worst over the runs, and the runs that keep less
gold than the base model's. Best first, by the mean.
"""

import argparse
import itertools
import statistics
from pathlib import Path

from gold_standard import MEASURED, REWARDS, outcome, run_folder

from alignprop.guard import Guard
from alignprop.runfolder import RunFolder

GRID = {
    "judge_weight": (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0),
    "max_gain": (1.5, 2.0, 2.5, 3.0, 4.0, None),
    "min_diversity": (None, 0.1, 0.25, 0.35),
    "max_loss": (0.2, 0.3, 0.5),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="100,101,102,103")
    parser.add_argument("--judges", nargs="+", choices=MEASURED, help="of the guard, in place of those of the reward")
    parser.add_argument("--rows", type=int, default=15)
    arguments = parser.parse_args()
    runs = [
        (RunFolder(run_folder(arguments.folder, reward, int(seed))).evaluations.read(), arguments.judges or judges)
        for reward, judges in REWARDS.items()
        for seed in arguments.seeds.split(",")
    ]
    rows = []
    for values in itertools.product(*GRID.values()):
        guard = Guard(**dict(zip(GRID, values, strict=True)))
        found = [outcome(lines, guard, judges) for lines, judges in runs]
        shares = [each["share_of_best"] for each in found]
        below = sum(each["kept"] < each["base"] for each in found)
        rows.append((statistics.fmean(shares), min(shares), below, *values))
    rows.sort(key=lambda row: (-row[0], -row[1]))
    print(f"| mean | worst | below the base | {' | '.join(GRID)} |\n|---|---|---|{'---|' * len(GRID)}")
    for mean, worst, below, *values in rows[: arguments.rows]:
        print(f"| {mean:.1%} | {worst:.0%} | {below} of {len(runs)} | {' | '.join(map(str, values))} |")


if __name__ == "__main__":
    main()
