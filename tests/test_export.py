"""Adapters for other programs, read back by readers that know nothing of this library."""

import functools
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from alignprop.adapter_files import DIFFUSERS_FILE
from alignprop.adapters import Adapter, Lora
from alignprop.export import read_updates, save_kohya, save_merged
from alignprop.rollout import Sampler
from zoo import ROWS
from zoo import parts_stable_diffusion as parts

SEEDS = [0, 1]
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


def saved(pipeline, folder, targets=("to_q", "to_k", "to_v", "to_out.0"), alpha=6.0):
    """An adapter with an effect, on disk; alpha is not the rank, so that a lost scale shows."""
    adapter = Adapter(pipeline, Lora(rank=2, alpha=alpha, targets=targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapter.save(folder)


def pictures(pipeline, call=tiny.CALL):
    return Sampler(pipeline, call).sample(tiny.PROMPTS, SEEDS)


def row(name):
    return next(row for row in ROWS if row.name == name)


@pytest.fixture
def two_layers_a_block(monkeypatch):
    """As the real models have, whose blocks the names number."""
    monkeypatch.setattr(parts, "unet", functools.partial(parts.unet, layers_per_block=2))


@pytest.mark.parametrize("name", ["Stable Diffusion 1.5", "SDXL"])
@pytest.mark.parametrize("targets", [TARGETS[:4], TARGETS])
def test_diffusers_reads_the_kohya_file_of_a_unet(tmp_path, two_layers_a_block, name, targets):
    build, call = row(name).build, row(name).call
    pipeline = build(torch.float32)
    base = pictures(pipeline, call)
    saved(pipeline, tmp_path, targets)
    file = save_kohya(tmp_path, tmp_path / "kohya.safetensors")
    clean = build(torch.float32)
    clean.load_lora_weights(str(file))
    torch.testing.assert_close(pictures(clean, call), pictures(pipeline, call), rtol=0, atol=1e-5)
    assert (pictures(clean, call) - base).abs().max() > 1e-3


def test_the_names_are_those_that_the_trainers_write(tmp_path, two_layers_a_block):
    pipeline = row("SDXL").build(torch.float32)
    saved(pipeline, tmp_path)
    names = load_file(save_kohya(tmp_path, tmp_path / "kohya.safetensors"))
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in names
    assert all(name.startswith(("lora_unet_input_", "lora_unet_middle_", "lora_unet_output_")) for name in names)
    assert {name.rsplit(".", 1)[-1] for name in names} == {"weight", "alpha"}


def test_stable_diffusion_3_has_the_layers_of_the_original_model(tmp_path):
    """Diffusers has no reader of such files, but one of the original model's weights: the updates take their place."""
    targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_v_proj", "ff.net.0.proj", "ff.net.2")
    saved(tiny.stable_diffusion_3(), tmp_path, targets)
    tensors = load_file(save_kohya(tmp_path, tmp_path / "kohya.safetensors"))
    modules = {name.split(".")[0] for name in tensors}
    original = {_sd3_original(module): _delta(tensors, module) for module in modules}
    converted = convert_sd3_transformer_checkpoint_to_diffusers(_with_all_layers(original))
    updates = {name.removeprefix("transformer."): update.delta for name, update in read_updates(tmp_path).items()}
    for name, delta in updates.items():
        torch.testing.assert_close(converted[f"{name}.weight"], delta, rtol=0, atol=1e-6)
    assert not converted["transformer_blocks.0.attn.add_k_proj.weight"].any()  # not adapted


def _sd3_original(module):
    name = module.removeprefix("lora_unet_")
    for part in ("joint_blocks", "x_block", "context_block", "attn2", "attn", "mlp"):
        name = name.replace(f"{part}_", f"{part}.", 1) if f"{part}_" in name else name
    return name.replace("joint_blocks.0_", "joint_blocks.0.").replace("joint_blocks.1_", "joint_blocks.1.") + ".weight"


def _delta(tensors, module):
    down, up = tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"]
    return tensors[f"{module}.alpha"].item() / len(down) * up @ down


class _with_all_layers(dict):  # reads as a function above
    """The converter takes every layer of the model from the checkpoint; those without an update are zero."""

    def __missing__(self, name):
        return torch.zeros(48 if "qkv" in name else 16, 16)

    def pop(self, name, *default):
        return super().pop(name) if name in self else self[name]


def test_diffusers_reads_the_kohya_file_of_flux(tmp_path):
    """At the true sizes, which the reader has built in: what is written and read back has the same updates."""
    names = {
        "transformer.transformer_blocks.3.attn.to_q": (3072, 3072),
        "transformer.transformer_blocks.3.attn.to_v": (3072, 3072),
        "transformer.transformer_blocks.3.attn.to_out.0": (3072, 3072),
        "transformer.transformer_blocks.3.attn.add_k_proj": (3072, 3072),
        "transformer.transformer_blocks.3.ff.net.0.proj": (3072, 12288),
        "transformer.single_transformer_blocks.7.attn.to_q": (3072, 3072),
        "transformer.single_transformer_blocks.7.attn.to_k": (3072, 3072),
        "transformer.single_transformer_blocks.7.proj_out": (15360, 3072),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (inputs, outputs) in names.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, inputs, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator)
    settings = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6.0})}
    save_file(tensors, tmp_path / DIFFUSERS_FILE, settings)
    written = load_file(save_kohya(tmp_path, tmp_path / "kohya.safetensors", "FluxPipeline"))
    read = _convert_kohya_flux_lora_to_diffusers(written)
    for name in names:
        down, up = tensors[f"{name}.lora_A.weight"][:, :64], tensors[f"{name}.lora_B.weight"][:64]
        theirs = read[f"{name}.lora_B.weight"][:64] @ read[f"{name}.lora_A.weight"][:, :64]
        torch.testing.assert_close(theirs, 3.0 * up @ down, rtol=1e-5, atol=1e-4)
    absent = "transformer.transformer_blocks.3.attn.to_k"
    assert not (read[f"{absent}.lora_B.weight"] @ read[f"{absent}.lora_A.weight"]).any()


