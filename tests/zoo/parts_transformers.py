"""Tiny text encoders, tokenizers and decoders of the newer text-to-image pipelines."""

import functools

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

TEXT_DIM = 16
PROMPTS = ("a cat", "a small brown dog")
"""Of different lengths, so that padding and masks take part."""

_WORDS = ("<pad>", "<eos>", "<unk>", *" ".join(PROMPTS).split(), "blurry", "user", "assistant", "system")
_CHAT = (
    "{% for message in messages %}{{ message.role }} "
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)


@functools.cache
def vocabulary():
    return {word: index for index, word in enumerate(dict.fromkeys(_WORDS))}


def lively(model, gain=1.25):
    """Linear layers that pass on what they get in full strength: by default each weakens it by the root of three.

    In a narrow model of one or two blocks little would be left of the attention, and so of the adapter's effect.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(std=gain * module.in_features**-0.5)
    return model


def tokenizer():
    """One token a word; an end token, so that even an empty prompt has something to attend to."""
    words = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=_CHAT,
        padding_side="right",
        model_max_length=512,
    )


def t5(family=T5EncoderModel):
    config = {T5EncoderModel: T5Config, UMT5EncoderModel: UMT5Config}[family]
    return family(config(vocab_size=len(vocabulary()), d_model=TEXT_DIM, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def _decoder_only(**more):
    """Settings that decoder-only language models share."""
    return {
        "vocab_size": len(vocabulary()),
        "hidden_size": TEXT_DIM,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        **more,
    }


def gemma():
    return Gemma2Model(Gemma2Config(**_decoder_only(head_dim=8)))


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**_decoder_only(head_dim=8)))


def mistral():
    """With its eyes, which a text-to-image call leaves closed."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={"model_type": "mistral", **_decoder_only(head_dim=8)},
            vision_config={"model_type": "pixtral", "head_dim": 8, "image_size": 16, "patch_size": 8, **vision},
        )
    )


def qwen_vl():
    """With its eyes, which a text-to-image call leaves closed."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=_decoder_only(rope_parameters=rope),
            vision_config={
                "depth": 1,
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_heads": 1,
                "out_hidden_size": TEXT_DIM,
                "patch_size": 8,
            },
        )
    )


def vae_by_8():
    """Eight pixels a latent, which some pipelines take for granted."""
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        shift_factor=0.1,
        scaling_factor=0.7,
    )
    return _off_black_and_white(vae, vae.decoder.conv_out)


def flux2_vae():
    """With running statistics of the latents that are not trivial."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return _off_black_and_white(vae, vae.decoder.conv_out)


def dc_vae():
    """The deep-compression decoder, without the ReLUs that bend finite differences."""
    widths = {"block_out_channels": (4, 4, 8, 8), "layers_per_block": (1,) * 4, "qkv_multiscales": ((),) * 4}
    vae = AutoencoderDC(
        latent_channels=4,
        **{f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in widths.items()},
        decoder_conv_act_fn="silu",
        scaling_factor=0.7,
    )
    return _off_black_and_white(vae, vae.decoder.conv_out)


def qwen_vae():
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 1.5, 0.8, 1.2],
    )
    return _off_black_and_white(vae, vae.decoder.conv_out)


def _off_black_and_white(vae, last):
    last.weight.data *= 0.2
    return vae
