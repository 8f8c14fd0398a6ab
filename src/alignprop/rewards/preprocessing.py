"""What image processors of transformers do to a picture, with gradient to its pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from alignprop.pixels import clamp_straight_through, normalise, resize, to_pil

Interpolation = Literal["bilinear", "bicubic"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue, in all models of OpenAI and OpenCLIP's ViT-H/14."""

_INTERPOLATIONS: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}
"""By the number that Pillow and the files of image processors have for them."""

_CHECKED_SIZES = ((150, 210), (61, 97), (320, 320))  # none is tall: versions of Pillow differ there
_CHECKED_LEVELS = 3
"""By how many of 255 grey levels our pixels may miss the image processor's, which rounds once or twice."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop in the centre, normalise: from pictures in [0, 1] to what a model takes.

    Attributes:
        size: As image processors write it: `height` and `width`, or `shortest_edge` with or without
            `longest_edge`; None keeps the size.
        interpolation: Of the resizing.
        crop: Height and width of the crop, padded with black where the picture is smaller; None for no crop.
        mean: Subtracted, one number a channel; None for no normalisation.
        std: Divided by, one number a channel.
        processor: The image processor that was read, if any.
    """

    size: Mapping[str, int] | None
    interpolation: Interpolation
    crop: tuple[int, int] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    processor: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, processor: Any, model: str) -> Preprocessing:
        """Read the settings of an image processor and prove that they were understood.

        Args:
            processor: An image processor of transformers.
            model: Where it is from, for the message.

        Raises:
            ValueError: The image processor does something else as well: on test pictures, ours differ.
        """
        steps = cls._read(processor)
        if steps is None or not all(steps._agrees(processor, height, width) for height, width in _CHECKED_SIZES):
            raise ValueError(
                f"model={model!r} prepares pictures with {type(processor).__name__}, which does more than resize, "
                "crop and normalise; choose a model that does not, or write the reward as a function."
            )
        return replace(steps, processor=processor)

    @classmethod
    def _read(cls, processor: Any) -> Preprocessing | None:
        settings = processor.to_dict()
        interpolation = _INTERPOLATIONS.get(int(settings.get("resample") or 0))
        if settings.get("do_resize") and interpolation is None:
            return None
        size = {name: int(edge) for name, edge in dict(settings.get("size") or {}).items() if edge}
        crop = settings.get("crop_size") if settings.get("do_center_crop") else None
        if "crop_pct" in settings:  # ConvNeXT and ResNet: below 384 px a little of the border is cut off
            size, crop = _crop_fraction(size["shortest_edge"], settings["crop_pct"])
        normalised = settings.get("do_normalize")
        return cls(
            size if settings.get("do_resize") else None,
            interpolation or "bilinear",
            (crop["height"], crop["width"]) if crop else None,
            tuple(settings["image_mean"]) if normalised else None,
            tuple(settings["image_std"]) if normalised else None,
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare pictures (B, 3, H, W) in [0, 1]; gradient passes."""
        if self.size is not None:
            images = resize_rounded(images, output_size(images.shape[-2:], self.size), self.interpolation)
        if self.crop is not None:
            images = centre_crop(images, self.crop)
        if self.mean is not None and self.std is not None:
            images = normalise(images, self.mean, self.std)
        return images

    def _agrees(self, processor: Any, height: int, width: int) -> bool:
        pictures = _test_picture(height, width)
        expected, ours = processed(processor, pictures), self(pictures)
        tolerance = _CHECKED_LEVELS / 255 / min(self.std or (1.0,))
        return (
            isinstance(expected, Tensor)
            and expected.shape == ours.shape
            and bool((expected - ours).abs().max() <= tolerance)
        )


def processed(processor: Any, pictures: Tensor) -> Any:
    """What an image processor of transformers makes of pictures (B, 3, H, W) in [0, 1], rounded to 8 bits."""
    return processor(to_pil(pictures), return_tensors="pt").get("pixel_values")


def compared(preprocess: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a model is given, and what its own image processor gives it.

    Args:
        preprocess: Prepares pictures with gradient, and has the image processor as its attribute `processor`.
        images: Shape (B, 3, H, W) in [0, 1].
    """
    return preprocess(images), processed(preprocess.processor, images).to(images)


def output_size(shape: Sequence[int], size: Mapping[str, int]) -> tuple[int, int]:
    """Height and width after resizing a picture of `shape`, by the rules of image processors."""
    from transformers.image_transforms import get_size_with_aspect_ratio

    if "height" in size:
        return size["height"], size["width"]
    height, width = get_size_with_aspect_ratio(tuple(shape), size["shortest_edge"], size.get("longest_edge"))
    return height, width


def resize_rounded(images: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """Resize as Pillow does with 8-bit pictures, which never leave [0, 1]; only the rounding is left out.

    Pillow resizes rows and columns one after the other and clips after each: bicubic overshoots at edges. The
    gradient passes the clip unchanged, or a white area, which rounding errors lift above 1 here and there, would
    be half dead.

    Args:
        images: Shape (B, C, H, W), in [0, 1].
        size: New height and width.
        interpolation: Bilinear or bicubic, widened when shrinking.
    """
    (height, width), (old_height, old_width) = size, images.shape[-2:]
    # The order, which only the clipping can show: rows first, but since Pillow 13 not in tall pictures.
    columns_first = old_height - height > 2 * max(old_width - width, 0)
    for step in ((height, old_width) if columns_first else (old_height, width), size):
        if images.shape[-2:] != step:
            images = clamp_straight_through(resize(images, step, interpolation))
    return images


def centre_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut out the centre (height, width) of pictures (B, C, H, W); black where they are smaller."""
    (height, width), (full_height, full_width) = size, images.shape[-2:]
    top, left = (full_height - height) // 2, (full_width - width) // 2
    return F.pad(images, (-left, width - full_width + left, -top, height - full_height + top))


def _crop_fraction(edge: int, fraction: float) -> tuple[dict[str, int], dict[str, int] | None]:
    square = {"height": edge, "width": edge}
    return ({"shortest_edge": int(edge / fraction)}, square) if edge < 384 else (square, None)


def _test_picture(height: int, width: int) -> Tensor:
    """Slopes, waves of several lengths and a hard edge, in 8-bit levels, of shape (1, 3, height, width)."""
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    planes = [(1 + torch.sin(2 * torch.pi * (cycles * x * y + cycles * y))) / 3 + x / 3 for cycles in (2, 5, 11)]
    picture = torch.stack(planes)
    picture[:, height // 3 : height // 2, width // 4 : width // 2] = 1.0
    return (picture * 255).round()[None] / 255
