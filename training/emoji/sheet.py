"""Stage `sheet`: the contact sheet and the figure of quality of the exported model.

The figure is the share of pictures whose nearest real drawing, among all styles of all drawn concepts, is of the
concept that the prompt names: in the features of the judge, and for a second opinion in a space that no one trained
(histograms of oriented gradients and mean colours).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from concepts import CONCEPTS, DRIFT, SHEET, UNSEEN
from data import BUILD, SIZE, load_images
from judge import load_judge
from PIL import Image, ImageDraw
from sampling import GUIDANCE, STEPS, sample
from torch import Tensor

from alignprop import emoji

PICTURES = 4
COLUMNS = 6
LABEL_PX = 14
SHEET_FILE = Path(__file__).parents[2] / "docs" / "assets" / "emoji-sheet.png"
QUALITY_FILE = Path(__file__).parent / "quality.json"


def gradient_features(images: Tensor) -> Tensor:
    """Histograms of 8 oriented gradients on 8 px cells and mean colours on 16 px cells, of unit length."""
    grey = F.avg_pool2d(images.mean(1, keepdim=True), 3, 1, 1)
    down, right = torch.gradient(grey, dim=(2, 3))
    sector = ((torch.atan2(down, right) / torch.pi % 1) * 8).long().clamp(max=7)
    magnitude = (down.square() + right.square()).sqrt()
    votes = torch.zeros(len(images), 8, SIZE, SIZE).scatter_(1, sector, magnitude)
    shape = F.avg_pool2d(votes, 8).flatten(1).sqrt()
    colour = (F.avg_pool2d(images, 16) - 1).flatten(1)
    return F.normalize(torch.cat((F.normalize(shape, dim=1), F.normalize(colour, dim=1)), 1), dim=1)


def nearest_concepts(generated: Tensor, real: Tensor, concepts: Tensor) -> Tensor:
    """The concept of the nearest real drawing, for features (B, D) and (N, D) of unit length."""
    return concepts[(generated @ real.T).argmax(1)]


def real_drawings() -> tuple[Tensor, Tensor]:
    """The drawings (N, 3, 64, 64) in [0, 1] of all drawn concepts, and their concepts (N,)."""
    concepts = torch.from_numpy(np.load(BUILD / "data.npz")["concept"])
    drawn = concepts < len(CONCEPTS)
    return (load_images()[drawn] + 1) / 2, concepts[drawn]


def quality(images: Tensor, wanted: Tensor) -> dict[str, object]:
    """The share of pictures that the judge and the gradients recognise, over all and by group of prompts."""
    real, concepts = real_drawings()
    judge = load_judge()
    by_judge = nearest_concepts(judge.features(images), judge.features(real), concepts) == wanted
    by_gradients = nearest_concepts(gradient_features(images), gradient_features(real), concepts) == wanted
    last = len(SHEET) - len(DRIFT)
    groups = {
        "animals": wanted < last - len(UNSEEN),
        "unseen": (wanted >= last - len(UNSEEN)) & (wanted < last),
        "drift": wanted >= last,
    }
    rates = by_judge.float().unflatten(0, (len(SHEET), -1)).mean(1).tolist()
    return {
        "top1_judge": round(by_judge.float().mean().item(), 4),
        "top1_gradients": round(by_gradients.float().mean().item(), 4),
        "top1_judge_by_group": {name: round(by_judge[rows].float().mean().item(), 4) for name, rows in groups.items()},
        "pictures": len(images),
        "real_drawings": len(real),
        "concepts": len(CONCEPTS),
        "steps": STEPS,
        "guidance": GUIDANCE,
        "below_half": [c.name for c, rate in zip(SHEET, rates, strict=True) if rate < 0.5],
    }


def contact_sheet(images: Tensor) -> Image.Image:
    """All pictures, those of one prompt side by side above its name."""
    rows = -(-len(SHEET) // COLUMNS)
    width, height = PICTURES * SIZE + 8, SIZE + LABEL_PX
    canvas = Image.new("RGB", (COLUMNS * width, rows * height), "white")
    draw = ImageDraw.Draw(canvas)
    pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    for index, concept in enumerate(SHEET):
        row, column = divmod(index, COLUMNS)
        strip = np.concatenate(list(pixels[PICTURES * index : PICTURES * (index + 1)]), 1)
        canvas.paste(Image.fromarray(strip), (column * width, row * height))
        draw.text((column * width + 4, row * height + SIZE), concept.caption, fill="#444444")
    return canvas


def main() -> None:
    """Draw the sheet, measure it, print and save the figures."""
    torch.set_num_threads(1)
    captions = [concept.caption for concept in SHEET for _ in range(PICTURES)]
    images = sample(emoji.pipeline(), captions, list(range(len(captions)))).clamp(0, 1)
    SHEET_FILE.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(images).save(SHEET_FILE, optimize=True)
    figures = quality(images, torch.arange(len(SHEET)).repeat_interleave(PICTURES))
    QUALITY_FILE.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
