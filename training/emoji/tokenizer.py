"""Builds the tokenizer: a byte-level BPE of CLIP's kind in which every word of every concept is one token."""

from __future__ import annotations

import itertools

import numpy as np
from concepts import STYLE_WORDS
from data import BUILD
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

MAX_TOKENS = 24
START, END = "<|startoftext|>", "<|endoftext|>"
COMMON_WORDS = """
a an the of and with in on photo picture drawing image emoji cute small big red green blue yellow orange purple pink
brown black white gray colourful colorful bright dark blurry noisy distorted clean sharp beautiful ugly bad quality
low high very style icon cartoon realistic happy sad eating running sitting playing washing riding background
"""


def vocabulary_words() -> list[str]:
    """Every word that must be one token."""
    names = np.load(BUILD / "data.npz")["names"]
    words = {word for name in [*names, *STYLE_WORDS.values()] for word in str(name).split()}
    return sorted(word for word in words | set(COMMON_WORDS.split()) if word.isalpha() and word.isascii())


def merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Apply the merges of a BPE to the pieces of one word, best rank first."""
    while len(pieces) > 1:
        pairs = list(itertools.pairwise(pieces))
        best = min(range(len(pairs)), key=lambda index: ranks.get(pairs[index], len(ranks)))
        if pairs[best] not in ranks:
            break
        pieces = [*pieces[:best], pieces[best] + pieces[best + 1], *pieces[best + 2 :]]
    return pieces


def whole_word_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges under which every word becomes one token.

    A later merge ranks lower, so it cannot change how an earlier word is put together.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = merge([*word[:-1], word[-1] + "</w>"], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = merge(pieces, ranks)
    return list(ranks)


def make_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the pipeline and of the reward CLIP."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = whole_word_merges(vocabulary_words())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *dict.fromkeys(a + b for a, b in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


if __name__ == "__main__":
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(BUILD / "tokenizer")
    print(len(tokenizer), tokenizer.tokenize("a fox, line drawing"), tokenizer.tokenize("a hippopotamus, 3d"))
