"""Tiny pipelines with random weights.

STAND-IN, NOT THE ORIGINAL: the owner's tests/tiny.py was overwritten and deleted by mistake at 05:28 on 23 November by
the session that writes config and cli. This was written anew from its uses in the tests. Put the original back.
"""

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
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PROMPTS = ("a cat", "a dog")
CALL = {"num_inference_steps": 4, "guidance_scale": 5.0}
_TOKENS = 12


def scheduler(cls=DDIMScheduler, **config):
    """A scheduler with the betas of Stable Diffusion."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    ddim = {"clip_sample": False, "set_alpha_to_one": False}
    return cls.from_config({**DDIMScheduler(**betas, **ddim).config, **config})


def stable_diffusion(dtype=torch.float32, dropout=0.0):
    """16 px pictures from 8x8 latents."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        dropout=dropout,
    )
    pipeline = StableDiffusionPipeline(
        vae=_vae(4),
        unet=unet,
        text_encoder=CLIPTextModel(_text_config()),
        tokenizer=_tokenizer(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _ready(pipeline, dtype)


def stable_diffusion_3(dtype=torch.float32):
    """A flow-matching transformer with two text encoders."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4, scaling_factor=1.5, shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(_text_config(projection_dim=16)),
        tokenizer=_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(projection_dim=16)),
        tokenizer_2=_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return _ready(pipeline, dtype)


def _ready(pipeline, dtype):
    pipeline.to(dtype)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _vae(channels, **changes):
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **changes,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.3)  # pixels stay away from black and white, where they are clamped
    return vae


def _text_config(**changes):
    return CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=_TOKENS,
        bos_token_id=_vocabulary()["<|startoftext|>"],
        eos_token_id=_vocabulary()["<|endoftext|>"],
        pad_token_id=_vocabulary()["<|endoftext|>"],
        **changes,
    )


def _vocabulary():
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {token: place for place, token in enumerate(tokens)}


def _tokenizer():
    return CLIPTokenizer(vocab=_vocabulary(), merges=[], model_max_length=_TOKENS)
