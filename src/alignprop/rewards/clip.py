"""What rewards built on CLIP share (Radford et al. 2021, arXiv 2103.00020): embeddings with gradient to the pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignprop.rewards.checkpoints import check_vocabulary, load_model, load_part
from alignprop.rewards.preprocessing import Preprocessing

if TYPE_CHECKING:
    from transformers import CLIPModel

VIT_L_14 = "openai/clip-vit-large-patch14"
VIT_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

KIND = "CLIP of transformers"


class ImageEncoder(nn.Module):
    """The half of a CLIP that embeds pictures."""

    def __init__(self, model: CLIPModel, preprocess: Callable[[Tensor], Tensor]) -> None:
        """Take the half out of a CLIP.

        Args:
            model: Its other half is not kept.
            preprocess: From pictures (B, 3, H, W) in [0, 1] to what the model takes, with gradient.
        """
        super().__init__()
        self.vision_model = model.vision_model
        self.projection = model.visual_projection
        self.preprocess = preprocess

    def forward(self, images: Tensor) -> Tensor:
        """Embed pictures (B, 3, H, W) in [0, 1]: vectors of length 1, shape (B, D), single precision or better."""
        pixels = self.preprocess(_at_least_single(images))  # the model rounds them to its own precision
        pooled = self.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(_at_least_single(self.projection(pooled)), dim=-1)


class PromptEncoder(nn.Module):
    """The half of a CLIP that embeds prompts, each of them once."""

    def __init__(self, model: CLIPModel, tokenizer: Any) -> None:
        """Take the half out of a CLIP.

        Args:
            model: Its other half is not kept.
            tokenizer: Of transformers; prompts are cut to the length that the model knows.
        """
        super().__init__()
        self.text_model = model.text_model
        self.projection = model.text_projection
        self.tokenizer = tokenizer
        self._embeddings: dict[str, Tensor] = {}

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Embed B prompts: vectors of length 1, shape (B, D), single precision or better."""
        for prompt in set(prompts) - self._embeddings.keys():  # each alone: its score must not depend on its company
            self._embeddings[prompt] = self._embed(prompt)
        weight = self.projection.weight
        embeddings = torch.stack([self._embeddings[prompt].to(weight) for prompt in prompts])
        return F.normalize(_at_least_single(embeddings), dim=-1)

    def _embed(self, prompt: str) -> Tensor:
        length = self.text_model.config.max_position_embeddings
        tokens = self.tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt")
        pooled = self.text_model(**tokens.to(self.projection.weight.device)).pooler_output
        embedding: Tensor = self.projection(pooled)[0]
        return embedding


class Clip(nn.Module):
    """Cosine of the angle between the embeddings of picture and prompt."""

    def __init__(self, model: CLIPModel, tokenizer: Any, preprocess: Callable[[Tensor], Tensor]) -> None:
        """Join a CLIP, its tokenizer and its preprocessing; see `ImageEncoder` and `PromptEncoder`."""
        super().__init__()
        self.images = ImageEncoder(model, preprocess)
        self.prompts = PromptEncoder(model, tokenizer)
        self.logit_scale = model.logit_scale

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Compare B pictures (B, 3, H, W) in [0, 1] with B prompts: shape (B,), -1 to 1."""
        embeddings = self.images(images)
        cosine: Tensor = (embeddings * self.prompts(prompts).to(embeddings)).sum(-1)
        return cosine

    def features(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of unit length, of pictures (B, 3, H, W) in [0, 1], with gradient."""
        embeddings: Tensor = self.images(images)
        return embeddings


def load_clip(model: str, revision: str | None, processor: str | None = None) -> Clip:
    """Load a CLIP with its tokenizer and preprocessing, in float32, frozen and in evaluation mode.

    Args:
        model: Folder or hub id of a CLIPModel of transformers.
        revision: Commit, tag or branch on the hub; None for the pinned one.
        processor: Folder or hub id of tokenizer and image processor; None if they are in `model`.

    Raises:
        ValueError: There is no such checkpoint, or it is of another kind.
    """
    from transformers import CLIPModel

    setting = "model" if processor is None else "processor"
    source, source_revision = (model, revision) if processor is None else (processor, None)
    preprocess = load_preprocessing(source, source_revision, setting)
    tokenizer = load_tokenizer(source, source_revision, setting)
    clip = load_model(CLIPModel, model, revision, KIND)
    check_vocabulary(tokenizer, clip.config.text_config.vocab_size, source, setting)
    return Clip(clip, tokenizer, preprocess)


def load_preprocessing(processor: str, revision: str | None, setting: str) -> Preprocessing:
    """Load the preprocessing of a folder or hub id, which the argument `setting` names."""
    from transformers import AutoImageProcessor

    kind = "CLIP image processor"
    found = load_part(AutoImageProcessor, processor, revision, kind, setting, backend="pil")
    return Preprocessing.of(found, processor)


def load_tokenizer(tokenizer: str, revision: str | None, setting: str) -> Any:
    """Load the tokenizer of a folder or hub id, which the argument `setting` names."""
    from transformers import AutoTokenizer

    return load_part(AutoTokenizer, tokenizer, revision, "CLIP tokenizer", setting)


def _at_least_single(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
