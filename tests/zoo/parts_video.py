"""Text encoders and tokenizers that the video pipelines and the CogView ones share."""

import functools

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 16
"""Of every text encoder."""

_SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]
_SIZES = {"num_attention_heads": 2, "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 2}
_T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1}


@functools.cache
def letters(template="$A </s>", max_length=16):
    """A tokenizer with one token a character, between special tokens as in the template."""
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *characters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    special = [(token, vocabulary[token]) for token in _SPECIAL]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=max_length,
    )


def num_letters():
    """How many tokens the tokenizers know."""
    return len(letters())


def t5():
    """A T5 encoder."""
    return T5EncoderModel(T5Config(vocab_size=num_letters(), **_T5))


def umt5():
    """Its multilingual relative, with position biases in every layer."""
    return UMT5EncoderModel(UMT5Config(vocab_size=num_letters(), **_T5))


def llama():
    """A Llama without its head."""
    return LlamaModel(
        LlamaConfig(vocab_size=num_letters(), num_key_value_heads=1, max_position_embeddings=64, **_SIZES)
    )


def clip():
    """A CLIP text encoder of the length of the published ones, which some pipelines take for granted."""
    config = CLIPTextConfig(
        vocab_size=54, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1, **_SIZES
    )
    return CLIPTextModel(config)
