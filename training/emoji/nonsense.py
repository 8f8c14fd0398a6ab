"""Pictures that show nothing, as a collapsed model draws them: textures, blobs, flat colours, scraps of drawings."""

from __future__ import annotations

from collections.abc import Callable

import augment
import torch
import torch.nn.functional as F
from data import SIZE
from torch import Tensor

Nonsense = Callable[[Tensor, torch.Generator], Tensor]


def coloured_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Noise whose amplitude falls with the frequency to a power of 0 (white) to 2.5 (clouds)."""
    count = len(images)
    frequency = torch.fft.fftfreq(SIZE).square()[:, None] + torch.fft.rfftfreq(SIZE).square()
    amplitude = (frequency + SIZE**-2) ** (-augment.uniform(count, 0.0, 1.25, generator))
    noise = torch.fft.irfft2(torch.fft.rfft2(torch.randn(count, 3, SIZE, SIZE, generator=generator)) * amplitude)
    noise = noise / noise.std((2, 3), keepdim=True)
    mixing = torch.eye(3) + 0.7 * torch.randn(count, 3, 3, generator=generator)
    noise = torch.einsum("bij,bjhw->bihw", mixing, noise)
    return (_colours(count, generator) + augment.uniform(count, 0.05, 0.5, generator) * noise).clamp(0, 1)


def blobs(images: Tensor, generator: torch.Generator) -> Tensor:
    """Soft or hard spots of random colours."""
    count, place = len(images), torch.linspace(-1, 1, SIZE)
    canvas = _colours(count, generator).expand(-1, -1, SIZE, SIZE)
    for _ in range(int(torch.randint(1, 9, (), generator=generator))):
        x, y = (augment.uniform(count, -0.8, 0.8, generator) for _ in range(2))
        width, height = (augment.uniform(count, 0.08, 0.8, generator) for _ in range(2))
        distance = ((place - x) / width).square() + ((place[:, None] - y) / height).square()
        cover = torch.sigmoid(augment.uniform(count, 1.0, 12.0, generator) * (1 - distance))
        canvas = torch.lerp(canvas, _colours(count, generator).expand_as(canvas), cover)
    return canvas


def flat_colours(images: Tensor, generator: torch.Generator) -> Tensor:
    """One colour, or a slope from one to another."""
    start, end = (_colours(len(images), generator) for _ in range(2))
    end = torch.where(augment.uniform(len(images), 0, 1, generator) < 0.5, start, end)
    place = torch.linspace(0, 1, SIZE).expand(SIZE, SIZE)
    return torch.lerp(start, end, place if torch.rand((), generator=generator) < 0.5 else place.T)


def repeated(images: Tensor, generator: torch.Generator) -> Tensor:
    """A piece of a drawing, tiled."""
    side = int(torch.tensor([8, 16, 32])[torch.randint(3, (), generator=generator)])
    top, left = torch.randint(12, 53 - side, (2,), generator=generator).tolist()
    return images[:, :, top : top + side, left : left + side].repeat(1, 1, SIZE // side, SIZE // side)


def scraps(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pieces of all the drawings, side by side."""
    side = int(torch.tensor([8, 16])[torch.randint(2, (), generator=generator)])
    pieces = F.unfold(images, side, stride=side).transpose(1, 2).flatten(0, 1)
    pieces = pieces[torch.randperm(len(pieces), generator=generator)].unflatten(0, (len(images), -1))
    return F.fold(pieces.transpose(1, 2), SIZE, side, stride=side)


def warped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Drawings bent beyond recognition, and turned on their side or over."""
    count = len(images)
    cells = int(torch.randint(4, 9, (), generator=generator))
    coarse = torch.randn(count, 2, cells, cells, generator=generator) * augment.uniform(count, 0.25, 0.6, generator)
    bend = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    still = F.affine_grid(torch.eye(2, 3).expand(count, -1, -1), list(images.shape), align_corners=False)
    bent = F.grid_sample(images, still + bend, padding_mode="reflection", align_corners=False)
    return bent.rot90(int(torch.randint(4, (), generator=generator)), (2, 3))


NONSENSE: dict[str, Nonsense] = {
    "coloured noise": coloured_noise,
    "blobs": blobs,
    "flat colours": flat_colours,
    "repeated": repeated,
    "scraps": scraps,
    "warped": warped,
}
"""Functions of drawings, of which some only take the number."""


def _colours(count: int, generator: torch.Generator) -> Tensor:
    """Colours (count, 3, 1, 1), half of them white or nearly so, as the ground of a drawing is."""
    colours = torch.rand(count, 3, 1, 1, generator=generator)
    whitish = 1 - 0.1 * torch.rand(count, 3, 1, 1, generator=generator)
    return torch.where(augment.uniform(count, 0, 1, generator) < 0.5, colours, whitish)
