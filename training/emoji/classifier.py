"""Stage `classifier`: trains the style classifier on everything that the aesthetic head has been shown.

Damaged and collapsed pictures are of no style, so that the way to a style leads to good pictures of it.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import numpy as np
import ratings
import torch
from concepts import STYLES
from data import BUILD
from head import Features, train
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel

from alignprop.emoji import style
from alignprop.emoji.style import StyleClassifier

SEED = 67
LEARNING_RATE = 2e-3
SMOOTHING = 0.02
"""Of the labels; it bounds the log-odds, and so the slope from one style to another."""

CLEAN = ("real", "real, moved", "round trip", "round trip, moved", "generated")
GROUP_WEIGHTS = {"real": 1.0, "round trip": 1.0, "generated": 1.0}
"""Weights of the kinds that begin so, in training; all that is in no style weighs `NONE_WEIGHT`."""

NONE_WEIGHT = 1.0
LOST = 0.5
"""Share of its rating above 1 that a damaged picture keeps at most; one that keeps more is left out."""

NONE = len(STYLES)
LEFT_OUT = -1

assert tuple(STYLES) == style.STYLES


def labels(shown: Features) -> Tensor:
    """Class of every picture: its style if it is clean, `NONE` if it is damaged, `LEFT_OUT` if it is in between."""
    kinds, styles = np.array(shown.kinds), shown["styles"]
    clean = torch.from_numpy(np.isin(kinds, CLEAN))
    whole = torch.where(styles < 0, torch.tensor(torch.inf), ratings.STYLE_RATINGS[styles])
    spoilt = (shown["ratings"] - 1) < LOST * (whole - 1)
    labelled = torch.where(clean, styles, torch.where(spoilt, NONE, LEFT_OUT))
    return labelled.masked_fill(torch.from_numpy(kinds == "between"), LEFT_OUT)


def weights(shown: Features, target: Tensor) -> Tensor:
    """Sampling weights: balanced between groups of kinds, none for held-out concepts and what is left out."""
    groups = [next((group for group in GROUP_WEIGHTS if kind.startswith(group)), "none") for kind in shown.kinds]
    used = (target != LEFT_OUT) & ~ratings.held_out(shown["concepts"])
    counts = {group: sum(u for g, u in zip(groups, used.tolist(), strict=True) if g == group) for group in set(groups)}
    balanced = [GROUP_WEIGHTS.get(group, NONE_WEIGHT) / counts[group] for group in groups]
    return torch.tensor(balanced).masked_fill(~used, 0.0)


def fit(shown: Features, steps: int) -> StyleClassifier:
    """Train a new classifier on everything shown."""
    torch.manual_seed(SEED)
    features, target = shown["features"], labels(shown)
    model = StyleClassifier(features.shape[1])
    loss_of = functools.partial(torch.nn.functional.cross_entropy, label_smoothing=SMOOTHING)
    train(model, features, target, weights(shown, target), loss_of, LEARNING_RATE, steps)
    return model


@torch.no_grad()
def report(model: StyleClassifier, shown: Features) -> dict[str, object]:
    """Accuracy by kind and by class, on held-out concepts only."""
    target, kinds = labels(shown), np.array(shown.kinds)
    right = (model(shown["features"]).argmax(1) == target).float()
    used = (target != LEFT_OUT) & ratings.held_out(shown["concepts"])
    clean = torch.from_numpy(np.isin(kinds, CLEAN))
    rows = {kind: used & torch.from_numpy(kinds == kind) for kind in sorted(set(shown.kinds))}
    rows |= {f"style {name}": used & (target == index) for index, name in enumerate(STYLES)}
    rows |= {"all in a style": used & clean, "all in none": used & ~clean}
    return {
        name: {"count": int(chosen.sum()), "accuracy": round(right[chosen].mean().item(), 4)}
        for name, chosen in rows.items()
        if chosen.any()
    }


def save(model: StyleClassifier, folder: Path) -> None:
    """Write a classifier as `StyleClassifier.from_pretrained` reads it."""
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_features": len(model.mean)}) + "\n")


def load_shown() -> Features:
    """What the stage `head` has shown its head."""
    shown = Features(CLIPModel.from_pretrained(BUILD / "clip").eval().requires_grad_(False))
    shown.load_state_dict(torch.load(BUILD / "head.pt")["shown"])
    return shown


def main() -> None:
    """Train in one go: it takes seconds, so a run that was stopped is started again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shown = load_shown()
    model = fit(shown, arguments.steps)
    save(model, BUILD / "classifier")
    table = report(model, shown)
    (BUILD.parent / "classifier.json").write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
