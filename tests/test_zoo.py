"""Every supported pipeline, one row each of the table in `zoo/`: the same behaviour is asked of all of them."""

import copy

import pytest
import torch
from peft import PeftModel

from alignprop.adapter_files import load_adapter, reads_lora_files
from alignprop.adapters import Adapter, Lora
from alignprop.estimators import AlignProp
from alignprop.rollout import Sampler
from alignprop.seams import CHECKPOINTING_MODES
from alignprop.spec import spec_of
from alignprop.trainer import Optimizer, Trainer
from alignprop.truncation import Last
from zoo import ROWS
from zoo.table import PAGE, page

SEEDS = [0, 1]


def each(condition=lambda row: True):
    """Run a test on the rows that a condition picks."""
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS if condition(row)])


def lora_of(row, **settings):
    return Lora(rank=2, **({"targets": row.targets} if row.targets else {}), **settings)


def made(row, dtype=torch.float32, seed=1, scale=0.1):
    """The pipeline with an adapter that has an effect, and its sampler."""
    pipeline = row.build(dtype)
    adapter = Adapter(pipeline, lora_of(row))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    return adapter, Sampler(pipeline, row.call)


def contrast(pixels):
    """A scalar that depends on every pixel, unevenly, and in which pictures count differently."""
    weights = torch.linspace(-1, 1, pixels.numel(), dtype=pixels.dtype).view_as(pixels)
    return (pixels * weights).sum() + 0.1 * pixels.square().sum()


def gradients(adapter, sampler, row, **settings):
    rollout = sampler.rollout(row.prompts, SEEDS, **settings)
    values = list(adapter.parameters.values())
    parts = torch.autograd.grad(contrast(rollout.pixels), values, allow_unused=True)
    return rollout, [torch.zeros_like(v) if part is None else part for part, v in zip(parts, values, strict=True)]


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@each()
def test_the_picture_is_the_plain_pipelines_and_gradient_flows_through_every_live_call(row):
    adapter, sampler = made(row)
    plain = sampler.sample(row.prompts, SEEDS)
    outputs = []
    hooks = [
        denoiser.register_forward_hook(lambda module, args, output: outputs.append(_first(output)))
        for denoiser in adapter.spec.denoisers_of(sampler.pipeline)
    ]
    rollout = sampler.rollout(row.prompts, SEEDS)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(rollout.pixels.detach(), plain, rtol=0, atol=2e-5)
    assert rollout.calls == rollout.live_calls == row.calls * rollout.num_steps == len(outputs)
    reached = torch.autograd.grad(contrast(rollout.pixels), outputs)  # fails for an output that is not in the graph
    assert all(gradient.abs().max() > 0 for gradient in reached)


def _first(output):
    first = output[0]
    return first[0] if isinstance(first, list) else first


@each()
def test_a_shorter_window_has_fewer_live_calls_and_the_same_picture(row):
    adapter, sampler = made(row)
    rollout, short = gradients(adapter, sampler, row, live_steps=1)
    assert rollout.live_calls == row.calls
    torch.testing.assert_close(rollout.pixels.detach(), sampler.sample(row.prompts, SEEDS), rtol=0, atol=2e-5)
    assert flat(short).abs().max() > 0


@each()
def test_the_gradient_is_that_of_finite_differences(row, monkeypatch):
    monkeypatch.setattr("alignprop.pixels.clamp_straight_through", lambda images: images)  # bends it on purpose
    adapter, sampler = made(row, row.exact)
    _, exact = gradients(adapter, sampler, row)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in exact]
    coarse = row.rounds or row.exact == torch.float32

    def moved(amount):
        with torch.no_grad():
            for parameter, direction in zip(adapter.parameters.values(), directions, strict=True):
                parameter.add_(amount * direction)
            value = contrast(sampler.rollout(row.prompts, SEEDS).pixels)
            for parameter, direction in zip(adapter.parameters.values(), directions, strict=True):
                parameter.sub_(amount * direction)
        return value.item()

    def central(step):
        return (moved(step) - moved(-step)) / (2 * step)

    step = 4e-3 if coarse else 1e-4
    measured = (4 * central(step) - central(2 * step)) / 3  # Richardson's extrapolation: an error of the fourth order
    derivative = sum((part * direction).sum() for part, direction in zip(exact, directions, strict=True)).item()
    assert derivative == pytest.approx(measured, rel=5e-3 if coarse else 1e-6)


