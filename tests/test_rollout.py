"""Seams and rollout: exact gradients, against finite differences, an independent loop and the plain pipeline."""

import gc
import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import tiny
from alignprop.adapters import Adapter, Lora
from alignprop.memory import LiveBytes
from alignprop.rollout import Sampler, rollout
from alignprop.seams import CHECKPOINTING_MODES

SCHEDULERS = {
    "ddim": (DDIMScheduler, {}),
    "ddim-v": (DDIMScheduler, {"prediction_type": "v_prediction"}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "dpm++-sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "deis": (DEISMultistepScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "heun": (HeunDiscreteScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "flow-match": (FlowMatchEulerDiscreteScheduler, None),
}
# The last ones round the sample to float32 inside their step, which bounds what a finite difference can show.
EXACT, IN_FLOAT32 = (1e-4, 1e-6), (1e-3, 2e-3)
DIFFERENCE = dict.fromkeys(SCHEDULERS, EXACT) | dict.fromkeys(
    ("euler", "euler-ancestral", "dpm++", "dpm++-sde", "flow-match"), IN_FLOAT32
)
MULTISTEP = ("dpm++", "unipc", "deis", "pndm", "heun")


def pipeline_with(name):
    """A tiny pipeline in float64 whose scheduler is the one named."""
    cls, config = SCHEDULERS[name]
    if config is None:
        return tiny.stable_diffusion_3(torch.float64)
    pipeline = tiny.stable_diffusion(torch.float64)
    pipeline.scheduler = tiny.scheduler(cls, **config)
    return pipeline


def perturbed(pipeline, **lora):
    """The adapter with weights that have an effect: a fresh one has none."""
    adapter = Adapter(pipeline, Lora(**lora))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
    return adapter


def contrast(pixels):
    """A scalar in which every pixel counts differently."""
    return (pixels.flatten() * torch.linspace(-1, 1, pixels.numel(), dtype=pixels.dtype)).sum()


def gradient(value, adapter):
    parts = torch.autograd.grad(value, list(adapter.parameters.values()), allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, adapter.parameters.values(), strict=True)]
    return torch.cat([part.flatten() for part in parts])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def some_direction(exact):
    """A random direction that leans to the gradient, so that the slope is not lost in rounding."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(len(exact), generator=generator, dtype=torch.float64) + 10 * exact / exact.norm()


def slope(function, adapter, direction, h=1e-4):
    """Finite difference of ``function`` along a direction of the adapter's weights, central and of fourth order."""
    values = list(adapter.parameters.values())
    parts = direction.split([value.numel() for value in values])

    def at(distance):
        with torch.no_grad():
            for value, part in zip(values, parts, strict=True):
                value.add_(distance * part.view_as(value))
            result = function().item()
            for value, part in zip(values, parts, strict=True):
                value.sub_(distance * part.view_as(value))
        return result

    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_full_gradient_is_the_finite_difference_through_guidance_and_vae(sd64, eta):
    adapter, sampler = perturbed(sd64), Sampler(sd64, {**tiny.CALL, "num_inference_steps": 6, "eta": eta})
    exact = gradient(contrast(sampler.rollout(tiny.PROMPTS, [0, 1]).pixels), adapter)
    pixels = sampler.rollout(tiny.PROMPTS, [0, 1]).pixels
    assert pixels.min() > 0 and pixels.max() < 1  # no clamping, which the gradient is told to ignore
    direction = some_direction(exact)
    measured = slope(lambda: contrast(sampler.rollout(tiny.PROMPTS, [0, 1]).pixels), adapter, direction)
    assert measured == pytest.approx((exact @ direction).item(), rel=1e-6)