@pytest.mark.parametrize(
    ("pipeline_class", "message"),
    [("PixArtAlphaPipeline", "knows no names for PixArtAlphaPipeline"), ("Flux2Pipeline", "no names for Flux2")],
)
def test_families_without_such_names_are_refused(tmp_path, pipeline_class, message):
    saved(tiny.stable_diffusion(), tmp_path)
    with pytest.raises(ValueError, match=message):
        save_kohya(tmp_path, tmp_path / "kohya.safetensors", pipeline_class)


def test_a_module_without_a_name_is_refused(tmp_path):
    saved(tiny.stable_diffusion_3(), tmp_path, ("to_q", "norm1.linear"))
    with pytest.raises(ValueError, match=r"no name for transformer\.transformer_blocks\.0\.norm1\.linear"):
        save_kohya(tmp_path, tmp_path / "kohya.safetensors")


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"no {DIFFUSERS_FILE}"):
        save_kohya(tmp_path, tmp_path / "kohya.safetensors")


def test_facts_are_kept_in_the_header(tmp_path):
    saved(tiny.stable_diffusion(), tmp_path)
    with safe_open(save_kohya(tmp_path, tmp_path / "kohya.safetensors"), framework="pt") as opened:
        facts = json.loads(opened.metadata()["alignprop"])
    assert facts["pipeline"] == "StableDiffusionPipeline"
    assert facts["library"].startswith("alignprop ")


def test_the_merged_pipeline_needs_no_adapter_and_draws_the_same(tmp_path):
    pipeline = tiny.stable_diffusion()
    base = pictures(pipeline)
    saved(pipeline, tmp_path / "adapter", TARGETS)
    save_merged(tiny.stable_diffusion(), tmp_path / "adapter", tmp_path / "merged")
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", safety_checker=None)
    assert not any("lora" in name for name in merged.unet.state_dict())
    torch.testing.assert_close(pictures(merged), pictures(pipeline), rtol=0, atol=1e-5)
    assert (pictures(merged) - base).abs().max() > 1e-3
