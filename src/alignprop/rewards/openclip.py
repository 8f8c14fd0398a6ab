"""Checkpoints of OpenCLIP (github.com/mlfoundations/open_clip) as CLIP models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignprop.rewards.checkpoints import check_layout

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

_NAMES = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".self_attn.q_proj.": ".attn.in_proj_",
    ".self_attn.k_proj.": ".attn.in_proj_",
    ".self_attn.v_proj.": ".attn.in_proj_",
}
"""Parts of names: of transformers, and of OpenCLIP."""

_THIRDS = {".self_attn.q_proj.": 0, ".self_attn.k_proj.": 1, ".self_attn.v_proj.": 2}
"""Places of queries, keys and values in OpenCLIP's fused attention."""

_TRANSPOSED = ("text_projection.weight", "visual_projection.weight")
"""OpenCLIP multiplies by these from the right."""


def vit_h_14() -> CLIPConfig:
    """The architecture that OpenCLIP calls ViT-H-14: exact GELU where OpenAI's models have its quick estimate."""
    from transformers import CLIPConfig

    both = {"num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 1024}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14}
    return CLIPConfig(text_config=text | both, vision_config=vision | both, projection_dim=1024)


def from_openclip(tensors: Mapping[str, Tensor], config: CLIPConfig, model: str, kind: str) -> CLIPModel:
    """Build a CLIP of transformers from weights of OpenCLIP, in float32, frozen and in evaluation mode.

    Args:
        tensors: By OpenCLIP's names; of any floating point type.
        config: The architecture; the number of heads cannot be read off the weights.
        model: Where the weights are from, for the messages.
        kind: What they should be, for the messages.

    Raises:
        ValueError: The weights are of another architecture: one lacks, is left over or has another shape.
    """
    from transformers import CLIPModel

    check_layout(tensors, openclip_layout(config), model, kind)
    converted = {name: _taken(tensors[openclip_name(name)], name) for name in _weights(config)}
    clip = CLIPModel.from_pretrained(None, config=config, state_dict=converted, dtype=torch.float32)
    built: CLIPModel = clip.eval().requires_grad_(False)
    return built


def openclip_layout(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that OpenCLIP saves for an architecture."""
    layout = {}
    for name, weight in _weights(config).items():
        shape = tuple(weight.shape)
        if name in _TRANSPOSED:
            shape = shape[::-1]
        elif _third(name) is not None:
            shape = (3 * shape[0], *shape[1:])
        layout[openclip_name(name)] = shape
    return layout


def openclip_name(name: str) -> str:
    """OpenCLIP's name of the weight that transformers calls `name`; three of transformers share one."""
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _weights(config: CLIPConfig) -> dict[str, Tensor]:
    """The weights of transformers' model by name, without storage."""
    from transformers import CLIPModel

    with torch.device("meta"):
        weights: dict[str, Tensor] = CLIPModel(config).state_dict()
    return weights


def _taken(published: Tensor, name: str) -> Tensor:
    third = _third(name)
    if third is not None:
        return published.chunk(3)[third]
    return published.T if name in _TRANSPOSED else published


def _third(name: str) -> int | None:
    return next((place for part, place in _THIRDS.items() if part in name), None)
