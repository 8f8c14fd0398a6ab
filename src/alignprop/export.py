"""Adapters for other programs: under the key names of kohya's trainer, or merged into the base model.

The names are those that sd-scripts writes, which A1111's web UI, ComfyUI and diffusers read: the layout of diffusers
for Stable Diffusion 1 and 2, that of the models' original authors for SDXL, Stable Diffusion 3 and Flux.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop.adapter_files import DIFFUSERS_FILE, facts_of


@dataclass(frozen=True)
class Update:
    """The low-rank update of one linear layer: ``scale * up @ down``.

    Attributes:
        down: (R, inputs).
        up: (outputs, R).
        scale: alpha / R.
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def delta(self) -> Tensor:
        """What is added to the layer's weight, (outputs, inputs)."""
        return self.scale * self.up @ self.down


def read_updates(folder: Path) -> dict[str, Update]:
    """Read an adapter in diffusers' format.

    Returns:
        Updates by the name of the part and of the module, as in ``unet.mid_block.attentions.0.proj_in``.

    Raises:
        ValueError: there is no such adapter.
    """
    from safetensors import safe_open

    file = Path(folder) / DIFFUSERS_FILE
    if not file.is_file():
        raise ValueError(f"There is no {DIFFUSERS_FILE} in {folder}: only adapters in diffusers' format are exported.")
    with safe_open(file, framework="pt") as opened:
        settings = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
    updates = {}
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            rank = down.shape[0]
            alpha = settings.get(f"{module.split('.')[0]}.lora_alpha", rank)
            updates[module] = Update(down, tensors[f"{module}.lora_B.weight"], alpha / rank)
    return updates


def save_kohya(folder: Path, out: Path, pipeline_class: str | None = None) -> Path:
    """Write an adapter under kohya's key names, with the facts of its header.

    Args:
        folder: of the adapter, in diffusers' format.
        out: the ``.safetensors`` file to write.
        pipeline_class: name of the class of the pipeline that it was trained in, where its header does not tell.

    Raises:
        ValueError: the family is not known or has no such names, or the adapter changes a module that has none.
    """
    from safetensors.torch import save_file

    updates, facts = read_updates(folder), facts_of(folder)
    pipeline_class = pipeline_class or facts.get("pipeline")
    if pipeline_class is None:
        raise ValueError(f"{folder} does not tell which pipeline it is for: give its class, as in FluxPipeline.")
    naming = next((naming for start, naming in _NAMINGS.items() if pipeline_class.startswith(start)), None)
    if naming is None:
        raise ValueError(
            f"format='kohya' knows no names for {pipeline_class}, only for Stable Diffusion 1, 2, XL and 3 and Flux: "
            "use the diffusers file, which ComfyUI reads for newer models."
        )
    tensors: dict[str, Tensor] = {}
    for name, update in naming(updates).items():
        rank = update.down.shape[0]
        tensors[f"{name}.lora_down.weight"] = update.down.contiguous()
        tensors[f"{name}.lora_up.weight"] = update.up.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(update.scale * rank, dtype=update.down.dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    header = {"ss_network_module": "networks.lora", "alignprop": json.dumps(facts, sort_keys=True)}
    save_file(tensors, out, metadata=header)
    return out


Naming = Callable[[Mapping[str, Update]], dict[str, Update]]


def _stable_diffusion(updates: Mapping[str, Update]) -> dict[str, Update]:
    """Diffusers' own module names, with underscores."""
    return {_renamed(module, "lora_te"): update for module, update in updates.items()}


def _renamed(module: str, text_prefix: str) -> str:
    part, name = module.split(".", 1)
    if part == "unet":
        return f"lora_unet_{name.replace('.', '_')}"
    # Transformers 5 has no ``text_model.`` in front, which the format keeps.
    name = name if name.startswith("text_model.") else f"text_model.{name}"
    return f"{text_prefix}_{name.replace('.', '_')}"


_SDXL_LAYERS_PER_BLOCK = 2


def _stable_diffusion_xl(updates: Mapping[str, Update]) -> dict[str, Update]:
    """The block numbers of the original UNet."""
    renamed = {}
    for module, update in updates.items():
        part, name = module.split(".", 1)
        if part == "unet":
            renamed[f"lora_unet_{_original_block(name).replace('.', '_')}"] = update
        else:
            renamed[_renamed(module, "lora_te1" if part == "text_encoder" else "lora_te2")] = update
    return renamed


def _original_block(name: str) -> str:
    """``down_blocks.1.attentions.0.x`` to ``input_blocks.4.1.x``, and so on."""
    each = _SDXL_LAYERS_PER_BLOCK + 1
    if match := re.fullmatch(r"down_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", name):
        block, layer, rest = int(match[1]), int(match[2]), match[3]
        return f"input_blocks.{1 + block * each + layer}.1.{rest}"
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", name):
        return f"middle_block.1.{match[1]}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", name):
        block, layer, rest = int(match[1]), int(match[2]), match[3]
        return f"output_blocks.{block * each + layer}.1.{rest}"
    raise ValueError(f"format='kohya' has no name for unet.{name}: adapt the attention blocks only (adapter.targets).")


