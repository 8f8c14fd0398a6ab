"""Reward of objects in the picture: contains X, contains no X, contains n X, by open-vocabulary detectors.

A detector gives box `i` a logit `l_i` that it shows X. Boxes overlap: of those that show the same object only the
best is kept (non-maximum suppression). Each box that is kept is an object with probability

    p_i = sigmoid(z_i),  z_i = SHARPNESS * (l_i - logit(threshold)),

so that a box at the score from which on the detector is used to draw it counts one half, and one with a tenth of
those odds 1e-4: the many boxes of background, which a detector scores low but not zero, do not add up to an object.
Objects are independent of each other, hence their number N has the Poisson binomial distribution, and the rewards
are its exact logarithms:

    none        log P(N = 0)  = sum_i log(1 - p_i)
    some        log P(N >= 1) = log sum_i p_i prod_{j<i} (1 - p_j)
    exactly n   log P(N = n)  = log(sum over sets S of n boxes of prod_{i in S} e^{z_i}) + sum_i log(1 - p_i)

All are finite with a gradient however small the probability is, where a detector's own decision has none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignprop.pixels import normalise
from alignprop.rewards.checkpoints import check_vocabulary, load_model, load_part
from alignprop.rewards.preprocessing import Preprocessing, compared

MODEL = "google/owlv2-base-patch16-ensemble"
KIND = "open-vocabulary detector (OWL-ViT, OWLv2 or Grounding DINO of transformers)"

SHARPNESS = 4.0
MAX_BOXES = 100
"""Boxes that are looked at: those with the highest scores."""
OVERLAP = 0.5
"""Intersection over union from which on two boxes show the same object."""
SUPPRESSION = 20.0
"""Taken off `z` of a box that is not kept: odds of 1 to 5e8, but not none, or a count could be out of reach."""


class Boxes(NamedTuple):
    """What a detector found.

    Attributes:
        logits: That a box shows what was asked for, shape (B, N).
        corners: Left, top, right and bottom, in any unit, shape (B, N, 4).
    """

    logits: Tensor
    corners: Tensor


class Objects(nn.Module):
    """Log-probability, at most 0, that the picture contains X, no X or a number of X."""

    def __init__(
        self,
        model: str = MODEL,
        contains: str = "{prompt}",
        count: int | None = None,
        absent: bool = False,
        threshold: float | None = None,
        revision: str | None = None,
    ) -> None:
        """Load a detector.

        Args:
            model: Folder or hub id of an OWLv2, OWL-ViT or Grounding DINO of transformers.
            contains: What to look for, such as "a cat"; `{prompt}` stands for the picture's prompt. It is cut to
                what the detector reads, 16 tokens of the OWLs.
            count: How many, exactly; None for at least one.
            absent: Reward pictures without it, as `count=0`.
            threshold: Score from which on a box counts more than half; None for the detector's own default in
                transformers, 0.1 of the OWLs and 0.25 of Grounding DINO.
            revision: Commit, tag or branch on the hub; None for a pinned commit of the default model.

        Raises:
            ValueError: The arguments make no sense, or there is no such detector.
        """
        super().__init__()
        if absent and count:
            raise ValueError(f"count={count} and absent=True exclude each other; leave one of them out.")
        if count is not None and not 0 <= count <= MAX_BOXES:
            raise ValueError(f"count={count} needs 0 <= count <= {MAX_BOXES}.")
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold} needs 0 < threshold < 1.")
        if not contains.strip():
            raise ValueError(f"contains={contains!r} names nothing to look for; give a thing, such as 'a cat'.")
        self.detector = load_detector(model, revision)
        self.contains = contains
        self.count = 0 if absent else count
        self.threshold = threshold or self.detector.threshold

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image."""
        texts = [self.contains.replace("{prompt}", prompt) for prompt in prompts]
        boxes = best_boxes(self.detector(images, texts), MAX_BOXES)
        z = SHARPNESS * (boxes.logits - math.log(self.threshold / (1 - self.threshold)))
        z = z - SUPPRESSION * ~distinct(boxes, OVERLAP)
        return log_some(z) if self.count is None else log_exactly(z, self.count)

    def reference_pixels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the model is given, and what its own image processor gives it."""
        return compared(self.detector.preprocess, images)


def best_boxes(boxes: Boxes, number: int) -> Boxes:
    """The boxes with the highest logits, best first."""
    logits, places = boxes.logits.topk(min(number, boxes.logits.shape[1]))
    return Boxes(logits, boxes.corners.gather(1, places[..., None].expand(-1, -1, 4)))


@torch.no_grad()  # which boxes show the same object is decided, not learned: the gradient is that of the scores
def distinct(boxes: Boxes, overlap: float) -> Tensor:
    """Which boxes are left when those that overlap a better one that is left are taken out, shape (B, N), bool.

    Args:
        boxes: Best first.
        overlap: Intersection over union, above which a box is taken out.
    """
    same = intersection_over_union(boxes.corners) > overlap
    kept = torch.ones_like(boxes.logits, dtype=torch.bool)
    for i in range(kept.shape[1]):
        kept[:, i + 1 :] &= ~(same[:, i, i + 1 :] & kept[:, i, None])
    return kept


def intersection_over_union(corners: Tensor) -> Tensor:
    """Of each box (B, N, 4) with each, shape (B, N, N)."""
    low, high = corners[..., :2], corners[..., 2:]
    area = (high - low).prod(-1)
    sides = torch.minimum(high[:, :, None], high[:, None]) - torch.maximum(low[:, :, None], low[:, None])
    both = sides.clamp(min=0).prod(-1)
    return both / (area[:, :, None] + area[:, None] - both)


def log_some(z: Tensor) -> Tensor:
    """Log-probability that one or more of independent events happen, given their log-odds (B, N): shape (B,)."""
    none_before = F.logsigmoid(-z).cumsum(1) - F.logsigmoid(-z)
    return (F.logsigmoid(z) + none_before).logsumexp(1)


def log_exactly(z: Tensor, count: int) -> Tensor:
    """Log-probability that `count` of independent events happen, given their log-odds (B, N): shape (B,)."""
    never = torch.full_like(z[:, :1], -1e30)  # finite: the gradient of a difference of infinities is not a number
    sums = torch.cat([torch.zeros_like(never), never.expand(-1, count)], 1)  # of products of 0, 1, ... odds
    for log_odds in z.unbind(1):
        sums = torch.cat([sums[:, :1], torch.logaddexp(sums[:, 1:], sums[:, :-1] + log_odds[:, None])], 1)
    return sums[:, count] + F.logsigmoid(-z).sum(1)


class Owl(nn.Module):
    """OWL-ViT (Minderer et al. 2022, arXiv 2205.06230) or OWLv2 (2023, arXiv 2306.09683): a box for each patch."""

    threshold = 0.1

    def __init__(self, model: Any, tokenizer: Any, preprocess: Callable[[Tensor], Tensor]) -> None:
        """Join an OwlViTForObjectDetection or Owlv2ForObjectDetection, its tokenizer and its preprocessing."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self._queries: dict[str, Tensor] = {}

    def forward(self, images: Tensor, texts: Sequence[str]) -> Boxes:
        """Look in each of B pictures for its text."""
        feature_map, _ = self.model.image_embedder(self.preprocess(images))
        features = feature_map.flatten(1, 2)
        queries = torch.stack([self._query(text) for text in texts]).to(features)
        logits, _ = self.model.class_predictor(features, queries[:, None])
        return Boxes(logits[..., 0], corners_of(self.model.box_predictor(features, feature_map)))

    def _query(self, text: str) -> Tensor:
        if text not in self._queries:  # the text encoder is frozen: once for each text
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                [text], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).to(self.model.device)
            encoder = getattr(self.model, self.model.base_model_prefix)
            pooled = encoder.text_model(**tokens).pooler_output
            # The length does not matter, as the model compares directions.
            self._queries[text] = encoder.text_projection(pooled)[0]
        return self._queries[text]


