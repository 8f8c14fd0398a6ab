"""Which denoising steps an adapter needs: switched on for the first m steps only, or for the last m.

    python benchmarks/adapter_steps.py RUN... --output FOLDER

For each run: rewards on the unseen prompts, and how much of the whole adapter's change of the pictures is there, apart
for layout (means of 8 x 8 pixels) and detail (the rest). The share is the projection on the whole change,
``<change_m, change_all> / <change_all, change_all>``: 0 for the base's pictures, 1 for the adapter's. Pictures of one
seed, not picked, are drawn into FOLDER/steps-RUN.png, and the numbers into FOLDER/steps.json.
"""

import argparse
import json
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import alignprop
from alignprop.config import Config, load_pipeline, load_terms, read_config
from alignprop.measures import Evaluated
from alignprop.pictures import captioned_grid
from alignprop.pixels import to_pil
from alignprop.prompts import load_prompts

BLOCK = 8
"""Pixels of a side over which layout is averaged."""


def drawn(pipeline: Any, config: Config, steps: Collection[int], rewards: dict[str, Any]) -> Evaluated:
    """Pictures with the adapter on in these denoising steps (from 0) and off in the others."""

    def switch(on: bool) -> None:
        pipeline.enable_lora() if on else pipeline.disable_lora()

    def after(_: Any, step: int, __: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        switch((step + 1) % config.sampling.num_inference_steps in steps)  # the last one sets up the next call
        return arguments

    switch(0 in steps)
    sampler = alignprop.Sampler(pipeline, {**config.sampling.call(), "callback_on_step_end": after})
    prompts = load_prompts(config.prompts.train, config.prompts.unseen).unseen
    return alignprop.evaluate(sampler, prompts, rewards, seed=config.evaluation.seed)


def bands(images: Tensor) -> dict[str, Tensor]:
    """Layout and detail of (N, S, 3, H, W)."""
    flat = images.flatten(0, 1)
    layout = F.interpolate(F.avg_pool2d(flat, BLOCK), scale_factor=BLOCK)
    return {"layout": layout, "detail": flat - layout}


def shares(some: Tensor, base: Tensor, whole: Tensor) -> dict[str, float]:
    """How much of the whole change is in some pictures, by band."""
    at, start, end = bands(some), bands(base), bands(whole)
    return {
        name: (
            ((at[name] - start[name]) * (end[name] - start[name])).sum() / (end[name] - start[name]).square().sum()
        ).item()
        for name in start
    }


def measure(run: Path, output: Path) -> dict[str, Any]:
    """All the windows of one run."""
    config = read_config(run / "config.yaml")
    pipeline = load_pipeline(config.model)
    terms = {**config.judges, **config.rewards}
    rewards = load_terms(terms, pipeline.device)
    alignprop.load_adapter(pipeline, run / "adapter")
    num_steps = config.sampling.num_inference_steps
    windows = {"none": range(0), "all": range(num_steps)}
    windows |= {f"first {m}": range(m) for m in range(1, num_steps)}
    windows |= {f"last {m}": range(num_steps - m, num_steps) for m in range(1, num_steps)}
    results = {name: drawn(pipeline, config, steps, rewards) for name, steps in windows.items()}
    base, whole = results["none"].images, results["all"].images
    order = ["none", *(f"first {m}" for m in range(1, num_steps)), "all"]
    order += [f"last {m}" for m in range(num_steps - 1, 0, -1)]
    columns = [to_pil(results[name].images[:, 0]) for name in order]
    captioned_grid(columns, order, per_row=len(order)).save(output / f"steps-{run.parent.name}-{run.name}.png")
    return {
        name: {
            **{reward: values.mean().item() for reward, values in results[name].scores.items()},
            **shares(results[name].images, base, whole),
        }
        for name in order
    }


def mean(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every number over runs of one recipe."""
    return {
        window: {name: statistics.fmean(run[window][name] for run in runs) for name in values}
        for window, values in runs[0].items()
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("."))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = {f"{run.parent.name}/{run.name}": measure(run, arguments.output) for run in arguments.runs}
    if len(found) > 1:
        found["mean of all"] = mean(list(found.values()))
    for name, rows in found.items():
        print(f"\n{name}\n\n| adapter on in | {' | '.join(rows['all'])} |\n|---|{'---|' * len(rows['all'])}")
        for window, values in rows.items():
            print(f"| {window} | {' | '.join(f'{value:.2f}' for value in values.values())} |")
    (arguments.output / "steps.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