def _fused(names: Mapping[str, Sequence[str]], updates: Mapping[str, Update]) -> dict[str, Update]:
    """Updates of the original model's layers, of which some are several of diffusers' layers, one above the other.

    Args:
        names: for each original layer the layers that it is made of, in order.
        updates: by module.
    """
    fused = {}
    for target, sources in names.items():
        parts = [updates.get(source) for source in sources]
        if any(part is not None for part in parts):
            fused[target] = parts[0] if len(parts) == 1 else _stacked(parts, sources, updates)
    return {name: update for name, update in fused.items() if update is not None}


def _stacked(parts: Sequence[Update | None], sources: Sequence[str], updates: Mapping[str, Update]) -> Update:
    """One update of the stacked layers, exact: the ranks add up, and what is not adapted is zero."""
    known = next(part for part in parts if part is not None)
    missing = [source for source, part in zip(sources, parts, strict=True) if part is None]
    sizes = {source: _outputs(source, known, sources) for source in missing}
    filled = [
        part if part is not None else Update(torch.zeros_like(known.down), known.up.new_zeros(size, len(known.down)), 1)
        for part, size in zip(parts, (sizes.get(source, 0) for source in sources), strict=True)
    ]
    down = torch.cat([part.down for part in filled])
    up = torch.block_diag(*(part.scale * part.up for part in filled))
    return Update(down, up, 1.0)


def _outputs(source: str, known: Update, sources: Sequence[str]) -> int:
    """Outputs of a layer that is not adapted: those of the attention, or four times as many for the MLP."""
    return known.down.shape[1] * (4 if source.endswith("proj_mlp") else 1)


def _numbers(updates: Mapping[str, Update], blocks: str) -> Iterator[int]:
    found = {int(match[1]) for module in updates if (match := re.match(rf"transformer\.{blocks}\.(\d+)\.", module))}
    yield from sorted(found)


def _complete(names: Mapping[str, Sequence[str]], updates: Mapping[str, Update]) -> dict[str, Update]:
    unknown = updates.keys() - {source for sources in names.values() for source in sources}
    if unknown:
        raise ValueError(f"format='kohya' has no name for {min(unknown)}: adapt the attention only (adapter.targets).")
    return _fused(names, updates)


def _stable_diffusion_3(updates: Mapping[str, Update]) -> dict[str, Update]:
    names: dict[str, list[str]] = {}
    for i in _numbers(updates, "transformer_blocks"):
        source, target = f"transformer.transformer_blocks.{i}", f"lora_unet_joint_blocks_{i}"
        names[f"{target}_x_block_attn_qkv"] = [f"{source}.attn.to_{part}" for part in "qkv"]
        names[f"{target}_x_block_attn_proj"] = [f"{source}.attn.to_out.0"]
        names[f"{target}_x_block_attn2_qkv"] = [f"{source}.attn2.to_{part}" for part in "qkv"]
        names[f"{target}_x_block_attn2_proj"] = [f"{source}.attn2.to_out.0"]
        names[f"{target}_context_block_attn_qkv"] = [f"{source}.attn.add_{part}_proj" for part in "qkv"]
        names[f"{target}_context_block_attn_proj"] = [f"{source}.attn.to_add_out"]
        names[f"{target}_x_block_mlp_fc1"] = [f"{source}.ff.net.0.proj"]
        names[f"{target}_x_block_mlp_fc2"] = [f"{source}.ff.net.2"]
        names[f"{target}_context_block_mlp_fc1"] = [f"{source}.ff_context.net.0.proj"]
        names[f"{target}_context_block_mlp_fc2"] = [f"{source}.ff_context.net.2"]
    return _complete(names, updates)


