"""What each regulariser does to a reward that is easily fooled, and what a gold judge says of it.

    PYTHONPATH=training/emoji python benchmarks/regularisers.py --output FOLDER [--seeds 0,1,2] [--only "kl 1" "l2 1"]

The weak reward (`training/emoji/weak.py`, a head that has only seen clean drawings), or another one (`--reward`), is
trained on the default recipe, without a guard, with one setting changed at a time. For each setting, over the seeds:
the reward, the judges, the gold score and the diversity at the end, and the best gold score on the way. Runs are kept
in FOLDER/runs and taken up again.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from gold_standard import REWARDS, gold, train

from alignprop.guard import Line, measured
from alignprop.runfolder import write_atomically

WEAK = "weak:WeakAesthetic"
STEPS = 60
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "kl 0.1": {"regularisation.kl": 0.1},
    "kl 0.3": {"regularisation.kl": 0.3},
    "kl 1": {"regularisation.kl": 1.0},
    "kl 3": {"regularisation.kl": 3.0},
    "l2 1": {"regularisation.l2": 1.0},
    "l2 10": {"regularisation.l2": 10.0},
    "max_step_grad_norm 0.1": {"regularisation.max_step_grad_norm": 0.1},
    "clamp_above 6.5": {"rewards": {WEAK: {"weight": 1.0, "clamp_above": 6.5}}},
    "augment 4 views": {"rewards": {WEAK: {"weight": 1.0, "augment": {"views": 4}}}},
    "dropout 0.1": {"adapter.dropout": 0.1},
    "ema_decay 0.95": {"optimizer.ema_decay": 0.95},
    "learning_rate 1e-3": {"optimizer.learning_rate": 1.0e-3},
}
"""Settings by name; the last one is no regulariser, but what one would try first. Those of `rewards` are for the
weak one."""


def figures(lines: list[dict[str, Any]], reward: str) -> dict[str, float]:
    """Of one run."""

    def mean(line: Line, name: str) -> float:
        return float(measured(line)["rewards"][name]["mean"])

    best = max(lines, key=gold)
    return {
        "reward": mean(lines[-1], reward),
        "emoji-clip": mean(lines[-1], "emoji-clip"),
        "gold": gold(lines[-1]),
        "best gold": gold(best),
        "at step": best["step"],
        "its reward": mean(best, reward),
        "diversity": float(measured(lines[-1])["diversity"]),
        "base gold": gold(lines[0]),
    }


def main() -> None:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--reward", choices=REWARDS, default=WEAK)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in arguments.only}
    for seed in map(int, arguments.seeds.split(",")):
        for name in arguments.only:
            folder = arguments.output / "runs" / name.replace(" ", "-") / f"seed-{seed}"
            found[name][seed] = figures(
                train(arguments.reward, seed, folder, **{"training.steps": STEPS, **VARIANTS[name]}), arguments.reward
            )
            print(name, seed, json.dumps(found[name][seed]), flush=True)
    write_atomically(arguments.output / "regularisers.json", json.dumps(found, indent=1) + "\n")
    columns = list(next(iter(next(iter(found.values())).values())))
    print(f"\n| setting | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, by_seed in found.items():
        means = [statistics.fmean(run[column] for run in by_seed.values()) for column in columns]
        print(f"| {name} | {' | '.join(f'{mean:.3g}' for mean in means)} |")


if __name__ == "__main__":
    main()