def ddim_by_hand(pipeline, prompts, seeds, *, steps, guidance, live):
    """DDIM (arXiv 2010.02502, eq. 12, eta 0) without the library, the noise prediction cut before the window."""
    encoded, negative = pipeline.encode_prompt(prompts, "cpu", 1, True)
    context = torch.cat([negative, encoded])
    noises = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s), dtype=context.dtype) for s in seeds]
    x_t = torch.cat(noises)
    config = pipeline.scheduler.config
    betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float32) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    stride = 1000 // steps
    for i, t in enumerate(reversed([k * stride + config.steps_offset for k in range(steps)])):
        eps_negative, eps = pipeline.unet(torch.cat([x_t, x_t]), t, context).sample.chunk(2)
        eps = eps_negative + guidance * (eps - eps_negative)
        eps = eps if i >= steps - live else eps.detach()
        a_t, a_next = alphas[t], alphas[t - stride] if t >= stride else alphas[0]
        x_0 = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5
        x_t = a_next**0.5 * x_0 + (1 - a_next) ** 0.5 * eps
    return pipeline.vae.decode(x_t / pipeline.vae.config.scaling_factor).sample / 2 + 0.5


@pytest.mark.parametrize("live", [1, 2, 4, 6])
def test_truncated_gradient_is_that_of_a_loop_written_by_hand(sd64, live):
    adapter = perturbed(sd64)
    by_hand = ddim_by_hand(sd64, tiny.PROMPTS, [3, 4], steps=6, guidance=5.0, live=live)
    sampler = Sampler(sd64, {**tiny.CALL, "num_inference_steps": 6})
    ours = sampler.rollout(tiny.PROMPTS, [3, 4], live)
    assert torch.allclose(ours.pixels, by_hand, atol=1e-6)  # the scheduler keeps its alphas in float32
    assert relative(gradient(contrast(ours.pixels), adapter), gradient(contrast(by_hand), adapter)) < 1e-6
    assert (ours.calls, ours.live_calls, ours.num_steps, ours.live_steps) == (6, live, 6, live)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_gives_the_plain_picture_and_the_exact_gradient(name):
    pipeline = pipeline_with(name)
    adapter, sampler = perturbed(pipeline), Sampler(pipeline, tiny.CALL)
    plain = sampler.sample(tiny.PROMPTS, [0, 1])
    ours = sampler.rollout(tiny.PROMPTS, [0, 1])
    assert torch.equal(ours.pixels.detach().float(), plain)
    assert ours.num_steps == {"heun": 7, "pndm": 5}.get(name, 4)
    exact = gradient(contrast(ours.pixels), adapter)
    direction = some_direction(exact)
    h, rel = DIFFERENCE[name]
    measured = slope(lambda: contrast(sampler.rollout(tiny.PROMPTS, [0, 1]).pixels), adapter, direction, h)
    assert measured == pytest.approx((exact @ direction).item(), rel=rel)


@pytest.mark.parametrize("name", MULTISTEP)
def test_the_window_keeps_the_paths_through_a_multistep_scheduler(name):
    """The truncated gradient is the derivative with the early denoiser outputs held fixed: nothing else is cut."""
    pipeline = pipeline_with(name)
    adapter, sampler = perturbed(pipeline), Sampler(pipeline, tiny.CALL)
    forward, recorded = pipeline.unet.forward, []

    def recording(*args, **kwargs):
        output = forward(*args, **kwargs)
        recorded.append(tuple(part.detach().clone() for part in output))
        return output

    pipeline.unet.forward = recording
    ours = sampler.rollout(tiny.PROMPTS, [0, 1], 2)
    pipeline.unet.forward, calls = forward, []

    def replaying(*args, **kwargs):
        calls.append(None)
        early = len(calls) <= ours.num_steps - 2
        return recorded[len(calls) - 1] if early else forward(*args, **kwargs)

    def value():
        calls.clear()
        return contrast(sampler.rollout(tiny.PROMPTS, [0, 1]).pixels)

    exact = gradient(contrast(ours.pixels), adapter)
    direction = some_direction(exact)
    pipeline.unet.forward = replaying
    h, rel = DIFFERENCE[name]
    assert slope(value, adapter, direction, h) == pytest.approx((exact @ direction).item(), rel=rel)


