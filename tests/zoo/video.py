"""Pipelines that make videos: their rewards get frames (B, F, 3, H, W)."""

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    MotionAdapter,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import tiny
from zoo import parts_video as parts
from zoo.row import CUT_OFF, Row

_CALL = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16, "max_sequence_length": 16}
_FLOW_MATCH = "the flow-matching scheduler"
_NORMS = "the transformer's norms"


def _ready(pipeline, dtype, contrast=0.2):
    """As in `tiny`, with videos off black and white."""
    out = pipeline.vae.decoder.conv_out
    getattr(out, "conv", out).weight.data *= contrast
    return tiny._ready(pipeline, dtype)


def _open_gates(transformer):
    """Let the blocks, whose gates are nearly closed at first, have a say."""
    for name, parameter in transformer.named_parameters():
        if ".norm" in name and name.endswith(".linear.weight"):
            parameter.data *= 8


def ltx(dtype):
    """Two latent frames of 4x4, of 3 frames of 32x32, the smallest that the pipeline takes."""
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=parts.WIDTH,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        upsample_residual=(False,) * 2,
        upsample_factor=(1,) * 2,
    )
    pipeline = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=parts.t5(),
        tokenizer=parts.letters(),
        transformer=transformer,
    )
    return _ready(pipeline, dtype)


def _wan_transformer():
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=parts.WIDTH,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=8,
    )


def _wan(dtype, **denoisers):
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[2.0] * 4,
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    pipeline = WanPipeline(
        tokenizer=parts.letters(),
        text_encoder=parts.umt5(),
        vae=vae,
        scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        **denoisers,
    )
    return _ready(pipeline, dtype)


def wan_2_1(dtype):
    """Two latent frames of 8x8, of 3 frames of 16x16."""
    torch.manual_seed(0)
    return _wan(dtype, transformer=_wan_transformer())


def wan_2_2(dtype):
    """The same with a transformer for the first half of the noise levels and another for the second."""
    torch.manual_seed(0)
    return _wan(dtype, transformer=_wan_transformer(), transformer_2=_wan_transformer(), boundary_ratio=0.9)


def cogvideox(dtype):
    """Three latent frames of 4x4, of 5 frames of 16x16."""
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=parts.WIDTH,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    _open_gates(transformer)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
    )
    pipeline = CogVideoXPipeline(
        tokenizer=parts.letters(),
        text_encoder=parts.t5(),
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    )
    return _ready(pipeline, dtype, contrast=0.08)


def mochi(dtype):
    """Two latent frames of 2x2, the fewest for a height and width of 16, and 7 frames of 8x8 from a smaller decoder."""
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=parts.WIDTH,
        time_embed_dim=8,
        max_sequence_length=16,
    )
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        latent_channels=12,
        layers_per_block=(1,) * 5,
        spatial_expansions=(2, 2, 1),
        scaling_factor=0.07,  # latents that the decoder hears, although it normalises its features one by one
    )
    vae.decoder.proj_out.weight.data *= 0.2
    pipeline = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=parts.t5(),
        tokenizer=parts.letters(),
        transformer=transformer,
    )
    return tiny._ready(pipeline, dtype)


def _hunyuan_vae(**sizes):
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        **sizes,
    )


def hunyuan_video(dtype):
    """Two latent frames of 4x4, of 5 frames of 16x16."""
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=parts.WIDTH,
        pooled_projection_dim=parts.WIDTH,
        rope_axes_dim=(4, 2, 2),
    )
    _open_gates(transformer)
    pipeline = HunyuanVideoPipeline(
        text_encoder=parts.llama(),
        tokenizer=parts.letters("<s> $A"),
        transformer=transformer,
        vae=_hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=parts.clip(),
        tokenizer_2=tiny._tokenizer(),
    )
    return _ready(pipeline, dtype)


def kandinsky5(dtype):
    """Two latent frames of 4x4, of 5 frames of 16x16."""
    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=parts.WIDTH,
        in_text_dim2=parts.WIDTH,
        time_dim=8,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
    )
    for name, parameter in transformer.named_parameters():
        if "modulation" in name:  # zero at first, which closes every block
            parameter.data.normal_(std=0.5)
        if name.endswith(("query_norm.weight", "key_norm.weight")):  # their products are rounded to bfloat16
            parameter.data *= 0.1
    text = {
        "vocab_size": parts.num_letters(),
        "hidden_size": parts.WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": parts.WIDTH}
    pipeline = Kandinsky5T2VPipeline(
        transformer=transformer,
        vae=_hunyuan_vae(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=parts.letters("<s> $A"),
        text_encoder_2=parts.clip(),
        tokenizer_2=tiny._tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.prompt_template, pipeline.prompt_template_encode_start_idx = "{}", 0  # its own is 128 tokens long
    pipeline = _ready(pipeline, dtype)
    transformer.time_embeddings.float()  # as when loaded; its frequencies are of that dtype
    return pipeline


def animatediff(dtype):
    """Stable Diffusion with motion modules: two frames of 16x16, three of which are decoded at a time."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    motion = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=4,
        use_motion_mid_block=False,
    )
    pipeline = AnimateDiffPipeline(
        vae=tiny._vae(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**tiny._TEXT)),
        tokenizer=tiny._tokenizer(),
        unet=unet,
        motion_adapter=motion,
        scheduler=tiny.scheduler(),
    )
    return tiny._ready(pipeline, dtype)


_ANIMATED = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16, "num_frames": 2}

ROWS = [
    Row("LTX", ltx, {**_CALL, "height": 32, "width": 32, "num_frames": 3}, modality="video", rounds=_FLOW_MATCH),
    Row("Wan 2.1", wan_2_1, {**_CALL, "num_frames": 3}, calls=2, modality="video", needs=CUT_OFF, rounds=_NORMS),
    Row(
        "Wan 2.2",
        wan_2_2,
        {**_CALL, "num_frames": 3},
        calls=2,
        modality="video",
        needs=f"Two transformers take turns, and the first gets no gradient from the last steps. {CUT_OFF}",
        rounds=_NORMS,
    ),
    Row("AnimateDiff", animatediff, {**_ANIMATED, "decode_chunk_size": 3}, modality="video"),
    Row(
        "CogVideoX",
        cogvideox,
        {**_CALL, "num_frames": 5},
        modality="video",
        rounds="the pipeline, which casts the noise prediction",
    ),
    Row("Mochi", mochi, {**_CALL, "num_frames": 7}, modality="video", rounds=_FLOW_MATCH),
    Row(
        "HunyuanVideo",
        hunyuan_video,
        {**_CALL, "num_frames": 5, "prompt_template": {"template": "{}", "crop_start": 0}},
        modality="video",
        rounds=_FLOW_MATCH,
    ),
    Row(
        "Kandinsky 5",
        kandinsky5,
        {**_CALL, "num_frames": 5, "negative_prompt": "dull"},
        calls=2,
        modality="video",
        targets=("to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer"),
        needs="Its projections have names of their own: give `to_query`, `to_key` and `to_value` as the targets.",
        rounds="the rotary embeddings, which turn queries and keys into bfloat16",
    ),
]