class GroundingDino(nn.Module):
    """Grounding DINO (Liu et al. 2023, arXiv 2303.05499): boxes that are refined while they look at the text.

    A box's logit is the highest of those of the text's tokens, as where transformers draws boxes. The model cuts the
    gradient of its boxes between refinements, as in its training; the scores carry theirs to the pixels.
    """

    threshold = 0.25

    def __init__(self, model: Any, tokenizer: Any, preprocess: Callable[[Tensor], Tensor]) -> None:
        """Join a GroundingDinoForObjectDetection, its tokenizer and its preprocessing."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.preprocess = preprocess

    def forward(self, images: Tensor, texts: Sequence[str]) -> Boxes:
        """Look in each of B pictures for its text, which is put as the model was trained: lower case, full stop."""
        sentences = [text.strip().lower().rstrip(".") + "." for text in texts]
        length = self.model.config.max_text_len
        tokens = self.tokenizer(sentences, padding=True, truncation=True, max_length=length, return_tensors="pt")
        output = self.model(pixel_values=self.preprocess(images), **tokens.to(images.device))
        return Boxes(output.logits.amax(-1), corners_of(output.pred_boxes))


def corners_of(boxes: Tensor) -> Tensor:
    """From centre, width and height to left, top, right and bottom, shape (..., 4)."""
    centre, sides = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - sides / 2, centre + sides / 2], -1)


class SquarePreprocessing:
    """What OWLv2 takes: black below or to the right up to a square, then resized as scikit-image does.

    `skimage.transform.resize` blurs with a Gaussian of deviation (factor - 1) / 2 before it interpolates linearly,
    and mirrors the picture at its border. Both are linear in the pixels and the same for rows and columns.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float], processor: Any = None) -> None:
        """Choose the result.

        Args:
            size: Height and width.
            mean: Subtracted, one number a channel.
            std: Divided by, one number a channel.
            processor: The image processor of transformers that does the same without gradient.
        """
        self.size, self.mean, self.std, self.processor = size, mean, std, processor

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare pictures (B, 3, H, W) in [0, 1]; gradient passes."""
        height, width = images.shape[-2:]
        side = max(height, width)
        matrix = mirrored_resize_matrix(side, self.size).to(images)
        # The padding is black, so its columns of the matrix need not be multiplied.
        return normalise(matrix[:, :height] @ images @ matrix[:, :width].T, self.mean, self.std)


@functools.lru_cache(maxsize=8)
def mirrored_resize_matrix(old: int, new: int) -> Tensor:
    """Blur and linear interpolation of `skimage.transform.resize` in one dimension, shape (new, old), float64."""
    return _interpolation_matrix(old, new) @ _blur_matrix(old, max(0.0, (old / new - 1) / 2))


def _interpolation_matrix(old: int, new: int) -> Tensor:
    places = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5
    below = places.floor()
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for offset, weight in ((0, below + 1 - places), (1, places - below)):
        matrix.scatter_add_(1, _mirror(below.long() + offset, old)[:, None], weight[:, None])
    return matrix


def _blur_matrix(length: int, deviation: float) -> Tensor:
    reach = int(4 * deviation + 0.5)  # where scipy.ndimage cuts the Gaussian off
    if reach == 0:
        return torch.eye(length, dtype=torch.float64)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.softmax(-(offsets.double() ** 2) / (2 * deviation**2), 0)
    columns = _mirror(torch.arange(length)[:, None] + offsets, length)
    return torch.zeros(length, length, dtype=torch.float64).scatter_add_(1, columns, weights.expand(length, -1))


def _mirror(places: Tensor, length: int) -> Tensor:
    """Reflect places outside 0 to length - 1 about the centres of the first and the last pixel."""
    period = max(1, 2 * (length - 1))
    places = places.remainder(period)
    return torch.minimum(places, period - places)


def load_detector(model: str, revision: str | None) -> Owl | GroundingDino:
    """Load a detector, its tokenizer and its preprocessing, frozen, in float32.

    Raises:
        ValueError: There is no such detector.
    """
    import transformers

    config = load_part(transformers.AutoConfig, model, revision, KIND)
    found = _FAMILIES.get(config.model_type)
    if found is None:
        raise ValueError(f"model={model!r} is of the type {config.model_type!r}, no {KIND}; give one of these.")
    family, name = found
    tokenizer = load_part(transformers.AutoTokenizer, model, revision, KIND)
    check_vocabulary(tokenizer, config.text_config.vocab_size, model)
    processor = load_part(transformers.AutoImageProcessor, model, revision, KIND, backend="pil")
    loaded = load_model(getattr(transformers, name), model, revision, KIND)
    return family(loaded, tokenizer, _preprocessing(config.model_type, processor, model))


_FAMILIES: dict[str, tuple[type[Owl | GroundingDino], str]] = {
    "owlv2": (Owl, "Owlv2ForObjectDetection"),
    "owlvit": (Owl, "OwlViTForObjectDetection"),
    "grounding-dino": (GroundingDino, "GroundingDinoForObjectDetection"),
}
"""By the type in the configuration: ours, and the class of transformers."""


def _preprocessing(model_type: str, processor: Any, model: str) -> Callable[[Tensor], Tensor]:
    if model_type != "owlv2":
        return Preprocessing.of(processor, model)
    return SquarePreprocessing(processor.size["height"], processor.image_mean, processor.image_std, processor)
