"""The text tower that the pipeline and the reward CLIP have in common (with weights of their own)."""

from __future__ import annotations

from functools import cache

from data import BUILD
from tokenizer import MAX_TOKENS
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer


@cache
def load_tokenizer() -> CLIPTokenizer:
    """The tokenizer that the stage `data` built."""
    return CLIPTokenizer.from_pretrained(BUILD / "tokenizer")


def text_config() -> CLIPTextConfig:
    """Three layers of width 192."""
    tokenizer = load_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tokenize(captions: list[str]) -> Tensor:
    """Token ids (B, 24), padded with the end token."""
    return load_tokenizer()(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
