"""Every estimator on every pipeline of the zoo: a gradient, or one sentence that says why not."""

import re

import pytest
import torch

from alignprop.estimators import DDPO, RWR, AsReleased, DraftLV, DRTune, FlowBPSparse, LeapAlign, MicroBatch, ReFL, Step
from alignprop.rewards import as_weighted_sum
from test_zoo import SEEDS, each, made
from zoo import ROWS

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
NO_ESTIMATE = "does not say how a clean picture follows from one denoising step"
ONE_STEP = "at least 2 denoising steps; there is 1"
REFUSED = {
    "sd-turbo": {"draft-lv": ONE_STEP, "leapalign": ONE_STEP, "drtune": "early_stop=2 needs at most 1, the number"},
    "stable-cascade-decoder": {
        **dict.fromkeys(("draft-lv", "leapalign"), "is not stepped through its schedule one by one"),
        **dict.fromkeys(("drtune", "refl", "rwr"), NO_ESTIMATE),
    },
    "consistency-model": dict.fromkeys(("drtune", "leapalign", "refl", "rwr"), NO_ESTIMATE),
    "sana-sprint": dict.fromkeys(("draft-lv", "drtune", "leapalign", "refl", "rwr"), NO_ESTIMATE),
    "stable-audio": dict.fromkeys(("drtune", "leapalign", "refl", "rwr"), NO_ESTIMATE),
}
"""Pipelines with schedulers of their own kind or a single step, and what estimators that need more say of them."""
WITHOUT_NOISE = {
    "CogVideoXDDIMScheduler": ("cogvideox", "cogview3+"),  # it ignores its eta
    "DDIMScheduler": ("dit",),  # whose call takes no eta
    "DPMSolverMultistepScheduler": ("pixart-alpha", "sana"),  # the variant that solves the ODE
    "EDMDPMSolverMultistepScheduler": ("stable-audio",),
    "EulerDiscreteScheduler": ("sd-turbo", "sdxl-with-one-text-encoder"),
    "FlowMatchEulerDiscreteScheduler": (
        *("auraflow", "chroma", "cogview4", "flux", "flux-with-true-guidance", "flux2", "flux2-klein", "hunyuanvideo"),
        *("kandinsky-5", "ltx", "lumina2", "mochi", "qwenimage", "stable-diffusion-3", "z-image"),
    ),
    "UniPCMultistepScheduler": ("wan-2.1", "wan-2.2"),
}
"""Deterministic schedulers, which give ddpo nothing to learn from, and the pipelines that come with them.

All other pipelines draw noise in their denoising steps, of themselves or with the eta that ddpo asks for.
"""


def refusal(row, name):
    """The sentence, as a pattern, by which an estimator has to refuse a pipeline; None where it has to learn."""
    if name != "ddpo":
        return REFUSED.get(row.id, {}).get(name)
    scheduler = next((known for known, ids in WITHOUT_NOISE.items() if row.id in ids), None)
    return scheduler and f"ddpo learns from the noise of denoising steps, and {scheduler} draws none: set sampling"


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
def test_a_gradient_or_the_sentence_that_is_due(row, name):
    outcome, due = attempt(row, name), refusal(row, name)
    if due is None:
        assert isinstance(outcome, float) and 0 < outcome < 1e6, outcome
    else:
        assert isinstance(outcome, str) and re.search(due, outcome), outcome


def test_the_lists_of_refusals_are_of_this_zoo():
    listed = [*REFUSED, *(row for rows in WITHOUT_NOISE.values() for row in rows)]
    assert set(listed) <= {row.id for row in ROWS}
    assert {name for told in REFUSED.values() for name in told} <= set(ESTIMATORS)
