"""What rewards outside of this process share: pictures go out as PNG files, scores come back as JSON."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import torch
from torch import Tensor

from alignprop.pixels import to_pil


def png_files(images: Tensor) -> list[bytes]:
    """Write pictures (B, 3, H, W) in [0, 1], rounded to 8 bits, as B PNG files."""
    files = []
    for picture in to_pil(images):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def read_scores(answer: str | bytes, images: Tensor, source: str) -> Tensor:
    """Read one score a picture.

    Args:
        answer: JSON: a list of B numbers, or an object that has it under `scores`.
        images: The B pictures, for the number of scores and their device.
        source: Who answered, for the message.

    Returns:
        Shape (B,), float32.

    Raises:
        ValueError: It is something else.
    """
    wanted = f"it must be a JSON list of {len(images)} finite numbers, one a picture"
    try:
        scores = json.loads(answer)
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{source} answered {_shown(answer)}; {wanted}.") from error
    scores = scores.get("scores") if isinstance(scores, dict) else scores
    if not isinstance(scores, list) or len(scores) != len(images) or not all(map(_is_score, scores)):
        raise ValueError(f"{source} answered {_shown(answer)}; {wanted}.")
    return torch.tensor(scores, dtype=torch.float32, device=images.device)


def check_timeout(timeout_s: float) -> float:
    """Return it.

    Raises:
        ValueError: It is not above 0.
    """
    if not timeout_s > 0:
        raise ValueError(f"timeout_s={timeout_s} needs 0 < timeout_s, in seconds.")
    return timeout_s


def _is_score(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(answer: str | bytes) -> str:
    text = answer.decode("utf-8", "replace") if isinstance(answer, bytes) else answer
    return repr(text if len(text) <= 60 else text[:57] + "...")
