"""Tiny pipelines with random weights: no download, the same at every call."""

import functools
import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

CALL = {"num_inference_steps": 4, "guidance_scale": 5.0}
PROMPTS = ["a cat", "a dog"]
_TEXT = {
    "vocab_size": 54,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_T5 = {"vocab_size": 54, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "pad_token_id": 1}


@functools.cache
def _tokenizer() -> CLIPTokenizer:
    """One token a letter."""
    letters = [chr(code) for code in range(97, 123)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=16, unk_token="<|endoftext|>")


def scheduler(cls=DDIMScheduler, **config):
    """A scheduler that clips nothing."""
    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if cls is DDIMScheduler:
        beta |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return cls(**(beta | config))


def _vae(**config):
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        **config,
    )
    vae.decoder.conv_out.weight.data *= 0.2  # keeps the pictures off black and white, where clamping bends gradients
    return vae


def _ready(pipeline, dtype):
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion(dtype=torch.float32, dropout=0.0):
    """Stable Diffusion with 8x8 latents and 16x16 pictures."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        dropout=dropout,
    )
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**_TEXT)),
        tokenizer=_tokenizer(),
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _ready(pipeline, dtype)


def stable_diffusion_3(dtype=torch.float32, t5=False):
    """Stable Diffusion 3 (flow matching, a transformer) with 8x8 latents and 16x16 pictures.

    Its third text encoder can be left out when it is built, but not when it is loaded from a folder.
    """
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    texts = [CLIPTextModelWithProjection(CLIPTextConfig(**_TEXT, projection_dim=16)) for _ in range(2)]
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=texts[0],
        text_encoder_2=texts[1],
        text_encoder_3=T5EncoderModel(T5Config(**_T5)) if t5 else None,
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        tokenizer_3=_tokenizer() if t5 else None,
    )
    return _ready(pipeline, dtype)
