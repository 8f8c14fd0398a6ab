"""Stage `judge`: a convnet that names real drawings; its features measure the quality of generated ones.

It shares nothing with the model: another architecture, other seeds, and it never sees a generated picture.
"""

from __future__ import annotations

import argparse

import augment
import numpy as np
import torch
import torch.nn.functional as F
from checkpoint import Checkpoint
from data import BUILD, load_images
from safetensors.torch import load_file, save_file
from schedule import warm_up_and_decay
from torch import Tensor

from alignprop.emoji.names import Namer

SEED = 97
BATCH = 48
LEARNING_RATE = 2e-3
WIDTHS = (24, 64, 128, 192)
WEIGHTS = BUILD.parent / "judge.safetensors"


def strongly_augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moved, tinted, blurred, noisy and partly covered pictures."""
    images = augment.moved(images, generator, degrees=15, scale=0.2, shift=0.15)
    images = augment.tinted(images, 0.25, generator)
    images = augment.saturated(images, augment.uniform(len(images), 0.3, 1.6, generator))
    if torch.rand((), generator=generator) < 0.5:
        images = augment.blurred(images, 0.3 + 1.2 * torch.rand((), generator=generator).item())
    images = augment.noisy(images, augment.uniform(len(images), 0.0, 0.08, generator), generator)
    top, left = torch.randint(0, 48, (2,), generator=generator).tolist()
    images[: len(images) // 3, :, top : top + 16, left : left + 16] = torch.rand((), generator=generator)
    return images


def train(steps: int) -> Namer:
    """Train, from the last checkpoint if there is one."""
    torch.manual_seed(SEED)
    images = (load_images() + 1) / 2
    data = np.load(BUILD / "data.npz")
    concepts = torch.from_numpy(data["concept"])
    judge = Namer(data["names"].tolist(), WIDTHS).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    schedule = warm_up_and_decay(optimizer, steps, warm_up=100, decay=0.5)
    generator = torch.Generator().manual_seed(SEED)
    parts = {"judge": judge, "optimizer": optimizer, "schedule": schedule}
    checkpoint = Checkpoint(BUILD / "judge.pt", parts, generator)
    for step in checkpoint.steps(steps):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        batch = strongly_augmented(images[rows], generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(batch)
        loss = F.cross_entropy(logits.float(), concepts[rows], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        checkpoint.log(step, loss)
    return judge


def load_judge() -> Namer:
    """The trained judge, in evaluation mode."""
    state = {name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}
    judge = Namer([str(number) for number in range(len(state["names.bias"]))], WIDTHS)
    judge.load_state_dict(state, strict=False)
    return judge.eval().requires_grad_(False)


def main() -> None:
    """Train the judge and save it in half precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    state = train(arguments.steps).state_dict()
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    save_file({name: state[name].half().contiguous() for name in state if name not in counters}, WEIGHTS)


if __name__ == "__main__":
    main()