@each()
def test_every_checkpointing_mode_gives_the_same_gradient(row):
    adapter, sampler = made(row)
    reference = flat(gradients(adapter, sampler, row)[1])
    modes = CHECKPOINTING_MODES[1:] if row.blocks else ("step",)
    for mode in modes:
        other = flat(gradients(adapter, sampler, row, checkpointing=mode)[1])
        assert (other - reference).norm() <= 1e-5 * reference.norm(), mode


@each(lambda row: not row.blocks)
def test_a_denoiser_without_such_blocks_is_refused_by_name(row):
    adapter, sampler = made(row)
    with pytest.raises(ValueError, match=f"checkpointing='block' needs .* {type(_only(adapter.parts)).__name__}"):
        gradients(adapter, sampler, row, checkpointing="block")


def _only(parts):
    (model,) = parts.values()
    return model


@each()
def test_a_clean_pipeline_with_the_adapter_from_disk_draws_the_same(row, tmp_path):
    adapter, sampler = made(row)
    base = Sampler(row.build(torch.float32), row.call).sample(row.prompts, SEEDS)
    ours = sampler.sample(row.prompts, SEEDS)
    assert (ours - base).abs().max() > 1e-4
    adapter.save(tmp_path)
    for load in (load_adapter, _load_independently):
        clean = row.build(torch.float32)
        load(clean, tmp_path)
        theirs = Sampler(clean, row.call, adapter.spec).sample(row.prompts, SEEDS)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=5e-6)


def _load_independently(pipeline, folder):
    """As the documentation tells those who do without this library."""
    spec = spec_of(pipeline)
    if reads_lora_files(pipeline, spec):
        pipeline.load_lora_weights(folder)
        if len(spec.denoisers) > 1:
            pipeline.load_lora_weights(
                folder, weight_name="pytorch_lora_weights_2.safetensors", load_into_transformer_2=True
            )
        return
    (part,) = spec.denoisers
    model = copy.deepcopy(getattr(pipeline, part))  # wrapped as a whole, which a pipeline takes
    PeftModel.from_pretrained(model, folder)
    setattr(pipeline, part, model)


@each()
def test_a_short_run_raises_a_reward(row):
    def reward(images, prompts):
        return images.flatten(1).mean(1)

    reward.modality = row.modality
    trainer = Trainer(
        row.build(torch.float32),
        reward,
        row.prompts,
        row.call,
        steps=6,
        batch_size=2,
        lora=lora_of(row),
        optimizer=Optimizer(learning_rate=2e-2),
        estimator=AlignProp(Last(1)),
    )
    before = trainer.sampler.sample(row.prompts, SEEDS).flatten(1).mean(1).mean().item()
    trainer.train()
    after = trainer.sampler.sample(row.prompts, SEEDS).flatten(1).mean(1).mean().item()
    assert after > before + 1e-4


@each(lambda row: row.sd_family)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_keeps_the_direction_of_the_gradient(row, dtype):
    """The base in half precision, the LoRA in fp32, and beside fp16 the decoder in fp32, as models are loaded."""
    adapter, sampler = made(row)
    exact = flat(gradients(adapter, sampler, row)[1])
    adapter, sampler = made(row, dtype)
    if dtype == torch.float16:
        adapter.spec.decoder_of(sampler.pipeline).to(torch.float32)  # of img2img the encoder as well
    parts = gradients(adapter, sampler, row)[1]
    assert {part.dtype for part in parts} == {torch.float32}
    assert torch.cosine_similarity(flat(parts), exact, dim=0) >= 0.999


def test_the_table_in_the_documentation_is_of_this_zoo():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `cd tests && python -m zoo.table`"
