"""Stage `names`: a convnet that names what a drawing shows, the second judge of the package beside the CLIP.

It shares nothing with the CLIP, and it never sees a generated picture: it learns on real drawings, on their round trips
through the autoencoder, and on pictures that show nothing, for which it has a class. One style of each thing that the
model does not draw is held out.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import augment
import numpy as np
import torch
import torch.nn.functional as F
from checkpoint import Checkpoint
from concepts import ANIMALS, CONCEPTS, SHEET, STYLE_WORDS, STYLES, UNSEEN
from data import BUILD, load_images
from diffusers import StableDiffusionPipeline
from export import latest_pipeline
from nonsense import NONSENSE
from safetensors.torch import save_file
from sampling import GUIDANCE
from schedule import warm_up_and_decay
from torch import Tensor

from alignprop.emoji.names import STYLE_WORDS as PACKAGE_STYLE_WORDS
from alignprop.emoji.names import Namer
from alignprop.rollout import Sampler

SEED = 101
DRAWN, OTHERS, NOTHING = 44, 10, 10
"""Pictures of a batch: of the things that it names, of other things, and of nothing."""

LEARNING_RATE = 2e-3
WIDTHS = (24, 48, 88, 128)
SMOOTHING = 0.1
"""Of the labels: it bounds the log-odds, so that the judge does not saturate."""

NONE = len(CONCEPTS)
LABELS = [concept.name for concept in CONCEPTS] + ["none of these"]
SHEET_SHARE = 0.65
"""Of the drawings, those of things that the model draws."""

assert tuple(STYLE_WORDS[style] for style in STYLES) == PACKAGE_STYLE_WORDS


def held_out(concepts: Tensor, styles: Tensor) -> Tensor:
    """One drawing of each thing that is named but not drawn by the model."""
    return (concepts >= len(SHEET)) & (concepts < NONE) & (styles == concepts % len(STYLES))


class Drawings:
    """Real drawings and their round trips, and the batches of the training."""

    def __init__(self, generator: torch.Generator) -> None:
        data = np.load(BUILD / "data.npz")
        self.concepts, self.styles = torch.from_numpy(data["concept"]), torch.from_numpy(data["style"])
        round_trips = torch.load(BUILD / "round_trips.pt").float() / 255
        self.images = torch.stack(((load_images() + 1) / 2, round_trips))
        self._generator = generator
        self._shares = self._weights(data["names"].tolist())

    def _weights(self, names: list[str]) -> Tensor:
        """Sampling weights of the drawings: of the things that are named, and of the others."""
        same = torch.tensor([name.endswith(" body") for name in names])[self.concepts]  # a cat as well
        named = (self.concepts < NONE) & ~held_out(self.concepts, self.styles)
        sheet = self.concepts < len(SHEET)
        own = SHEET_SHARE * sheet / sheet.sum() + (1 - SHEET_SHARE) * (named & ~sheet) / (named & ~sheet).sum()
        return torch.stack((own, (~same & (self.concepts >= NONE)).float()))

    def _drawn(self, share: int, count: int) -> tuple[Tensor, Tensor]:
        rows = torch.multinomial(self._shares[share], count, replacement=True, generator=self._generator)
        copies = torch.randint(2, (count,), generator=self._generator)
        return self.images[copies, rows], self.concepts[rows]

    def batch(self) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, 64, 64) and labels (B,)."""
        images, labels = self._drawn(0, DRAWN)
        others, _ = self._drawn(1, OTHERS)
        images = strongly_augmented(torch.cat((images, others)), self._generator)
        labels = torch.cat((labels, torch.full((OTHERS + NOTHING,), NONE)))
        return torch.cat((images, self._nothing())), labels

    def _nothing(self) -> Tensor:
        parts = []
        for count in (NOTHING // 2, NOTHING - NOTHING // 2):
            kind = list(NONSENSE)[int(torch.randint(len(NONSENSE), (), generator=self._generator))]
            parts.append(NONSENSE[kind](self._drawn(0, count)[0], self._generator))
        return torch.cat(parts)


def strongly_augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moved, tinted, blurred, noisy and partly covered pictures."""
    draw = functools.partial(torch.rand, (), generator=generator)
    images = augment.moved(images, generator, degrees=15, scale=0.2, shift=0.15)
    images = augment.tinted(images, 0.3, generator)
    images = augment.saturated(images, augment.uniform(len(images), 0.0, 1.8, generator))
    if draw() < 0.5:
        images = augment.blurred(images, 0.3 + 1.2 * draw().item())
    images = augment.noisy(images, augment.uniform(len(images), 0.0, 0.08, generator), generator)
    top, left = torch.randint(0, 48, (2,), generator=generator).tolist()
    images[::4, :, top : top + 16, left : left + 16] = draw()
    return images


def train(steps: int) -> Namer:
    """Train, from the last checkpoint if there is one."""
    torch.manual_seed(SEED)
    namer = Namer(LABELS, WIDTHS).train().to(memory_format=torch.channels_last)  # a third faster on a CPU
    optimizer = torch.optim.AdamW(namer.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = warm_up_and_decay(optimizer, steps, warm_up=100, decay=0.6)
    generator = torch.Generator().manual_seed(SEED)
    drawings = Drawings(generator)
    parts = {"namer": namer, "optimizer": optimizer, "schedule": schedule}
    checkpoint = Checkpoint(BUILD / "names.pt", parts, generator)
    for step in checkpoint.steps(steps):
        images, labels = drawings.batch()
        with torch.autocast("cpu", torch.bfloat16):
            logits = namer(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        checkpoint.log(step, loss)
    return namer.eval().requires_grad_(False)


def save(namer: Namer, folder: Path) -> None:
    """Write a namer as `Namer.from_pretrained` reads it, in half precision."""
    folder.mkdir(exist_ok=True)
    state = namer.state_dict()
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    state = {name: state[name].half().contiguous() for name in state if name not in counters}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"labels": namer.labels, "widths": WIDTHS}) + "\n")


def base_samples(pipe: StableDiffusionPipeline, eta: float, seeds: range) -> tuple[Tensor, Tensor]:
    """Pictures of the 45 animals and the 8 unseen ones as recipes sample them, and their labels."""
    things = [*ANIMALS, *UNSEEN]
    sampler = Sampler(pipe, {"num_inference_steps": 5, "guidance_scale": GUIDANCE, "eta": eta})
    captions = [thing.caption for thing in things]
    images = [sampler.sample(captions, [1000 * seed + n for n in range(len(things))]).clamp(0, 1) for seed in seeds]
    return torch.cat(images), torch.arange(len(things)).repeat(len(seeds))


@torch.no_grad()
def figures(namer: Namer, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, mean log-probability of the labels and how well the probabilities are calibrated."""
    logits = torch.cat([namer(part) for part in images.split(100)])
    chosen = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    confidence, found = logits.softmax(1).max(1)
    right = (found == labels).float()
    return {
        "count": len(images),
        "accuracy": round(right.mean().item(), 4),
        "mean log-probability": round(chosen.mean().item(), 3),
        "lowest tenth": round(chosen.quantile(0.1).item(), 3),
        "mean confidence": round(confidence.mean().item(), 4),
        "called none": round((found == NONE).float().mean().item(), 4),
    }


@torch.no_grad()
def report(namer: Namer) -> dict[str, dict[str, float]]:
    """The figures on real drawings, base samples, their damages, and nonsense that is asked to be an animal."""
    generator = torch.Generator().manual_seed(SEED + 1)
    drawings = Drawings(generator)
    rows = held_out(drawings.concepts, drawings.styles)
    drawn = drawings.concepts < len(SHEET)
    table = {
        "held-out drawings": figures(namer, drawings.images[0, rows], drawings.concepts[rows]),
        "drawings of what the model draws": figures(namer, drawings.images[0, drawn], drawings.concepts[drawn]),
    }
    pipe = latest_pipeline()
    for eta in (0.0, 1.0):
        images, labels = base_samples(pipe, eta, range(4))
        last = torch.arange(len(images)) % (len(ANIMALS) + len(UNSEEN)) >= len(ANIMALS)
        table[f"45 animals, eta {eta:.0f}"] = figures(namer, images[~last], labels[~last])
        table[f"8 unseen animals, eta {eta:.0f}"] = figures(namer, images[last], labels[last])
    for deviation in (1.0, 2.0, 3.0):
        table[f"blurred by {deviation:.0f} px"] = figures(namer, augment.blurred(images, deviation), labels)
    for deviation in (0.1, 0.2, 0.4):
        table[f"noise of {deviation}"] = figures(namer, augment.noisy(images, deviation, generator), labels)
    table["another animal"] = figures(namer, images, labels.roll(1))
    for kind, nonsense in NONSENSE.items():
        table[kind] = figures(namer, nonsense(images, generator), labels)
    return table


def main() -> None:
    """Train the namer, save it where the package finds it, and measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    save(train(arguments.steps), BUILD / "names")
    table = report(Namer.from_pretrained(BUILD / "names").eval())
    (BUILD.parent / "names.json").write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
