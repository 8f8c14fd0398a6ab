"""Does the guard keep an adapter that is truly good? A gold judge, which nothing else knows of, says.

    PYTHONPATH=training/emoji python benchmarks/gold_standard.py --output FOLDER [--seeds 0,1,2,3,4] [--rewards ...]

Each reward is trained on the default recipe for twice its steps, evaluated every few of them, and without a guard, so
that the whole run is seen; what a guard would have kept, and where it would have ended the run, is a function of the
evaluations (`alignprop.guard`), from which the gold scores are taken out first. Runs are kept in FOLDER/runs and taken
up again; FOLDER/gold.json and a table have for each run the gold score of the base model, of what the guard keeps, of
the best evaluation, and of the last one: what one has without a guard.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alignprop.checkpointing import list_checkpoints, load_checkpoint
from alignprop.config import build, load_config
from alignprop.guard import Guard, Line, measured, objective
from alignprop.runfolder import RunFolder, write_atomically

STEPS, EVERY = 88, 4
GOLD = "gold"
MEASURED = ("emoji-clip", "emoji-aesthetic", "emoji-names", "emoji-rating")
REWARDS = {
    "emoji-aesthetic": ("emoji-clip", "emoji-rating"),
    "weak:WeakAesthetic": ("emoji-clip", "emoji-rating"),
    "emoji-clip": ("emoji-aesthetic", "emoji-rating"),
}
"""Trained rewards, each with the judges of its guard. The second is easy to fool: it has only seen clean drawings."""


def train(reward: str, seed: int, folder: Path, **others: Any) -> list[dict[str, Any]]:
    """The evaluations of a run, which goes on where it was; others are further settings, in place of those here."""
    files = RunFolder(folder)
    judges = {name: {} for name in MEASURED if name != reward} | {GOLD: {"target": "gold_judge:load_gold"}}
    settings: dict[str, Any] = {
        "rewards": {reward: 1.0},
        "judges": judges,
        "guard": None,
        "training.steps": STEPS,
        "training.seed": seed,
        "training.num_threads": 1,
        "evaluation.every": EVERY,
        "evaluation.num_train_prompts": 0,
        "checkpoints.every": EVERY,
    } | others
    lines = files.evaluations.read()
    if lines and lines[-1]["step"] == settings["training.steps"]:
        return lines
    config = load_config("emoji", [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    trainer = build(config, folder)
    if checkpoints := list_checkpoints(files.checkpoints):
        load_checkpoint(trainer, checkpoints[-1])
    trainer.train()
    return files.evaluations.read()


def run_folder(output: Path, reward: str, seed: int) -> Path:
    """The folder of a run."""
    return output / "runs" / reward.replace(":", "-") / f"seed-{seed}"


def as_seen(line: Line, judges: Sequence[str]) -> dict[str, Any]:
    """An evaluation as the guard may see it: with these judges, and above all without the gold one."""
    seen = copy.deepcopy(dict(line))
    for found in seen["sets"].values():
        found["rewards"] = {n: of for n, of in found["rewards"].items() if n in judges or n in line["trained"]}
    return seen


def gold(line: Line) -> float:
    """The mean gold score of an evaluation's pictures."""
    return float(measured(line)["rewards"][GOLD]["mean"])


def outcome(lines: Sequence[Line], guard: Guard, judges: Sequence[str]) -> dict[str, Any]:
    """What the guard makes of a run, in gold."""
    seen = [as_seen(line, judges) for line in lines]
    ended = next((n for n in range(1, len(seen)) if guard.verdict(seen[: n + 1])), len(seen) - 1)
    values = [guard.value(seen[0], line) for line in seen[: ended + 1]]
    kept, best = values.index(max(values)), max(range(len(lines)), key=lambda n: gold(lines[n]))
    unguarded = max(range(len(lines)), key=lambda n: objective(lines[n]))
    return {
        "base": gold(lines[0]),
        "kept": gold(lines[kept]),
        "kept_step": lines[kept]["step"],
        "ended_step": lines[ended]["step"] if guard.verdict(seen[: ended + 1]) else None,
        "best": gold(lines[best]),
        "best_step": lines[best]["step"],
        "highest_reward": gold(lines[unguarded]),
        "last": gold(lines[-1]),
        "share_of_best": gold(lines[kept]) / gold(lines[best]),
        "reward": [objective(lines[n]) for n in (0, kept, -1)],
    }


def table(outcomes: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """A row a run, and the worst of all."""
    rows = [
        "| reward | seed | base | kept (step) | best (step) | kept / best | highest reward | last |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for reward, by_seed in outcomes.items():
        for seed, found in by_seed.items():
            rows.append(
                f"| {reward} | {seed} | {found['base']:.2f} | {found['kept']:.2f} ({found['kept_step']}) "
                f"| {found['best']:.2f} ({found['best_step']}) | {found['share_of_best']:.0%} "
                f"| {found['highest_reward']:.2f} | {found['last']:.2f} |"
            )
    everything = [found for by_seed in outcomes.values() for found in by_seed.values()]
    rows.append("")
    for name, key in (("kept by the guard", "kept"), ("highest reward", "highest_reward"), ("last", "last")):
        shares = [found[key] / found["best"] for found in everything]
        below = sum(found[key] < found["base"] for found in everything)
        rows.append(
            f"{name}, of the best: mean {statistics.fmean(shares):.0%}, median {statistics.median(shares):.0%}, "
            f"worst {min(shares):.0%}, at least 95 % in {sum(share >= 0.95 for share in shares)}, "
            f"below the base in {below} of {len(everything)} runs"
        )
    return "\n".join(rows)


def main() -> None:
    """Train what is missing, and write the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS))
    parser.add_argument("--judges", nargs="+", choices=MEASURED, help="of the guard, in place of those of the reward")
    parser.add_argument("--guard", default="{}", help="settings of the guard, as JSON")
    parser.add_argument("--settings", default="{}", help="further settings of the runs, as JSON, by their dotted names")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    guard = Guard(**json.loads(arguments.guard))
    outcomes: dict[str, dict[int, dict[str, Any]]] = {reward: {} for reward in arguments.rewards}
    for seed in map(int, arguments.seeds.split(",")):
        for reward in arguments.rewards:
            lines = train(reward, seed, run_folder(arguments.output, reward, seed), **json.loads(arguments.settings))
            outcomes[reward][seed] = outcome(lines, guard, arguments.judges or REWARDS[reward])
            print(reward, seed, json.dumps(outcomes[reward][seed]), flush=True)
    judges = {reward: arguments.judges or REWARDS[reward] for reward in outcomes}
    text = json.dumps({"guard": vars(guard), "judges": judges, "runs": outcomes}, indent=1)
    write_atomically(arguments.output / "gold.json", text + "\n")
    print("\n" + table(outcomes))


if __name__ == "__main__":
    main()
