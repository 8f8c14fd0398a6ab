"""Pipelines that make sounds: their rewards get waveforms (B, C, N)."""

import torch
from diffusers import (
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)

import tiny
from zoo import parts_stable_diffusion as parts
from zoo.row import Row


def stable_audio(dtype):
    torch.manual_seed(0)
    transformer = StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=4,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=2 * parts.WIDTH,
        cross_attention_input_dim=parts.WIDTH,
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 1],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=32,
    )
    pipeline = StableAudioPipeline(
        vae=vae,
        text_encoder=parts.t5(),
        projection_model=StableAudioProjectionModel(parts.WIDTH, parts.WIDTH, min_value=0, max_value=1),
        tokenizer=parts.t5_tokenizer(),
        transformer=transformer,
        scheduler=EDMDPMSolverMultistepScheduler(),
    )
    return tiny._ready(pipeline, dtype)


ROWS = [
    Row(
        "Stable Audio",
        stable_audio,
        {"num_inference_steps": 3, "guidance_scale": 5.0, "audio_end_in_s": 0.9},
        modality="audio",
        rounds="rotary embeddings",
    ),
]
