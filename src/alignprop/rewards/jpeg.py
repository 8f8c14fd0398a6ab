"""Rewards of JPEG file size: a differentiable estimate for baseline JPEG with 4:2:0 chroma.

The transform follows libjpeg (ITU-T T.81): YCbCr, chroma halved, 8x8 DCT, standard quantisation tables scaled
by quality. Rounding and Huffman coding, which have no gradient, are replaced by smooth functions of
`m = (2q)^4`, where a coefficient `q`, in units of its quantisation step, rounds to zero where `m` is below 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA_TABLE = (
    16, 11, 10, 16, 24, 40, 51, 61,
    12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77,
    24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
"""Quantisation steps of luma at quality 50 (T.81, table K.1)."""

CHROMA_TABLE = (
    17, 18, 24, 47, 99, 99, 99, 99,
    18, 21, 26, 66, 99, 99, 99, 99,
    24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99,
    *[99] * 32,
)  # fmt: skip
"""Quantisation steps of chroma at quality 50 (T.81, table K.2)."""

ZIGZAG = sorted(range(64), key=lambda i: (i // 8 + i % 8, i // 8 if (i // 8 + i % 8) % 2 else i % 8))
"""Places of a block, row by row, in the order in which they are coded."""

HEADER_BYTES = 625
"""What is not coded pixels in a colour file: markers, two quantisation tables, four Huffman tables."""

# Bits in Huffman coding with the standard tables, fitted by least squares of the relative error to Pillow's
# files (emoji drawings, crops of a photograph, blurred noise; 64 to 256 px; quality 20 to 95).
BITS_NONZERO = 1.18  # a coefficient that is not zero
BITS_SIZE = 1.76  # each binary digit of it
BITS_ZERO = 0.87  # a zero that has a nonzero coefficient behind it in its block
BITS_BLOCK = 5.16  # a block: its end and the prefix of its mean
BITS_MEAN = 1.45  # each binary digit of the change of the mean from block to block


class JpegSize:
    """Reward of file size: `sign` times the estimated kilobytes (1000 bytes)."""

    def __init__(self, sign: int, quality: int = 95) -> None:
        """Reward large files (`sign=1`) or small ones (`sign=-1`).

        Args:
            sign: 1 or -1.
            quality: As in libjpeg and Pillow, 1 to 100; 95 as in DDPO (arXiv 2305.13301).

        Raises:
            ValueError: There is no such quality.
        """
        self.sign = sign
        self.tables = quantisation_tables(quality)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image."""
        return self.sign * kilobytes(images, self.tables)


def compressibility(quality: int = 95) -> JpegSize:
    """Build the reward that prefers small files."""
    return JpegSize(-1, quality)


def incompressibility(quality: int = 95) -> JpegSize:
    """Build the reward that prefers large files."""
    return JpegSize(1, quality)


def check_quality(quality: int) -> int:
    """Return it.

    Raises:
        ValueError: `quality` is outside 1 to 100.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality={quality} needs 1 <= quality <= 100.")
    return quality


def quantisation_tables(quality: int) -> Tensor:
    """Return libjpeg's quantisation steps of luma and chroma, shape (2, 8, 8).

    Raises:
        ValueError: `quality` is outside 1 to 100.
    """
    quality = check_quality(quality)
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = torch.tensor([LUMA_TABLE, CHROMA_TABLE]).view(2, 8, 8)
    return ((base * percent + 50) // 100).clamp(1, 255)


def kilobytes(images: Tensor, tables: Tensor) -> Tensor:
    """Estimate the size of each image's JPEG file in kilobytes (1000 bytes), shape (B,).

    Args:
        images: Shape (B, 3, H, W), in [0, 1].
        tables: Quantisation steps of luma and chroma.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    luma_steps, chroma_steps = tables.to(images).unbind()
    # 4:2:0 codes units of 16x16 pixels; libjpeg fills the last ones by repeating the edge.
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
    luma, *chroma = ycbcr(255 * padded).unbind(1)
    bits = block_bits(dct(blocks(luma - 128, 2)) / luma_steps)
    for plane in chroma:
        half = F.avg_pool2d(plane.unsqueeze(1), 2).squeeze(1)
        bits = bits + block_bits(dct(blocks(half - 128, 1)) / chroma_steps)
    return (HEADER_BYTES + bits / 8) / 1000


def ycbcr(rgb: Tensor) -> Tensor:
    """Convert RGB to JFIF's YCbCr, both in [0, 255], shape (B, 3, H, W)."""
    red, green, blue = rgb.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([luma, (blue - luma) / 1.772 + 128, (red - luma) / 1.402 + 128], 1)


def blocks(plane: Tensor, unit: int) -> Tensor:
    """Cut a plane (B, H, W) into 8x8 blocks (B, N, 8, 8) as they are coded: units of `unit`² blocks."""
    tiles: Tensor = plane.unflatten(2, (-1, unit, 8)).unflatten(1, (-1, unit, 8))  # B, row, y, 8, column, x, 8
    return tiles.permute(0, 1, 4, 2, 5, 3, 6).flatten(1, 4)


def dct(block: Tensor) -> Tensor:
    """Return the orthonormal 8x8 cosine transform of the last two dimensions (T.81, A.3.3)."""
    k = torch.arange(8, dtype=block.dtype, device=block.device)
    basis = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) / 2
    basis = torch.cat([basis[:1] / math.sqrt(2), basis[1:]])
    return basis @ block @ basis.T


def block_bits(quantised: Tensor) -> Tensor:
    """Estimate the bits of Huffman coding.

    Args:
        quantised: Coefficients in units of their quantisation step, not rounded, shape (B, N, 8, 8).

    Returns:
        Shape (B,).
    """
    mean, rest = quantised.flatten(2)[..., ZIGZAG].split([1, 63], dim=-1)
    change = (2 * mean.diff(dim=1, prepend=torch.zeros_like(mean[:, :1]))) ** 4
    m = (2 * rest) ** 4
    zero = torch.exp2(-m)  # near 1 if rounded to zero, 1/2 at the rounding threshold
    behind = m.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    before_nonzero = zero[..., :-1] * (1 - torch.exp2(-behind))
    return (
        BITS_NONZERO * (1 - zero).sum((1, 2))
        + BITS_SIZE * _digits(m).sum((1, 2))
        + BITS_ZERO * before_nonzero.sum((1, 2))
        + BITS_MEAN * _digits(change).sum((1, 2))
        + BITS_BLOCK * quantised.shape[1]
    )


def _digits(m: Tensor) -> Tensor:
    """Count binary digits of q smoothly, given m = (2q)^4: 0 for 0, about log2(2|q|) from 1 on."""
    return torch.log1p(m) / (4 * math.log(2))