def _flux(updates: Mapping[str, Update]) -> dict[str, Update]:
    names: dict[str, list[str]] = {}
    for i in _numbers(updates, "transformer_blocks"):
        source, target = f"transformer.transformer_blocks.{i}", f"lora_unet_double_blocks_{i}"
        names[f"{target}_img_attn_qkv"] = [f"{source}.attn.to_{part}" for part in "qkv"]
        names[f"{target}_img_attn_proj"] = [f"{source}.attn.to_out.0"]
        names[f"{target}_img_mlp_0"] = [f"{source}.ff.net.0.proj"]
        names[f"{target}_img_mlp_2"] = [f"{source}.ff.net.2"]
        names[f"{target}_img_mod_lin"] = [f"{source}.norm1.linear"]
        names[f"{target}_txt_attn_qkv"] = [f"{source}.attn.add_{part}_proj" for part in "qkv"]
        names[f"{target}_txt_attn_proj"] = [f"{source}.attn.to_add_out"]
        names[f"{target}_txt_mlp_0"] = [f"{source}.ff_context.net.0.proj"]
        names[f"{target}_txt_mlp_2"] = [f"{source}.ff_context.net.2"]
        names[f"{target}_txt_mod_lin"] = [f"{source}.norm1_context.linear"]
    for i in _numbers(updates, "single_transformer_blocks"):
        source, target = f"transformer.single_transformer_blocks.{i}", f"lora_unet_single_blocks_{i}"
        attention = [f"{source}.attn.to_{part}" for part in "qkv"]
        names[f"{target}_linear1"] = [*attention, f"{source}.proj_mlp"]
        names[f"{target}_linear2"] = [f"{source}.proj_out"]
        names[f"{target}_modulation_lin"] = [f"{source}.norm.linear"]
    return _complete(names, updates)


_NAMINGS: dict[str, Naming] = {
    "StableDiffusionXL": _stable_diffusion_xl,
    "StableDiffusion3": _stable_diffusion_3,
    "StableDiffusion": _stable_diffusion,
    "LatentConsistencyModel": _stable_diffusion,
    "Flux2": lambda updates: _refused("Flux2"),
    "Flux": _flux,
}
"""By the beginning of the pipeline's class name, the more special ones first."""


def _refused(family: str) -> dict[str, Update]:
    raise ValueError(f"format='kohya' has no names for {family}: use the diffusers file, which ComfyUI reads.")


def save_merged(pipeline: Any, folder: Path, out: Path) -> Path:
    """Write a full pipeline with the adapter added to its weights.

    Args:
        pipeline: the base model, without the adapter; it is changed.
        folder: of the adapter.
        out: folder of the new pipeline, for ``from_pretrained``.
    """
    from peft.tuners.lora import LoraLayer

    from alignprop.adapter_files import load_adapter
    from alignprop.spec import spec_of

    load_adapter(pipeline, folder)
    for part in _adapted_parts(pipeline, spec_of(pipeline).denoisers):
        model = getattr(pipeline, part)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LoraLayer):
                layer.merge()
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.get_base_layer())
        model._hf_peft_config_loaded = False
    pipeline.save_pretrained(out)
    return out


def _adapted_parts(pipeline: Any, denoisers: Sequence[str]) -> list[str]:
    texts = [name for name in ("text_encoder", "text_encoder_2") if getattr(pipeline, name, None) is not None]
    return [*denoisers, *texts]
