"""Memory that the recipes of large models are expected to need: `python benchmarks/expected_memory.py`.

The models are built without weights (on the meta device, from their published configurations) and one micro-batch is
run through denoiser and decoder with its backward pass, counting the bytes of live tensors, with attention that keeps
its inputs and output only, as fused kernels do. What is not counted: the
reward's own activations, the allocator's slack and the CUDA context; so the table adds a fifth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from alignprop.config import load_config
from alignprop.memory import LiveBytes
from alignprop.seams import block_checkpointing

SLACK = 1.2
CLIP_L, CLIP_H, CLIP_G, T5_XXL = 123e6, 340e6, 695e6, 4762e6
"""Parameters of the text encoders."""

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


@dataclass(frozen=True)
class Family:
    """A denoiser with its inputs.

    Attributes:
        make: builds the denoiser.
        inputs: from the batch size (with the unconditional half) and the latents' side to the call's arguments.
        latent_channels: of the autoencoder.
        text_parameters: of the text encoders.
        guided: whether the batch holds the unconditional half as well.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    latent_channels: int
    text_parameters: float
    guided: bool = True


def _unet_inputs(width: int, added: bool) -> Callable[[int, int], dict[str, Any]]:
    def inputs(batch: int, side: int) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "sample": torch.empty(batch, 4, side, side),
            "timestep": torch.empty(batch),
            "encoder_hidden_states": torch.empty(batch, 77, width),
        }
        if added:
            added_inputs = {"text_embeds": torch.empty(batch, 1280), "time_ids": torch.empty(batch, 6)}
            arguments["added_cond_kwargs"] = added_inputs
        return arguments

    return inputs


def _sd3_inputs(batch: int, side: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(batch, 16, side, side),
        "encoder_hidden_states": torch.empty(batch, 333, 4096),
        "pooled_projections": torch.empty(batch, 2048),
        "timestep": torch.empty(batch),
    }


def _flux_inputs(batch: int, side: int) -> dict[str, Any]:
    tokens = (side // 2) ** 2
    return {
        "hidden_states": torch.empty(batch, tokens, 64),
        "encoder_hidden_states": torch.empty(batch, 256, 4096),
        "pooled_projections": torch.empty(batch, 768),
        "timestep": torch.empty(batch),
        "guidance": torch.empty(batch),
        "txt_ids": torch.empty(256, 3),
        "img_ids": torch.empty(tokens, 3),
    }


SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SD35_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
    "out_channels": 16,
}

FAMILIES = {
    "sd15-aesthetic": Family(
        lambda: UNet2DConditionModel(cross_attention_dim=768), _unet_inputs(768, added=False), 4, CLIP_L
    ),
    "sd-turbo-pickscore": Family(
        lambda: UNet2DConditionModel(**SD2), _unet_inputs(1024, added=False), 4, CLIP_H, guided=False
    ),
    "sdxl-hps": Family(lambda: UNet2DConditionModel(**SDXL), _unet_inputs(2048, added=True), 4, CLIP_L + CLIP_G),
    "sd35-hps": Family(lambda: SD3Transformer2DModel(**SD35_MEDIUM), _sd3_inputs, 16, CLIP_L + CLIP_G + T5_XXL),
    "flux-dev-hps": Family(
        lambda: FluxTransformer2DModel(guidance_embeds=True), _flux_inputs, 16, CLIP_L + T5_XXL, guided=False
    ),
}


class _FusedAttention(torch.autograd.Function):
    """The shapes of attention, and what a fused kernel keeps of it."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def fused_attention() -> Iterator[None]:
    """Put it in the place of torch's, which on the meta device keeps whole attention maps."""
    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: _FusedAttention.apply(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


def _adapt(denoiser: nn.Module, rank: int, targets: list[str]) -> None:
    from peft import LoraConfig

    denoiser.add_adapter(LoraConfig(r=rank, target_modules=targets))  # type: ignore[operator]
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_("lora" in name)


def _peak(run: Callable[[], Tensor]) -> int:
    live = LiveBytes()
    with live:
        run().sum().backward()
    return live.peak


def expected_gigabytes(recipe: str) -> dict[str, float]:
    """Weights, activations of one denoising step, of the decoder, and their sum with slack, in GB."""
    config, family = load_config(recipe, ["rewards={redness: 1}", "judges={}"]), FAMILIES[recipe]
    assert config.sampling.height is not None
    side, batch = config.sampling.height // 8, config.training.batch_size
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), fused_attention():
            denoiser = family.make().train()
            decoder = AutoencoderKL(latent_channels=family.latent_channels, **VAE).requires_grad_(False)
            _adapt(denoiser, config.adapter.rank, list(config.adapter.targets))
            inputs = family.inputs(batch * (2 if family.guided else 1), side)
            latents = torch.empty(batch, family.latent_channels, side, side, requires_grad=True)
            blockwise = config.estimator.checkpointing in ("block", "nested")
            with block_checkpointing(denoiser, enabled=blockwise):
                step = _peak(lambda: denoiser(**inputs).sample)
            with block_checkpointing(decoder, enabled=blockwise):
                decoding = _peak(lambda: decoder.train().decode(latents).sample)
    finally:
        torch.set_default_dtype(before)
    numbers = [parameter.numel() for model in (denoiser, decoder) for parameter in model.parameters()]
    weights = 2 * (sum(numbers) + family.text_parameters)
    # One denoising step is in memory at a time, the others' inputs are small; the decoder's activations go first.
    gigabytes = {"weights": weights, "denoising step": step, "decoder": decoding}
    gigabytes["expected"] = SLACK * (weights + max(step, decoding))
    return {name: round(value / 1e9, 1) for name, value in gigabytes.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(FAMILIES))
    for recipe in parser.parse_args().recipes:
        print(recipe, expected_gigabytes(recipe))


if __name__ == "__main__":
    main()
