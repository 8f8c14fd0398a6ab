"""Reward of human preference: ImageReward (Xu et al. 2023, arXiv 2304.05977), on the BLIP of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from alignprop.rewards.checkpoints import check_layout, check_vocabulary, load_part, load_tensors
from alignprop.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing

if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipVisionConfig

MODEL = "zai-org/ImageReward"
FILENAME = "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
KIND = "ImageReward checkpoint"

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw scores on the authors' validation prompts; the published scores are standardised with them."""
MAX_TOKENS = 35
ADDED_TOKENS = 2
"""By BLIP to those of BERT, for tasks that ImageReward does not have."""
HEAD_WIDTHS = (1024, 128, 64, 16, 1)
HEAD_PLACES = (0, 2, 4, 6, 7)
"""Of the linear layers in the published head; dropout stands between them and, as published, no nonlinearity."""
HEAD_DIM = 64
"""Width of an attention head in both transformers."""

RENAMED = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)
"""From the published names to ours. The text encoder has the same in BLIP and in transformers."""

UNUSED = ("blip.text_encoder.embeddings.position_ids", "blip.vision_proj.", "blip.text_proj.")
"""Published or not, no part of the score: the numbers 0, 1, 2, ..., and two projections of BLIP's training."""


class ImageReward(nn.Module):
    """Published score of picture and prompt: 0 on average, 1 a standard deviation, no bounds."""

    def __init__(
        self,
        model: str = MODEL,
        tokenizer: str = TOKENIZER,
        revision: str | None = None,
    ) -> None:
        """Load ImageReward-v1.0.

        Args:
            model: Hub id, folder with `ImageReward.pt`, or a file of the weights (.pt or .safetensors).
            tokenizer: Folder or hub id of the tokenizer of BERT base, uncased.
            revision: Of `model` on the hub; None for a pinned commit of the published one.

        Raises:
            ValueError: There is no such checkpoint, or it is of another kind.
        """
        from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel

        super().__init__()
        self.tokenizer = load_part(AutoTokenizer, tokenizer, None, "tokenizer of BERT", "tokenizer")
        tensors = load_tensors(model, FILENAME, revision, KIND)
        renamed = {rename(name): tensor.float() for name, tensor in tensors.items() if not name.startswith(UNUSED)}
        vision, text, features = sizes(renamed, model)
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = head(features)
        check_layout(renamed, {name: weight.shape for name, weight in self.state_dict().items()}, model, KIND)
        self.load_state_dict(renamed)
        self.eval().requires_grad_(False)
        check_vocabulary(self.tokenizer, text.vocab_size, tokenizer, "tokenizer", spare=ADDED_TOKENS)
        size = vision.image_size
        self.preprocess = Preprocessing({"shortest_edge": size}, "bicubic", (size, size), CLIP_MEAN, CLIP_STD)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image; prompts are cut after 35 tokens, as published."""
        patches = self.vision(pixel_values=self.preprocess(images)).last_hidden_state
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(images.device)
        read = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=patches,
            is_decoder=False,
        ).last_hidden_state
        raw: Tensor = self.head(read[:, 0]).squeeze(-1)
        return (raw - MEAN) / STD


def rename(name: str) -> str:
    """Our name of a published weight; one that is not published keeps its own."""
    for pattern, ours in RENAMED:
        renamed, found = re.subn(pattern, ours, name)
        if found:
            return renamed
    return name


def sizes(tensors: Mapping[str, Tensor], model: str) -> tuple[BlipVisionConfig, BlipTextConfig, int]:
    """Sizes of the two transformers, read from the shapes of the weights, and the head's number of inputs.

    Raises:
        ValueError: A weight lacks from which a size is read.
    """
    try:
        return vision_config(tensors), text_config(tensors), tensors["head.0.weight"].shape[1]
    except KeyError as error:
        raise ValueError(f"model={model!r} is no {KIND}: it lacks {error}; give the published checkpoint.") from error


def head(features: int) -> nn.Sequential:
    """The score's linear layers, at their places in the published sequence."""
    layers: list[nn.Module] = [nn.Identity() for _ in range(HEAD_PLACES[-1] + 1)]
    for place, old, new in zip(HEAD_PLACES, (features, *HEAD_WIDTHS[:-1]), HEAD_WIDTHS, strict=True):
        layers[place] = nn.Linear(old, new)
    return nn.Sequential(*layers)


def vision_config(tensors: Mapping[str, Tensor]) -> BlipVisionConfig:
    """Sizes of the vision transformer (timm's: normalisation with 1e-6)."""
    from transformers import BlipVisionConfig

    width, _, patch, _ = tensors["vision.embeddings.patch_embedding.weight"].shape
    places = tensors["vision.embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["vision.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_count(tensors, "vision.encoder.layers"),
        num_attention_heads=width // HEAD_DIM,
        image_size=patch * round(places**0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def text_config(tensors: Mapping[str, Tensor]) -> BlipTextConfig:
    """Sizes of the text encoder, which looks at the picture in every layer."""
    from transformers import BlipTextConfig

    vocabulary, width = tensors["text.embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=tensors["text.encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(tensors["text.encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_count(tensors, "text.encoder.layer"),
        num_attention_heads=width // HEAD_DIM,
        max_position_embeddings=len(tensors["text.embeddings.position_embeddings.weight"]),
        is_decoder=True,  # which is what gives its layers the cross attention
    )


def _count(tensors: Mapping[str, Any], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix + ".").split(".")[0]) for name in tensors if name.startswith(prefix))
