"""Text-to-image pipelines whose denoiser is a transformer."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, UMT5EncoderModel

import tiny
from alignprop.adapters import ATTENTION
from zoo import parts_transformers as parts
from zoo.row import CUT_OFF, Row

_CALL = {"num_inference_steps": 3, "guidance_scale": 5.0}
_SHORT = {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 8}
_WIDTH = {"num_attention_heads": 2, "attention_head_dim": 8}
_PACKED = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, **_WIDTH}
"""Four latent channels in patches of 2x2, and one block of each kind."""


def flux(dtype, *, distilled=True):
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        joint_attention_dim=parts.TEXT_DIM,
        pooled_projection_dim=tiny._TEXT["hidden_size"],
        guidance_embeds=distilled,
        axes_dims_rope=(4, 2, 2),
        **_PACKED,
    )
    pipeline = FluxPipeline(
        transformer=parts.lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny._vae(shift_factor=0.1, scaling_factor=0.7),
        text_encoder=CLIPTextModel(CLIPTextConfig(**tiny._TEXT)),
        tokenizer=tiny._tokenizer(),
        text_encoder_2=parts.t5(),
        tokenizer_2=parts.tokenizer(),
    )
    return tiny._ready(pipeline, dtype)


def flux_with_true_guidance(dtype):
    return flux(dtype, distilled=False)


def flux2(dtype):
    torch.manual_seed(0)
    pipeline = Flux2Pipeline(
        transformer=_flux2_transformer(guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=parts.flux2_vae(),
        text_encoder=parts.mistral(),
        tokenizer=parts.tokenizer(),
    )
    return tiny._ready(pipeline, dtype)


def flux2_klein(dtype):
    torch.manual_seed(0)
    pipeline = Flux2KleinPipeline(
        transformer=_flux2_transformer(guidance_embeds=False),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=parts.flux2_vae(),
        text_encoder=parts.qwen3(),
        tokenizer=parts.tokenizer(),
    )
    return tiny._ready(pipeline, dtype)


def _flux2_transformer(guidance_embeds):
    transformer = Flux2Transformer2DModel(
        joint_attention_dim=2 * parts.TEXT_DIM,  # the hidden states of two layers, side by side
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
        **_PACKED,
    )
    return parts.lively(transformer, gain=2.0)  # its gates are faint


def aura_flow(dtype):
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=parts.TEXT_DIM,
        caption_projection_dim=16,
        pos_embed_max_size=16,
        **_WIDTH,
    )
    pipeline = AuraFlowPipeline(
        transformer=parts.lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=tiny._vae(),
        text_encoder=parts.t5(UMT5EncoderModel),
        tokenizer=parts.tokenizer(),
    )
    return tiny._ready(pipeline, dtype)


def lumina2(dtype):
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 8, 8),
        cap_feat_dim=parts.TEXT_DIM,
    )
    pipeline = Lumina2Pipeline(
        transformer=parts.lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=parts.vae_by_8(),
        text_encoder=parts.gemma(),
        tokenizer=parts.tokenizer(),
    )
    return tiny._ready(pipeline, dtype)


def sana(dtype):
    torch.manual_seed(0)
    pipeline = SanaPipeline(
        transformer=_sana_transformer(),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
        ),
        vae=parts.dc_vae(),
        text_encoder=parts.gemma(),
        tokenizer=parts.tokenizer(),
    )
    return tiny._ready(pipeline, dtype)


def sana_sprint(dtype):
    torch.manual_seed(0)
    pipeline = SanaSprintPipeline(
        transformer=_sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads", timestep_scale=1000.0),
        scheduler=SCMScheduler(),
        vae=parts.dc_vae(),
        text_encoder=parts.gemma(),
        tokenizer=parts.tokenizer(),
    )
    return tiny._ready(pipeline, dtype)


def _sana_transformer(**config):
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=parts.TEXT_DIM,
        sample_size=4,
        attention_bias=True,
        **_WIDTH,
        **config,
    )
    for block in transformer.transformer_blocks:  # off the kinks of the linear attention, which is of ReLUs
        for projection in (block.attn1.to_q, block.attn1.to_k):
            torch.nn.init.constant_(projection.bias, 4.0)
    return parts.lively(transformer)


def chroma(dtype):
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        joint_attention_dim=parts.TEXT_DIM,
        axes_dims_rope=(4, 2, 2),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
        **_PACKED,
    )
    pipeline = ChromaPipeline(
        transformer=parts.lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny._vae(shift_factor=0.1, scaling_factor=0.7),
        text_encoder=parts.t5(),
        tokenizer=parts.tokenizer(),
    )
    return tiny._ready(pipeline, dtype)


def qwen_image(dtype):
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=parts.TEXT_DIM,
        axes_dims_rope=(4, 2, 2),
        **_WIDTH,
    )
    pipeline = QwenImagePipeline(
        transformer=parts.lively(transformer, gain=2.0),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=parts.qwen_vae(),
        text_encoder=parts.qwen_vl(),
        tokenizer=parts.tokenizer(),
    )
    return tiny._ready(pipeline, dtype)


def z_image(dtype):
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=parts.TEXT_DIM,
        axes_dims=[4, 2, 2],
        axes_lens=[64, 8, 8],
    )
    pipeline = ZImagePipeline(
        transformer=parts.lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny._vae(shift_factor=0.1, scaling_factor=0.7),
        text_encoder=parts.qwen3(),
        tokenizer=parts.tokenizer(),
    )
    return tiny._ready(pipeline, dtype)


_TRUE_GUIDANCE = {"true_cfg_scale": 4.0, "negative_prompt": "blurry"}
_FLUX2 = {**_SHORT, "max_sequence_length": 64, "text_encoder_out_layers": (1, 2)}
_SANA = {
    "num_inference_steps": 2,
    "height": 32,
    "width": 32,
    "max_sequence_length": 8,
    "complex_human_instruction": [],
    "use_resolution_binning": False,
}

_FLOW_MATCH = "the flow-matching scheduler"
_LATENTS = "the latents"
_SINGLE_STREAM = (*ATTENTION, "to_qkv_mlp_proj")
_SINGLE_STREAM_NEEDS = "most blocks hold q, k and v in one projection: add `to_qkv_mlp_proj` to `adapter.targets`"
_TRUE_GUIDANCE_NEEDS = "guided only with a `negative_prompt`, which may be empty"
_BINNING_NEEDS = "`use_resolution_binning: false`, since it resizes the picture after the decoder"

ROWS = [
    Row("Stable Diffusion 3", tiny.stable_diffusion_3, _CALL, rounds=_FLOW_MATCH, sd_family=True),
    Row("Flux", flux, {**_SHORT, "guidance_scale": 3.5}, parts.PROMPTS, rounds=_FLOW_MATCH),
    Row(
        "Flux with true guidance",
        flux_with_true_guidance,
        {**_SHORT, **_TRUE_GUIDANCE},
        parts.PROMPTS,
        needs=_TRUE_GUIDANCE_NEEDS,
        calls=2,
        rounds=_FLOW_MATCH,
    ),
    Row(
        "Flux2",
        flux2,
        _FLUX2,
        parts.PROMPTS,
        needs=_SINGLE_STREAM_NEEDS,
        targets=_SINGLE_STREAM,
        rounds=_FLOW_MATCH,
    ),
    Row(
        "Flux2 Klein",
        flux2_klein,
        _FLUX2,
        parts.PROMPTS,
        needs=_SINGLE_STREAM_NEEDS,
        calls=2,
        targets=_SINGLE_STREAM,
        rounds=_FLOW_MATCH,
    ),
    # The last of two steps would hardly be one with the default noise levels.
    Row("AuraFlow", aura_flow, {**_SHORT, "sigmas": [1.0, 0.5]}, parts.PROMPTS, rounds=_FLOW_MATCH),
    Row(
        "Lumina2",
        lumina2,
        # Eight pixels a latent whatever the decoder does, and a long system prompt before every prompt.
        {**_SHORT, "height": 32, "width": 32, "max_sequence_length": 48},
        parts.PROMPTS,
        calls=2,
        rounds=_FLOW_MATCH,
    ),
    Row("Sana", sana, _SANA, parts.PROMPTS, needs=_BINNING_NEEDS, rounds=_LATENTS),
    Row("Sana Sprint", sana_sprint, _SANA, parts.PROMPTS, needs=_BINNING_NEEDS, rounds=_LATENTS),
    Row("Chroma", chroma, _SHORT, parts.PROMPTS, calls=2, rounds=_FLOW_MATCH),
    Row(
        "QwenImage",
        qwen_image,
        {**_SHORT, **_TRUE_GUIDANCE},
        parts.PROMPTS,
        needs=f"It is {_TRUE_GUIDANCE_NEEDS}. {CUT_OFF}",
        calls=2,
        rounds=_FLOW_MATCH,
    ),
    Row("Z-Image", z_image, _SHORT, parts.PROMPTS, rounds=_LATENTS),
]
