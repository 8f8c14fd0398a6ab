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
from torch import Tensor, nn

SEED = 97
BATCH = 48
LEARNING_RATE = 2e-3
WEIGHTS = BUILD.parent / "judge.safetensors"


class Block(nn.Module):
    """A residual block that halves the size of the picture."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, 2H, 2W) to (B, outputs, H, W)."""
        hidden = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.skip(F.avg_pool2d(x, 2)) + self.norms[1](self.second(hidden)))


class Judge(nn.Module):
    """Names the concept of a picture."""

    def __init__(self, num_concepts: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5, stride=2, padding=2)
        self.blocks = nn.Sequential(Block(24, 64), Block(64, 128), Block(128, 192))
        self.names = nn.Linear(192, num_concepts)

    def features(self, images: Tensor) -> Tensor:
        """Features (B, 192) of pictures (B, 3, 64, 64) in [0, 1], of unit length."""
        hidden = self.blocks(F.relu(self.stem(2 * images - 1)))
        return F.normalize(hidden.mean((2, 3)), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the concepts."""
        return 16 * self.names(self.features(images))


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


def train(steps: int) -> Judge:
    """Train, from the last checkpoint if there is one."""
    torch.manual_seed(SEED)
    images = (load_images() + 1) / 2
    concepts = torch.from_numpy(np.load(BUILD / "data.npz")["concept"])
    judge = Judge(int(concepts.max()) + 1).train()
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


def load_judge() -> Judge:
    """The trained judge, in evaluation mode."""
    state = {name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}
    judge = Judge(len(state["names.bias"]))
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
