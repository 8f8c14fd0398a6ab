"""Rewards of human preference: HPS v2 and v2.1 (Wu et al. 2023, arXiv 2306.09341; github.com/tgxs002/HPSv2)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from alignprop.pixels import normalise, resize
from alignprop.rewards.checkpoints import check_vocabulary, load_tensors
from alignprop.rewards.clip import VIT_H_14, Clip, load_tokenizer
from alignprop.rewards.openclip import from_openclip, vit_h_14
from alignprop.rewards.preprocessing import CLIP_MEAN, CLIP_STD

MODEL = "xswu/HPSv2"
KIND = "HPS v2 checkpoint (OpenCLIP, ViT-H/14)"


class HumanPreferenceScore(nn.Module):
    """Cosine of the embeddings of picture and prompt, by a CLIP that was tuned on human choices."""

    def __init__(self, model: str, filename: str, tokenizer: str, revision: str | None) -> None:
        """Load a version; see `hpsv2`."""
        super().__init__()
        prompts = load_tokenizer(tokenizer, None, "tokenizer")
        tensors = load_tensors(model, filename, revision, KIND)
        clip = from_openclip(tensors, vit_h_14(), model, KIND)
        check_vocabulary(prompts, clip.config.text_config.vocab_size, tokenizer, "tokenizer")
        size = clip.config.vision_config.image_size
        self.clip = Clip(clip, prompts, functools.partial(preprocess, size=size))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score pictures (B, 3, H, W) in [0, 1]: shape (B,), -1 to 1."""
        similarity: Tensor = self.clip(images, prompts)
        return similarity

    def features(self, images: Tensor) -> Tensor:
        """The CLIP's embeddings (B, D) of unit length, of pictures (B, 3, H, W) in [0, 1], with gradient."""
        return self.clip.features(images)


def hpsv2(model: str = MODEL, tokenizer: str = VIT_H_14, revision: str | None = None) -> HumanPreferenceScore:
    """Build the reward of HPS v2.

    Args:
        model: The file `HPS_v2_compressed.pt`, or a folder or hub id that holds it.
        tokenizer: Folder or hub id of the tokenizer of any CLIP of OpenAI or OpenCLIP.
        revision: Of `model` on the hub; None for a pinned commit of the published one.

    Raises:
        ValueError: There is no such checkpoint, or it is of another kind.
    """
    return HumanPreferenceScore(model, "HPS_v2_compressed.pt", tokenizer, revision)


def hpsv2_1(model: str = MODEL, tokenizer: str = VIT_H_14, revision: str | None = None) -> HumanPreferenceScore:
    """Build the reward of HPS v2.1, which was trained on better data; `model` holds `HPS_v2.1_compressed.pt`.

    Raises:
        ValueError: As `hpsv2`.
    """
    return HumanPreferenceScore(model, "HPS_v2.1_compressed.pt", tokenizer, revision)


def preprocess(images: Tensor, size: int) -> Tensor:
    """Prepare pictures (B, 3, H, W) in [0, 1] for a model that takes squares of `size` pixels."""
    return normalise(letterbox(images, size), CLIP_MEAN, CLIP_STD)


def letterbox(images: Tensor, size: int) -> Tensor:
    """Resize the longer edge and fill up to a square with black, as HPS v2 was trained and is evaluated.

    HPS v2 resizes floating point pictures, so bicubic's overshoot is not clipped.

    Args:
        images: Shape (B, C, H, W).
        size: Edge of the square in pixels.
    """
    longer = max(images.shape[-2:])
    height, width = (max(1, round(edge * size / longer)) for edge in images.shape[-2:])
    if longer != size:
        images = resize(images, (height, width), "bicubic")
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))
