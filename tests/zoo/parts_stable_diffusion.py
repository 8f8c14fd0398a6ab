"""What the pipelines of the Stable Diffusion family and of the older transformers are made of."""

import functools
import string

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH = 16
"""Of every text encoder's output."""

_LETTERS = tuple(string.ascii_lowercase)


@functools.cache
def clip_tokenizer():
    """One token a letter."""
    tokens = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16, unk_token="<|endoftext|>")


def clip(projected=False):
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,  # the Stable Diffusion XL pipelines take the last layer but one
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


@functools.cache
def t5_tokenizer():
    """One token a letter, and one that begins a word."""
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    letters = [(letter, -2.0) for letter in ("▁", *_LETTERS)]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=16)


def t5():
    config = T5Config(
        vocab_size=30, d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


@functools.cache
def bert_tokenizer():
    """One token a letter."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    return BertTokenizer(vocab={token: place for place, token in enumerate(tokens)}, model_max_length=77)


def bert():
    config = BertConfig(
        vocab_size=57,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
    )
    return BertModel(config)


def vae(blocks=2, **config):
    """A VAE that halves the size in every block but the last."""
    made = AutoencoderKL(
        block_out_channels=(4,) * blocks,
        norm_num_groups=1,  # norms of few channels would fix the brightness of pictures
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        sample_size=16,
        **config,
    )
    calm(made.decoder.conv_out, to=0.5)
    return made


def calm(layer, to=0.2):
    """Keep pictures off black and white, where clamping bends gradients."""
    with torch.no_grad():
        layer.weight.mul_(to)


def unet(**config):
    defaults = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),  # in a narrower one, half precision turns gradients too far
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**(defaults | config))
