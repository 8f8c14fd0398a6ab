"""Stable Diffusion and its relatives: pipelines with a UNet, and those whose transformer came soon after it."""

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMPipeline,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableCascadeDecoderPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
    VQModel,
)
from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

import tiny
from zoo import parts_stable_diffusion as parts
from zoo.row import Row

_CALL = {"num_inference_steps": 3, "guidance_scale": 5.0}
_MILD = {"num_inference_steps": 3, "guidance_scale": 2.0}  # guidance multiplies what half precision rounds
_UNCLIPPED = {"clip_sample": False, "timestep_spacing": "trailing"}  # in which the last of few steps counts
_UNSAFE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _image(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


def _stable_diffusion(cls, scheduler, dtype, **unet):
    torch.manual_seed(0)
    pipeline = cls(
        vae=parts.vae(),
        text_encoder=parts.clip(),
        tokenizer=parts.clip_tokenizer(),
        unet=parts.unet(**unet),
        scheduler=scheduler,
        **_UNSAFE,
    )
    return tiny._ready(pipeline, dtype)


def stable_diffusion_2(dtype):
    scheduler = tiny.scheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    return _stable_diffusion(StableDiffusionPipeline, scheduler, dtype, use_linear_projection=True)


def img2img(dtype):
    return _stable_diffusion(StableDiffusionImg2ImgPipeline, tiny.scheduler(), dtype)


def inpainting(dtype):
    return _stable_diffusion(StableDiffusionInpaintPipeline, tiny.scheduler(), dtype, in_channels=9)


def lcm(dtype):
    return _stable_diffusion(LatentConsistencyModelPipeline, LCMScheduler(), dtype, time_cond_proj_dim=8)


def turbo(dtype):
    scheduler = tiny.scheduler(EulerDiscreteScheduler, timestep_spacing="trailing", steps_offset=1)
    return _stable_diffusion(StableDiffusionPipeline, scheduler, dtype)


def _stable_diffusion_xl(dtype, scheduler, both):
    torch.manual_seed(0)
    pipeline = StableDiffusionXLPipeline(
        vae=parts.vae(),
        text_encoder=parts.clip() if both else None,
        text_encoder_2=parts.clip(projected=True),
        tokenizer=parts.clip_tokenizer() if both else None,
        tokenizer_2=parts.clip_tokenizer(),
        unet=parts.unet(
            cross_attention_dim=parts.WIDTH * (2 if both else 1),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + parts.WIDTH,
        ),
        scheduler=scheduler,
        add_watermarker=False,
    )
    return tiny._ready(pipeline, dtype)


def sdxl(dtype):
    return _stable_diffusion_xl(dtype, tiny.scheduler(), both=True)


def sdxl_with_one_text_encoder(dtype):
    return _stable_diffusion_xl(dtype, tiny.scheduler(EulerDiscreteScheduler, steps_offset=1), both=False)


def _pixart(cls, scheduler, dtype):
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,  # the noise and its variance
        num_layers=2,
        cross_attention_dim=8,
        caption_channels=parts.WIDTH,
        sample_size=8,
        use_additional_conditions=False,
    )
    pipeline = cls(
        tokenizer=parts.t5_tokenizer(),
        text_encoder=parts.t5(),
        vae=parts.vae(),
        transformer=transformer,
        scheduler=scheduler,
    )
    return tiny._ready(pipeline, dtype)


def pixart_alpha(dtype):
    return _pixart(PixArtAlphaPipeline, DPMSolverMultistepScheduler(timestep_spacing="trailing"), dtype)


def pixart_sigma(dtype):
    return _pixart(PixArtSigmaPipeline, tiny.scheduler(timestep_spacing="trailing"), dtype)


def hunyuan_dit(dtype):
    torch.manual_seed(0)
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=4,
        hidden_size=16,
        num_layers=4,
        mlp_ratio=1.0,
        cross_attention_dim=parts.WIDTH,
        cross_attention_dim_t5=parts.WIDTH,
        pooled_projection_dim=8,
    )
    pipeline = HunyuanDiTPipeline(
        vae=parts.vae(blocks=4),  # it reckons with a VAE of factor 8
        text_encoder=parts.bert(),
        tokenizer=parts.bert_tokenizer(),
        transformer=transformer,
        scheduler=tiny.scheduler(DDPMScheduler, **_UNCLIPPED, prediction_type="v_prediction"),
        text_encoder_2=parts.t5(),
        tokenizer_2=parts.t5_tokenizer(),
        **_UNSAFE,
    )
    return tiny._ready(pipeline, dtype)


def kandinsky_3(dtype):
    torch.manual_seed(0)
    unet = Kandinsky3UNet(
        time_embedding_dim=16,
        groups=1,  # norms of a few numbers bend so much that finite differences fail
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8, 8),
        cross_attention_dim=8,
        encoder_hid_dim=parts.WIDTH,
    )
    movq = VQModel(
        block_out_channels=(32,),  # its norms have 32 groups
        norm_num_groups=32,
        latent_channels=4,
        num_vq_embeddings=8,
        norm_type="spatial",
    )
    parts.calm(movq.decoder.conv_out, to=0.1)
    pipeline = Kandinsky3Pipeline(
        tokenizer=parts.t5_tokenizer(),
        text_encoder=parts.t5(),
        unet=unet,
        scheduler=tiny.scheduler(DDPMScheduler, **_UNCLIPPED, beta_end=0.002),  # the more noise, the larger the latents
        movq=movq,
    )
    return tiny._ready(pipeline, dtype)


