"""Pipelines that cannot be aligned are refused in one sentence each, by the spec or the probe."""

import diffusers
import pytest
from diffusers import DDIMScheduler

import tiny
from alignprop.adapters import Adapter, Lora
from alignprop.probe import ProbeError, probe, require
from alignprop.rewards import as_weighted_sum
from alignprop.rollout import Sampler
from alignprop.spec import spec_of


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def refusal(pipeline):
    findings = probe(Sampler(pipeline, tiny.CALL), Adapter(pipeline, Lora()), as_weighted_sum(redness), tiny.PROMPTS)
    with pytest.raises(ProbeError) as raised:
        require(findings)
    return str(raised.value)


COMBINED = [name for name in dir(diffusers) if name.endswith("CombinedPipeline")]


@pytest.mark.parametrize("name", COMBINED)
def test_pipelines_built_of_pipelines_are_refused(sd, name):
    """They hold the models of the others under prefixed names, and run the others' loops."""
    cls = getattr(diffusers, name)
    with pytest.raises(ValueError, match=f"{name} .*pass the pipeline that runs the denoising loop itself"):
        spec_of(cls(**dict.fromkeys(cls._get_signature_keys(cls)[0], sd.vae)))


class _Overwriting(DDIMScheduler):
    """Writes the next sample into the memory of the last one."""

    def step(self, model_output, timestep, sample, **kwargs):
        return (sample.copy_(super().step(model_output, timestep, sample, **kwargs)[0]),)


def test_a_scheduler_that_overwrites_the_sample_is_not_refused(sd):
    """The denoiser gets a copy, so that this does no harm."""
    sd.scheduler = _Overwriting.from_config(sd.scheduler.config)
    sampler, adapter = Sampler(sd, tiny.CALL), Adapter(sd, Lora())
    require(probe(sampler, adapter, as_weighted_sum(redness), tiny.PROMPTS))


def test_a_denoiser_that_overwrites_what_its_gradient_needs_is_refused(sd):
    forward = sd.unet.forward

    def overwriting(*args, **kwargs):
        (output,) = forward(*args, **kwargs)
        return (output.sigmoid().mul_(2),)

    sd.unet.forward = overwriting
    message = refusal(sd)
    assert "live gradient: " in message
    assert "overwrites in place" in message
    assert "Error" not in message


def test_a_decoder_that_cuts_the_gradient_is_refused(sd):
    decode = sd.vae.decode
    sd.vae.decode = lambda latents, **kwargs: decode(latents.detach(), **kwargs)
    assert "pass no gradient on" in refusal(sd)
