"""What a training step costs beyond the denoiser's and the decoder's own work, and the memory of each mode.

    python benchmarks/step_cost.py

Everything is compared within one run, as ratios of medians over interleaved rounds, on the embedded model. The bare
work is what no implementation can leave out: T − K forward passes of the denoiser without gradient, K with gradient and
their backward passes, one decoding and its backward pass, each on tensors of the right shape and nothing around them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import alignprop
from alignprop import memory
from alignprop.rewards.colour import redness

PROMPTS = tuple(alignprop.emoji.prompts("animals"))
CPU = torch.device("cpu")


def make_trainer(arguments: argparse.Namespace, live_steps: int, checkpointing: str = "none") -> alignprop.Trainer:
    """A trainer of the embedded model whose reward costs nothing."""
    return alignprop.Trainer(
        alignprop.emoji.pipeline(),
        redness,
        PROMPTS,
        call={"num_inference_steps": arguments.steps, "guidance_scale": 3.0},
        batch_size=arguments.batch,
        estimator=alignprop.AlignProp(alignprop.Last(live_steps), checkpointing),
    )


def bare_work(pipeline: Any, batch: int, steps: int, live_steps: int) -> Callable[[], None]:
    """The model calls of one step, on random inputs, with nothing between them."""
    unet, vae = pipeline.unet, pipeline.vae
    latents = torch.randn(2 * batch, 4, 16, 16)
    context = torch.randn(2 * batch, pipeline.tokenizer.model_max_length, unet.config.cross_attention_dim)
    timestep = torch.tensor(500)

    def run() -> None:
        with torch.no_grad():
            for _ in range(steps - live_steps):
                unet(latents, timestep, context, return_dict=False)
        for step in range(live_steps):  # no gradient goes back beyond the first live step
            output = unet(latents.clone().requires_grad_(step > 0), timestep, context, return_dict=False)[0]
            output.backward(torch.ones_like(output))
        picture = vae.decode(latents[:batch].clone().requires_grad_(), return_dict=False)[0]
        picture.backward(torch.ones_like(picture))

    return run


def medians(rounds: int, *runs: Callable[[], object]) -> list[float]:
    """Median seconds of each, the runs taking turns so that a busy machine slows all of them alike."""
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for taken, run in zip(seconds, runs, strict=True):
            began = time.perf_counter()
            run()
            if turn:  # the first is a warm-up
                taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in seconds]


def step_over_bare_work(arguments: argparse.Namespace) -> None:
    """Print the ratio for K = 1, T/4 and T."""
    print(f"one training step over its bare work (T={arguments.steps}, batch {arguments.batch}, guidance)")
    for live_steps in (1, arguments.steps // 4, arguments.steps):
        trainer = make_trainer(arguments, live_steps)
        bare = bare_work(trainer.pipeline, arguments.batch, arguments.steps, live_steps)
        step_s, bare_s = medians(arguments.rounds, trainer.train_step, bare)
        print(
            f"  K={live_steps:<3} step {step_s:6.3f} s   bare {bare_s:6.3f} s   ratio {step_s / bare_s:.3f}", flush=True
        )


def prefix_over_plain_sampling(arguments: argparse.Namespace) -> None:
    """Print what the steps without gradient cost beside plain sampling."""
    trainer = make_trainer(arguments, 1)
    prompts, seeds = trainer.batch(0)

    def rollout() -> None:
        trainer.sampler.rollout(prompts, seeds, live_steps=1)

    rolled_s, plain_s = medians(arguments.rounds, rollout, lambda: trainer.sampler.sample(prompts, seeds))
    print(f"rollout with K=1, forward only, over plain sampling: {rolled_s / plain_s:.3f}", flush=True)


def peaks(arguments: argparse.Namespace) -> None:
    """Print the exact peak of live tensor bytes and the time of each mode, and what ``auto`` takes."""
    steps = arguments.steps
    print("peak of live tensor bytes in MB (seconds) of one rollout with its backward pass")
    windows = (1, steps // 4, steps)
    print("  mode    " + "".join(f"{f'K={live}':>18}" for live in windows))
    trainer = make_trainer(arguments, 1)
    prompts, seeds = trainer.batch(0)

    def run(live_steps: int, mode: Any) -> None:
        pixels = trainer.sampler.rollout(prompts, seeds, live_steps, mode).pixels
        redness(pixels, prompts).sum().backward()
        trainer.adamw.zero_grad()

    for mode in memory.FASTEST_FIRST:
        row = ""
        for live in windows:
            peak = memory.peak_bytes(lambda live=live, mode=mode: run(live, mode), CPU) / 2**20  # type: ignore[misc]
            (seconds,) = medians(2, lambda live=live, mode=mode: run(live, mode))  # type: ignore[misc]
            row += f"{f'{peak:.0f} ({seconds:.2f} s)':>18}"
        print(f"  {mode:<8}{row}", flush=True)
    for limit in (2048, 256, 64, 1):
        plan = memory.plan_memory(run, max_live_steps=steps, limit=limit * 2**20, device=CPU)
        print(f"  auto with {limit} MB takes " + ", ".join(f"{plan(live)} at K={live}" for live in windows), flush=True)


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="denoising steps T")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    step_over_bare_work(arguments)
    prefix_over_plain_sampling(arguments)
    peaks(arguments)


if __name__ == "__main__":
    main()
