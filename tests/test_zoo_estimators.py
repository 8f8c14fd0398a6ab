"""Every estimator on every pipeline of the zoo: a gradient, or one sentence that says why not."""

import re

import pytest
import torch

from alignprop.estimators import DDPO, RWR, AsReleased, DraftLV, DRTune, FlowBPSparse, LeapAlign, MicroBatch, ReFL, Step
from alignprop.rewards import as_weighted_sum
from test_zoo import SEEDS, each, made

ESTIMATORS = {
    "alignprop-as-released": lambda: AsReleased(low=0, high=1),
    "draft-lv": lambda: DraftLV(copies=1),
    "drtune": lambda: DRTune(early_stop=2),
    "flowbp-sparse": lambda: FlowBPSparse(steps=2),
    "leapalign": LeapAlign,
    "refl": ReFL,
    "ddpo": lambda: DDPO(min_count=2),
    "rwr": RWR,
}
TOLD = {
    "stable-cascade-decoder": "does not say how a clean picture follows|is not stepped through its schedule one by one",
    "consistency-model": "does not say how a clean picture follows from one denoising step",
    "sana-sprint": "does not say how a clean picture follows from one denoising step",
    "stable-audio": "does not say how a clean picture follows from one denoising step",
    "sd-turbo": "at least 2 denoising steps; there is 1|early_stop=2 needs at most 1, the number of denoising steps",
}
"""Pipelines with schedulers of their own kind or a single step, and what estimators that need more say of them."""
NO_NOISE = "estimator ddpo learns from the noise of denoising steps, and .* draws none: set sampling.eta=1"


def attempt(row, name):
    """The norm of the gradient, or the sentence of the refusal."""
    adapter, sampler = made(row)

    def reward(images, prompts):
        return images.flatten(1).mean(1)

    reward.modality = row.modality

    def each_batch(work):
        return [work(MicroBatch(0, row.prompts, SEEDS, torch.Generator().manual_seed(0)))]

    try:
        next(ESTIMATORS[name]().updates(Step(sampler, as_weighted_sum(reward), each_batch, 1, lambda: 0.5)))
    except ValueError as error:
        return str(error)
    parts = [value.grad for value in adapter.parameters.values() if value.grad is not None]
    return torch.stack([part.norm() for part in parts]).norm().item() if parts else 0.0


@each()
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_gradient_or_a_sentence(row, name):
    outcome = attempt(row, name)
    if not isinstance(outcome, str):
        assert 0 < outcome < 1e6
    elif name == "ddpo":
        assert re.search(NO_NOISE, outcome)
    else:
        assert re.search(TOLD.get(row.id, "^no refusal is known$"), outcome), outcome
