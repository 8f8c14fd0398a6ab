"""Stage `gold`: trains the judge of `gold_judge.py`, for tests and figures only.

The ratings of every sixth thing, others than the aesthetic head's, are held out; their names are not.
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.nn.functional as F
from checkpoint import Checkpoint
from data import BUILD
from gold_batches import IGNORED, POOL, Batches
from gold_figures import report
from gold_judge import WEIGHTS, GoldNet, load_gold
from safetensors.torch import save_file
from schedule import warm_up_and_decay
from torch import nn

SEED = 137
LEARNING_RATE = 2e-3
NAMES_WEIGHT = 0.4
SMOOTHING = 0.1


def train(steps: int) -> GoldNet:
    """Train, from the last checkpoint if there is one."""
    torch.manual_seed(SEED)
    net = GoldNet().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = warm_up_and_decay(optimizer, steps, warm_up=100, decay=0.7)
    generator = torch.Generator().manual_seed(SEED)
    batches = Batches(generator)
    parts = {"net": net, "optimizer": optimizer, "schedule": schedule}
    checkpoint = Checkpoint(BUILD / "gold.pt", parts, generator)
    for step in checkpoint.steps(steps):
        images, rated, labels = batches.draw()
        with torch.autocast("cpu", torch.bfloat16):
            found, logits = net(images)
        shown = ~rated.isnan()
        naming = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING, ignore_index=IGNORED)
        loss = F.smooth_l1_loss(found[shown], rated[shown]) + NAMES_WEIGHT * naming
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        checkpoint.log(step, loss)
    return net.eval().requires_grad_(False)


def save(net: GoldNet) -> None:
    """Write the weights in half precision."""
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, WEIGHTS)


def main() -> None:
    """Make the pool, train the judge, save it and measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    POOL.make()
    save(train(arguments.steps))
    table = report(load_gold().net, SEED + 1)
    WEIGHTS.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
