"""The probe: it passes what works, and names each thing that would fail silently."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import tiny
from alignprop.adapters import Adapter, Lora
from alignprop.config import probe_trainer
from alignprop.probe import ProbeError, probe, require
from alignprop.rewards import Clamped, WeightedSum, as_weighted_sum
from alignprop.rollout import Sampler
from alignprop.surgery import RULES
from test_trainer import trainer
from zoo.stable_diffusion import ROWS


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def failures(pipeline, reward=redness):
    findings = probe(Sampler(pipeline, tiny.CALL), Adapter(pipeline, Lora()), as_weighted_sum(reward), tiny.PROMPTS)
    return {finding.name: finding.detail for finding in findings if not finding.passed}


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_3])
def test_what_works_passes_and_leaves_the_adapter_as_it_was(make):
    pipeline = make()
    adapter = Adapter(pipeline, Lora())
    before = {name: value.detach().clone() for name, value in adapter.parameters.items()}
    findings = probe(Sampler(pipeline, tiny.CALL), adapter, as_weighted_sum(redness), tiny.PROMPTS)
    assert [finding.name for finding in findings if not finding.passed] == []
    assert len(findings) == 5
    assert all(torch.equal(value, before[name]) for name, value in adapter.parameters.items())
    require(findings)


def wrapped_forward(pipeline, wrap):
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda *args, **kwargs: wrap(forward, *args, **kwargs)


def test_a_denoiser_without_gradient_is_found(sd):
    wrapped_forward(sd, torch.no_grad()(lambda forward, *args, **kwargs: forward(*args, **kwargs)))
    assert "pass no gradient on" in failures(sd)["live gradient"]


def test_a_denoiser_whose_first_call_is_cut_off_is_found(sd):
    calls = []

    def first_detached(forward, *args, **kwargs):
        calls.append(None)
        output = forward(*args, **kwargs)
        return tuple(part.detach() for part in output) if len(calls) % 2 else output

    wrapped_forward(sd, first_detached)
    assert "calls [0]" in failures(sd)["live gradient"]


def test_state_between_calls_is_found(sd):
    calls = []

    def drifting(forward, *args, **kwargs):
        calls.append(None)
        return tuple(part * (1 + 0.01 * len(calls)) for part in forward(*args, **kwargs))

    wrapped_forward(sd, drifting)
    found = failures(sd)
    assert "differs from the plain pipeline's" in found["same picture"]
    assert "changes the gradient" in found["checkpointing"]


def test_a_scheduler_that_clips_is_found(sd):
    sd.scheduler = tiny.scheduler(clip_sample=True)
    assert "clip_sample=True, which zeroes the gradient" in failures(sd)["scheduler"]


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        (lambda images, prompts: images.mean(), r"returned shape \(\)"),
        (lambda images, prompts: images.mean((1, 2, 3)) * torch.nan, "is not finite"),
        (lambda images, prompts: images.detach().mean((1, 2, 3)), "gives no gradient to the pixels"),
        (lambda images, prompts: images.round().mean((1, 2, 3)), "gradient with respect to the pixels that is zero"),
        (lambda images, prompts: [0.0] * len(prompts), r"returned \[0.0, 0.0\]; return a tensor"),
    ],
)
def test_a_reward_that_cannot_be_used_is_found(sd, reward, sentence):
    adapter = Adapter(sd, Lora())
    bad = WeightedSum({"mine": reward}, {"mine": 1.0})
    findings = probe(Sampler(sd, tiny.CALL), adapter, bad, tiny.PROMPTS, modes=["step"])
    with pytest.raises(ProbeError, match=f"reward: reward 'mine' .*{sentence}"):
        require(findings)


def greyness(images, prompts):
    return -redness(images, prompts)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def found_of(rewards, combination, weights=None):
    sd, reward = tiny.stable_diffusion(), WeightedSum(rewards, weights or dict.fromkeys(rewards, 1.0))
    findings = probe(
        Sampler(sd, tiny.CALL), Adapter(sd, Lora()), reward, tiny.PROMPTS, modes=["step"], combination=combination
    )
    return next(finding for finding in findings if finding.name == "reward")


@pytest.mark.parametrize("combination", ["sum", *RULES])
def test_rewards_that_cancel_are_found(combination):
    opposite = {"redness": redness, "greyness": greyness}
    found = found_of(opposite, combination)
    assert not found.passed
    assert found.detail.startswith(f"redness and greyness pull in opposite directions, and combination={combination}")
    assert ("weigh them differently" in found.detail) == (combination == "sum")
    two_to_one = found_of(opposite, combination, {"redness": 2.0, "greyness": 1.0})
    assert two_to_one.passed == (combination == "sum")  # the rules leave nothing of opposites, whatever their lengths
    assert "33% of their length is left" in two_to_one.detail or combination != "sum"
    assert found_of({**opposite, "brightness": brightness}, combination).passed == (combination != "mgda")


@pytest.mark.parametrize(("combination", "passed"), [("sum", True), ("pcgrad", False)])
def test_a_trainer_is_probed_as_it_combines_its_rewards(combination, passed):
    reward = WeightedSum({"redness": redness, "greyness": greyness}, {"redness": 2.0, "greyness": 1.0})
    findings = probe_trainer(trainer(reward=reward, combination=combination))
    assert [finding.name for finding in findings if not finding.passed] == ([] if passed else ["reward"])


def test_opposite_rewards_with_targets_do_not_cancel():
    opposite = {"redness": Clamped(redness, -1.0), "greyness": Clamped(greyness, 1.0)}  # one has reached its target
    found = found_of(opposite, "sum")
    assert found.passed
    assert "100% of their length is left" in found.detail
    reached = {"redness": Clamped(redness, -1.0), "greyness": Clamped(greyness, -1.0)}  # both have
    found = found_of(reached, "sum")
    assert found.passed
    assert "100% of their length is left" in found.detail


@pytest.mark.parametrize("name", ["Stable Diffusion 1.5", "Kandinsky 3"])
def test_rounding_in_half_precision_is_no_failure_though_the_decoder_is_in_fp32(name):
    """The dtype that diffusers tells of a pipeline is that of its first part, which is the decoder of Kandinsky 3."""
    row = next(row for row in ROWS if row.name == name)
    pipeline = row.build(torch.float16)
    adapter, sampler = Adapter(pipeline, Lora()), Sampler(pipeline, row.call)
    adapter.spec.decoder_of(pipeline).to(torch.float32)

    def other_kernels(forward, *args, **kwargs):
        pipeline.unet.set_attn_processor(AttnProcessor() if torch.is_grad_enabled() else AttnProcessor2_0())
        return forward(*args, **kwargs)

    wrapped_forward(pipeline, other_kernels)
    findings = probe(sampler, adapter, as_weighted_sum(redness), row.prompts, modes=("none", "step"))
    assert [finding for finding in findings if not finding.passed] == []
    error = (sampler.rollout(row.prompts, [0, 1]).pixels - sampler.sample(row.prompts, [0, 1])).abs().max()
    assert error > 1e-5