def stable_cascade(dtype):
    torch.manual_seed(0)
    decoder = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        patch_size=2,
        conditioning_dim=8,
        block_out_channels=(8, 8),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=parts.WIDTH,
        clip_seq=1,
        effnet_in_channels=4,
    )
    # Image embeddings come in the prior's dtype, which is that of the decoder; the row has them in float32.
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "effnet": kwargs["effnet"].to(dtype)}), with_kwargs=True
    )
    vqgan = PaellaVQModel(levels=1, bottleneck_blocks=1, embed_dim=8, latent_channels=4, num_vq_embeddings=8)
    parts.calm(vqgan.out_block[0], to=0.004)  # nothing in it normalises the latents
    torch.nn.init.constant_(vqgan.out_block[0].bias, 0.5)  # between black and white, which are 0 and 1
    pipeline = StableCascadeDecoderPipeline(
        decoder=decoder,
        tokenizer=parts.clip_tokenizer(),
        text_encoder=parts.clip(projected=True),
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=vqgan,
        latent_dim_scale=4,
    )
    return tiny._ready(pipeline, dtype)


def dit(dtype):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,  # the noise and its variance
        num_layers=2,
        sample_size=8,
    )
    pipeline = DiTPipeline(
        transformer=transformer,
        vae=parts.vae(),
        scheduler=tiny.scheduler(),
        id2label={0: "cat, pussycat", 1: "dog"},
    )
    return tiny._ready(pipeline, dtype)


def _unet_without_prompts():
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def ddpm(dtype):
    torch.manual_seed(0)
    # That it predicts pictures rather than noise keeps them off black and white.
    scheduler = tiny.scheduler(DDPMScheduler, **_UNCLIPPED, prediction_type="sample")
    return tiny._ready(DDPMPipeline(unet=_unet_without_prompts(), scheduler=scheduler), dtype)


def consistency_model(dtype):
    torch.manual_seed(0)
    scheduler = CMStochasticIterativeScheduler(clip_denoised=False)
    return tiny._ready(ConsistencyModelPipeline(unet=_unet_without_prompts(), scheduler=scheduler), dtype)


_PIXART = {**_CALL, "use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 8}
_STEPWISE = "Checkpointing by `step` only: its blocks have none."
_CLIPPED = "Its scheduler must not clip: `{}=False`."

ROWS = [
    Row("Stable Diffusion 1.5", tiny.stable_diffusion, _CALL, sd_family=True),
    Row("Stable Diffusion 2", stable_diffusion_2, _MILD, sd_family=True),
    Row(
        "Stable Diffusion img2img",
        img2img,
        {**_MILD, "num_inference_steps": 4, "strength": 0.75, "image": _image(1, 3, 16, 16)},
        needs="The call's `image` is the same for all prompts; `strength` of the denoising steps are run.",
        sd_family=True,
    ),
    Row(
        "Stable Diffusion inpainting",
        inpainting,
        {**_MILD, "image": _image(1, 3, 16, 16), "mask_image": _image(1, 1, 16, 16).round(), "height": 16, "width": 16},
        needs="The call's `image` and `mask_image` are the same for all prompts.",
        sd_family=True,
    ),
    Row("SDXL", sdxl, _MILD, sd_family=True),
    Row("SDXL with one text encoder", sdxl_with_one_text_encoder, _MILD, rounds="the Euler scheduler", sd_family=True),
    Row("LCM", lcm, _MILD, sd_family=True),
    Row("SD-Turbo", turbo, {"num_inference_steps": 1, "guidance_scale": 0.0}, sd_family=True),
    Row("PixArt-alpha", pixart_alpha, _PIXART, rounds="the DPM-Solver scheduler"),
    Row("PixArt-Sigma", pixart_sigma, _PIXART),
    Row(
        "HunyuanDiT",
        hunyuan_dit,
        {**_CALL, "use_resolution_binning": False},
        needs=_STEPWISE,
        rounds="its layer norms",
        blocks=False,
    ),
    Row("Kandinsky 3", kandinsky_3, {**_CALL, "height": 64, "width": 64}, needs=_STEPWISE, blocks=False),
    Row(
        "Stable Cascade decoder",
        stable_cascade,
        {**_CALL, "image_embeddings": _image(2, 4, 2, 2)},
        needs="A spec whose `conditions` give the prior's `image_embeddings` of each prompt.",
    ),
    Row("DiT", dit, _CALL, ("cat", "dog"), needs="The prompts are class labels."),
    Row(
        "DDPM", ddpm, {"num_inference_steps": 3}, needs=f"{_CLIPPED.format('clip_sample')} Prompts mean nothing to it."
    ),
    Row(
        "Consistency model",
        consistency_model,
        {"num_inference_steps": 2},
        needs=f"{_CLIPPED.format('clip_denoised')} Prompts mean nothing to it.",
    ),
]