@pytest.mark.parametrize("mode", CHECKPOINTING_MODES)
@pytest.mark.parametrize("live", [1, 3, 4])
def test_checkpointing_changes_nothing_even_with_dropout(mode, live):
    pipeline = tiny.stable_diffusion(torch.float64, dropout=0.2)
    adapter = perturbed(pipeline, dropout=0.2)
    pipeline.unet.train()
    sampler = Sampler(pipeline, tiny.CALL)

    def run(mode):
        torch.manual_seed(0)
        return gradient(contrast(sampler.rollout(tiny.PROMPTS, [0, 1], live, mode).pixels), adapter)

    reference = run("none")
    assert relative(run(mode), reference) < 1e-12
    torch.manual_seed(1)
    other = gradient(contrast(sampler.rollout(tiny.PROMPTS, [0, 1], live).pixels), adapter)
    assert relative(other, reference) > 1e-3  # dropout is at work


@pytest.mark.parametrize(
    ("mode", "live", "forwards"), [("none", 4, 4), ("step", 1, 4), ("step", 3, 6), ("block", 1, 4)]
)
def test_nothing_is_recomputed_needlessly(sd, mode, live, forwards):
    """Whole forwards of the denoiser, backward included: the last live step is never run twice."""
    adapter, count = perturbed(sd), []
    forward = sd.unet.forward
    sd.unet.forward = lambda *args, **kwargs: (count.append(None), forward(*args, **kwargs))[1]
    gradient(contrast(Sampler(sd, tiny.CALL).rollout(tiny.PROMPTS, [0, 1], live, mode).pixels), adapter)
    assert len(count) == forwards


def attributes(pipeline):
    parts = [
        pipeline,
        pipeline.scheduler,
        pipeline.vae,
        pipeline.unet,
        *pipeline.unet.modules(),
        *pipeline.vae.modules(),
    ]
    private = {"_parameters", "_buffers", "_modules"}
    return [{name: id(value) for name, value in vars(part).items() if name not in private} for part in parts]


def test_everything_is_restored_after_success_error_and_interrupt(sd):
    sampler = Sampler(sd, tiny.CALL)
    sampler.sample(tiny.PROMPTS, [0, 1])
    before = attributes(sd)

    def check(error):
        def interrupt(pipeline, step, timestep, kwargs):
            if error and step == 2:
                raise error
            return kwargs

        if error is None:
            sampler.rollout(tiny.PROMPTS, [0, 1], 3, "nested", callback_on_step_end=interrupt)
        else:
            with pytest.raises(error):
                sampler.rollout(tiny.PROMPTS, [0, 1], 3, "nested", callback_on_step_end=interrupt)
        after = attributes(sd)
        # A call leaves its own arguments on the pipeline; these are the pipeline's, not the seams'.
        own = {
            "_guidance_scale",
            "_guidance_rescale",
            "_clip_skip",
            "_cross_attention_kwargs",
            "_interrupt",
            "_num_timesteps",
        }
        for old, new in zip(before, after, strict=True):
            assert {k: v for k, v in old.items() if k not in own} == {k: v for k, v in new.items() if k not in own}
        assert torch.is_grad_enabled()

    for error in (None, RuntimeError, KeyboardInterrupt):
        check(error)
    with torch.no_grad():
        rollout(sd, "a cat", num_inference_steps=2)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_rollout_within_a_rollout_disturbs_neither(name, at):
    pipeline = pipeline_with(name)
    adapter, sampler = perturbed(pipeline), Sampler(pipeline, tiny.CALL)
    alone = [sampler.rollout(tiny.PROMPTS, [0, 1], 1), sampler.rollout(tiny.PROMPTS, [5, 6], 3)]
    inner = []

    def another(pipeline, step, timestep, kwargs):
        if step == at:
            inner.append(sampler.rollout(tiny.PROMPTS, [5, 6], 3))
        return kwargs

    outer = sampler.rollout(tiny.PROMPTS, [0, 1], 1, callback_on_step_end=another)
    for nested, expected in zip([outer, *inner], alone, strict=True):
        assert torch.equal(nested.pixels, expected.pixels)
        counts = [(r.num_steps, r.live_steps, r.calls, r.live_calls) for r in (nested, expected)]
        assert counts[0] == counts[1]
        gradients = [gradient(contrast(r.pixels), adapter) for r in (nested, expected)]
        assert torch.equal(*gradients)


