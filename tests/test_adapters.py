"""The adapter: what is trained, what is written, what plain diffusers makes of it."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors import safe_open

import tiny
from alignprop.adapter_files import DIFFUSERS_FILE, facts_of, load_adapter
from alignprop.adapters import Adapter, Full, Lora
from alignprop.rollout import Sampler

SEEDS = [0, 1]


def same(pictures, others):
    """Equal to rounding: where weights lie in memory decides in which order the processor adds up."""
    return torch.allclose(pictures, others, rtol=0, atol=5e-7)


def trained(pipeline, **lora):
    """An adapter whose weights have an effect."""
    adapter = Adapter(pipeline, Lora(**lora))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_3])
@pytest.mark.parametrize("lora", [{}, {"rank": 2, "alpha": 8.0}, {"targets": ("to_q", "to_v")}])
def test_plain_diffusers_loads_the_adapter_and_draws_the_same_pictures(tmp_path, make, lora):
    pipeline = make()
    base = Sampler(pipeline, tiny.CALL).sample(tiny.PROMPTS, SEEDS)
    adapter = trained(pipeline, **lora)
    ours = Sampler(pipeline, tiny.CALL).sample(tiny.PROMPTS, SEEDS)
    adapter.save(tmp_path)
    clean = make()
    clean.load_lora_weights(tmp_path)
    assert same(Sampler(clean, tiny.CALL).sample(tiny.PROMPTS, SEEDS), ours)
    assert (ours - base).abs().max() > 1e-3


def test_the_file_tells_what_made_it(tmp_path):
    adapter = trained(tiny.stable_diffusion(), rank=2)
    file = adapter.save(tmp_path, {"rewards": {"redness": 1.0}, "step": 7})
    assert file == tmp_path / DIFFUSERS_FILE
    with safe_open(file, framework="pt") as opened:
        facts = json.loads(opened.metadata()["alignprop"])
        assert facts.items() >= {"rewards": {"redness": 1.0}, "step": 7, "pipeline": "StableDiffusionPipeline"}.items()
        assert json.loads(opened.metadata()["lora_adapter_metadata"])["unet.r"] == 2


def test_a_fresh_adapter_changes_nothing_and_only_it_is_trained():
    pipeline = tiny.stable_diffusion()
    before = Sampler(pipeline, tiny.CALL).sample(tiny.PROMPTS, SEEDS)
    adapter = Adapter(pipeline, Lora(rank=3))
    assert same(Sampler(pipeline, tiny.CALL).sample(tiny.PROMPTS, SEEDS), before)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    learning = {name for part in parts for name, value in part.named_parameters() if value.requires_grad}
    assert {f"unet.{name}" for name in learning} == set(adapter.parameters)
    assert all(3 in value.shape for value in adapter.parameters.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_trained_weights_are_fp32_whatever_the_base_is(dtype):
    adapter = Adapter(tiny.stable_diffusion(dtype), Lora())
    assert {value.dtype for value in adapter.parameters.values()} == {torch.float32}
    assert adapter.base_dtype == dtype


def test_the_initial_weights_depend_on_the_seed_and_not_on_the_global_generator():
    def initial(seed, disturbance):
        pipeline = tiny.stable_diffusion()
        torch.manual_seed(disturbance)
        state = torch.get_rng_state()
        values = Adapter(pipeline, Lora(), seed=seed).parameters
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([value.flatten() for value in values.values()])

    assert torch.equal(initial(0, 1), initial(0, 2))
    assert not torch.equal(initial(0, 1), initial(1, 1))


def test_switched_off_it_leaves_the_base_and_comes_back_trainable():
    pipeline = tiny.stable_diffusion()
    sampler = Sampler(pipeline, tiny.CALL)
    base = sampler.sample(tiny.PROMPTS, SEEDS)
    adapter = trained(pipeline)
    ours = sampler.sample(tiny.PROMPTS, SEEDS)
    with adapter.disabled():
        assert same(sampler.sample(tiny.PROMPTS, SEEDS), base)
    assert torch.equal(sampler.sample(tiny.PROMPTS, SEEDS), ours)
    assert all(value.requires_grad for value in adapter.parameters.values())


def test_adapters_that_the_user_already_has_stay_active_and_frozen():
    pipeline = tiny.stable_diffusion()
    sampler = Sampler(pipeline, tiny.CALL)
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False), adapter_name="theirs")
    with_theirs = sampler.sample(tiny.PROMPTS, SEEDS)
    adapter = Adapter(pipeline, Lora())
    assert same(sampler.sample(tiny.PROMPTS, SEEDS), with_theirs)
    assert not any("theirs" in name for name in adapter.parameters)
    assert not any(value.requires_grad for name, value in pipeline.unet.named_parameters() if ".theirs." in name)
    with adapter.disabled():
        assert same(sampler.sample(tiny.PROMPTS, SEEDS), with_theirs)
        assert not any(value.requires_grad for name, value in pipeline.unet.named_parameters() if ".theirs." in name)


def test_a_bf16_pipeline_is_evaluated_with_the_adapter_as_it_will_be_loaded(tmp_path):
    pipeline = tiny.stable_diffusion(torch.bfloat16)
    adapter = trained(pipeline)
    exact = {name: value.detach().clone() for name, value in adapter.parameters.items()}
    with adapter.weights():
        evaluated = Sampler(pipeline, tiny.CALL).sample(tiny.PROMPTS, SEEDS)
    assert all(torch.equal(value, exact[name]) for name, value in adapter.parameters.items())
    adapter.save(tmp_path)
    clean = tiny.stable_diffusion(torch.bfloat16)
    clean.load_lora_weights(tmp_path)
    reloaded = Sampler(clean, tiny.CALL).sample(tiny.PROMPTS, SEEDS)
    # fp32 LoRA arithmetic on rounded weights against bf16 arithmetic on the same: rounding only.
    assert (evaluated - reloaded).abs().max() < 0.02


def test_targets_that_fit_nothing_are_refused():
    with pytest.raises(ValueError, match=r"adapter.targets=\['to_nothing'\] fits no module of UNet2DConditionModel"):
        Adapter(tiny.stable_diffusion(), Lora(targets=("to_nothing",)))


def test_fused_projections_are_refused():
    pipeline = tiny.stable_diffusion()
    pipeline.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        Adapter(pipeline, Lora())


def test_a_second_adapter_of_ours_is_refused():
    pipeline = tiny.stable_diffusion()
    Adapter(pipeline, Lora())
    with pytest.raises(ValueError, match="already has an adapter named 'alignprop'"):
        Adapter(pipeline, Lora())


@pytest.mark.parametrize(("setting", "value"), [("rank", 0), ("dropout", 1.0), ("dropout", -0.1)])
def test_settings_without_sense_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"adapter.{setting}={value}"):
        Lora(**{setting: value})


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_3])
def test_an_adapter_of_the_text_encoders_is_loaded_by_plain_diffusers(tmp_path, make):
    pipeline = make()
    adapter = trained(pipeline, text_encoders=True)
    assert any(name.startswith("text_encoder.") for name in adapter.parameters)
    ours = Sampler(pipeline, tiny.CALL).sample(tiny.PROMPTS, SEEDS)
    adapter.save(tmp_path)
    clean = make()
    clean.load_lora_weights(tmp_path)
    assert same(Sampler(clean, tiny.CALL).sample(tiny.PROMPTS, SEEDS), ours)
    with torch.no_grad():
        for name, parameter in adapter.parameters.items():
            parameter.mul_(0 if name.startswith("text_encoder") else 1)
    assert not same(Sampler(pipeline, tiny.CALL).sample(tiny.PROMPTS, SEEDS), ours)


@pytest.mark.parametrize("live_steps", [1, 4])
@pytest.mark.parametrize("mode", ["none", "nested"])
def test_the_gradient_of_a_text_encoder_is_that_of_finite_differences(monkeypatch, live_steps, mode):
    monkeypatch.setattr("alignprop.pixels.clamp_straight_through", lambda images: images)  # bends it on purpose
    pipeline = tiny.stable_diffusion(torch.float64)
    adapter = trained(pipeline, text_encoders=True)
    sampler = Sampler(pipeline, tiny.CALL)
    name = next(name for name in adapter.parameters if name.startswith("text_encoder.") and "lora_B" in name)
    parameter = adapter.parameters[name]
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value():
        return sampler.rollout(tiny.PROMPTS, SEEDS, live_steps=live_steps, checkpointing=mode).pixels.square().sum()

    (gradient,) = torch.autograd.grad(value(), parameter)
    if live_steps < 4:  # what the steps before the window make of the prompt is left out
        assert gradient.abs().max() > 0
        return

    def moved(amount):
        with torch.no_grad():
            parameter.add_(amount * direction)
            result = value().item()
            parameter.sub_(amount * direction)
        return result

    measured = (moved(1e-4) - moved(-1e-4)) / 2e-4
    assert (gradient * direction).sum().item() == pytest.approx(measured, rel=1e-5)


def test_gradient_stays_off_after_a_rollout_through_the_text_encoder():
    pipeline = tiny.stable_diffusion()
    trained(pipeline, text_encoders=True)
    with torch.no_grad():
        Sampler(pipeline, tiny.CALL).rollout(tiny.PROMPTS, SEEDS, live_steps=1)
        assert not torch.is_grad_enabled()
    assert "forward" not in vars(pipeline.text_encoder)


def test_text_encoders_that_diffusers_loads_nothing_into_are_refused():
    pipeline = tiny.stable_diffusion()
    pipeline._lora_loadable_modules = ["unet"]
    with pytest.raises(ValueError, match=r"adapter\.text_encoders=True: diffusers loads no LoRA"):
        Adapter(pipeline, Lora(text_encoders=True))


def test_the_whole_denoiser_is_trained_saved_and_loaded(tmp_path):
    pipeline = tiny.stable_diffusion()
    sampler = Sampler(pipeline, tiny.CALL)
    base = sampler.sample(tiny.PROMPTS, SEEDS)
    model = Full().attach(pipeline)
    assert set(model.parameters) == {f"unet.{name}" for name, _ in pipeline.unet.named_parameters()}
    assert not any(value.requires_grad for value in pipeline.vae.parameters())
    with torch.no_grad():
        for parameter in model.parameters.values():
            parameter.add_(0.01)
    ours = sampler.sample(tiny.PROMPTS, SEEDS)
    with model.disabled():
        assert same(sampler.sample(tiny.PROMPTS, SEEDS), base)
    assert torch.equal(sampler.sample(tiny.PROMPTS, SEEDS), ours)
    model.save(tmp_path, {"step": 3})
    assert facts_of(tmp_path).items() >= {"step": 3, "pipeline": "StableDiffusionPipeline"}.items()
    clean = tiny.stable_diffusion()
    load_adapter(clean, tmp_path)
    assert same(Sampler(clean, tiny.CALL).sample(tiny.PROMPTS, SEEDS), ours)
    clean.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")  # without this library
    assert same(Sampler(clean, tiny.CALL).sample(tiny.PROMPTS, SEEDS), ours)


def test_a_whole_denoiser_in_half_precision_is_refused():
    with pytest.raises(ValueError, match=r"adapter\.kind=full needs a denoiser in fp32"):
        Full().attach(tiny.stable_diffusion(torch.bfloat16))
