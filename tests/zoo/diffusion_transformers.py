"""More text-to-image pipelines whose denoiser is a transformer."""

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import GlmConfig, GlmModel

import tiny
from zoo import parts_video as parts
from zoo.row import Row

_CALL = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 16, "width": 16, "max_sequence_length": 16}
_TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "text_embed_dim": parts.WIDTH,
    "time_embed_dim": 8,
    "condition_dim": 4,
    "pos_embed_max_size": 8,
    "sample_size": 8,
}


def cogview3_plus(dtype):
    """8x8 latents of 16x16 pictures."""
    torch.manual_seed(0)
    pipeline = CogView3PlusPipeline(
        tokenizer=parts.letters(),
        text_encoder=parts.t5(),
        vae=tiny._vae(),
        transformer=CogView3PlusTransformer2DModel(**_TRANSFORMER),
        scheduler=CogVideoXDDIMScheduler(),
    )
    return tiny._ready(pipeline, dtype)


def cogview4(dtype):
    """8x8 latents of 16x16 pictures."""
    torch.manual_seed(0)
    text = GlmConfig(
        vocab_size=parts.num_letters(),
        hidden_size=parts.WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    pipeline = CogView4Pipeline(
        tokenizer=parts.letters("<s> $A"),
        text_encoder=GlmModel(text),
        vae=tiny._vae(),
        transformer=CogView4Transformer2DModel(**_TRANSFORMER, rope_axes_dim=(8, 8)),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return tiny._ready(pipeline, dtype)


ROWS = [
    Row(
        "CogView3+",
        cogview3_plus,
        _CALL,
        rounds="the pipeline, which casts the noise prediction",
    ),
    Row("CogView4", cogview4, _CALL, calls=2, rounds="the flow-matching scheduler"),
]