def test_positional_arguments_and_output_types_are_the_pipelines_own(sd):
    generator = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    positional = rollout(sd, ["a cat"], 16, 16, 3, generator=generator(), output_type="pil")
    named = rollout(sd, prompt=["a cat"], num_inference_steps=3, generator=generator(), output_type="np")
    assert torch.equal(positional.pixels, named.pixels)
    assert positional.num_steps == 3
    assert positional.output.images[0].size == (16, 16) and named.output.images.shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match="decoded no picture"):
        rollout(sd, "a cat", num_inference_steps=2, output_type="latent")


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(sd):
    sampler = Sampler(sd, {**tiny.CALL, "eta": 1.0})
    together = sampler.sample(["a cat", "a dog", "a fox"], [7, 8, 9])
    for place, (prompt, seed) in enumerate([("a cat", 7), ("a dog", 8), ("a fox", 9)]):
        assert torch.allclose(sampler.sample([prompt], [seed])[0], together[place], atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_scheduler_step_keeps_its_signature(sd):
    """Pipelines look at it, and drop eta and generator where they do not see them."""
    adapter = perturbed(sd)
    seen = {}

    def look(pipeline, step, timestep, kwargs):
        seen.update(inspect.signature(pipeline.scheduler.step).parameters)
        return kwargs

    stochastic = Sampler(sd, {**tiny.CALL, "eta": 1.0}).rollout(tiny.PROMPTS, [0, 1], callback_on_step_end=look)
    deterministic = Sampler(sd, tiny.CALL).rollout(tiny.PROMPTS, [0, 1])
    assert {"eta", "generator"} <= set(seen)
    assert (stochastic.pixels - deterministic.pixels).abs().max() > 1e-3
    assert adapter.parameters


def test_a_scheduler_that_was_changed_by_hand_stays_so():
    """Some settings, such as a flow-match shift, are not in the scheduler's config."""
    pipeline = tiny.stable_diffusion_3()
    sampler = Sampler(pipeline, tiny.CALL)
    before = sampler.sample(tiny.PROMPTS, [0, 1])
    pipeline.scheduler.set_shift(5.0)
    assert (sampler.sample(tiny.PROMPTS, [0, 1]) - before).abs().max() > 1e-3
    assert torch.equal(sampler.rollout(tiny.PROMPTS, [0, 1]).pixels.detach(), sampler.sample(tiny.PROMPTS, [0, 1]))


@pytest.mark.parametrize("wanted", [0, 5, -1])
def test_a_window_that_does_not_fit_is_refused(sd, wanted):
    with pytest.raises(ValueError, match=f"live_steps={wanted} needs 1 <= live_steps <= 4"):
        Sampler(sd, tiny.CALL).rollout(tiny.PROMPTS, [0, 1], wanted)


@pytest.mark.parametrize("mode", CHECKPOINTING_MODES)
def test_a_rollout_that_is_thrown_away_frees_its_graph(sd, mode):
    perturbed(sd)
    sampler = Sampler(sd, tiny.CALL)
    with LiveBytes() as live:
        rolled = sampler.rollout(tiny.PROMPTS, [0, 1], 4, mode)
        held = live.now
        del rolled
        gc.collect()
        assert live.now < held / 10  # torch keeps the generator states of its checkpoints, 5 kB each


def test_an_fp16_pipeline_may_keep_its_decoder_in_fp32():
    pipeline = tiny.stable_diffusion(torch.bfloat16)
    pipeline.vae.to(torch.float32)
    adapter = perturbed(pipeline)
    sampler = Sampler(pipeline, tiny.CALL)
    rolled = sampler.rollout(tiny.PROMPTS, [0, 1], 2)
    assert rolled.pixels.dtype == torch.float32
    assert torch.equal(rolled.pixels.detach(), sampler.sample(tiny.PROMPTS, [0, 1]))
    assert gradient(contrast(rolled.pixels), adapter).isfinite().all()
