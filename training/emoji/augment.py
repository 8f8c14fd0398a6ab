"""Augmentations and degradations of picture batches (B, 3, 64, 64) in [0, 1], drawn from a generator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Numbers of shape (count, 1, 1, 1)."""
    return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)


def moved(
    images: Tensor, generator: torch.Generator, degrees: float, scale: float, shift: float, flip: bool = True
) -> Tensor:
    """Rotate, scale and shift every picture, with white around.

    Args:
        images: Pictures.
        generator: Source of randomness.
        degrees: Largest angle.
        scale: Largest relative change of size.
        shift: Largest shift, relative to half the picture.
        flip: Mirror half of them.
    """
    count = len(images)
    angle = uniform(count, -degrees, degrees, generator).flatten() * math.pi / 180
    size = 1 + uniform(count, -scale, scale, generator).flatten()
    side = (torch.rand(count, generator=generator) < (0.5 if flip else 1.0)).float() * 2 - 1
    offset = shift * (2 * torch.rand(count, 2, generator=generator) - 1)
    cosine, sine = angle.cos() * size, angle.sin() * size
    rows = [torch.stack((cosine * side, -sine, offset[:, 0]), 1), torch.stack((sine * side, cosine, offset[:, 1]), 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return 1 - F.grid_sample(1 - images, grid, align_corners=False)


def blurred(images: Tensor, deviation: float) -> Tensor:
    """Gaussian blur, its deviation in pixels."""
    radius = max(1, math.ceil(2.5 * deviation))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / deviation) ** 2)
    kernel = (kernel / kernel.sum()).to(images).expand(3, 1, 1, -1)
    images = F.conv2d(F.pad(images, (radius, radius, 0, 0), mode="replicate"), kernel, groups=3)
    kernel = kernel.transpose(2, 3)
    return F.conv2d(F.pad(images, (0, 0, radius, radius), mode="replicate"), kernel, groups=3)


def noisy(images: Tensor, deviation: Tensor | float, generator: torch.Generator) -> Tensor:
    """Add normal noise."""
    return (images + deviation * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def saturated(images: Tensor, factor: Tensor | float) -> Tensor:
    """Push colours away from grey by a factor."""
    grey = images.mean(1, keepdim=True)
    return (grey + factor * (images - grey)).clamp(0, 1)


def contrasted(images: Tensor, factor: Tensor | float) -> Tensor:
    """Push brightness away from the middle by a factor."""
    return (0.5 + factor * (images - 0.5)).clamp(0, 1)


def tinted(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Multiply the channels by random factors and add random offsets."""
    factor = 1 + strength * (2 * torch.rand(len(images), 3, 1, 1, generator=generator) - 1)
    offset = strength * (torch.rand(len(images), 3, 1, 1, generator=generator) - 0.5)
    return (images * factor + offset).clamp(0, 1)


def shuffled_patches(images: Tensor, patches: int, generator: torch.Generator) -> Tensor:
    """Cut every picture into patches x patches tiles and permute them."""
    count, channels, height, width = images.shape
    tiles = images.reshape(count, channels, patches, height // patches, patches, width // patches)
    tiles = tiles.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
    tiles = tiles[torch.randperm(patches * patches, generator=generator)].unflatten(0, (patches, patches))
    return tiles.permute(2, 3, 0, 4, 1, 5).reshape(images.shape)


def blended(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mix every picture with another of the batch, half and half."""
    return 0.5 * images + 0.5 * images[torch.randperm(len(images), generator=generator)]


def disturbed_latents(latents: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Latents of soft, smeared, ghostly or blotchy pictures, as those of a collapsed model are.

    Args:
        latents: Shape (B, 4, H, W), of unit deviation.
        strength: From 0 to 1.
        generator: Source of randomness; it chooses one of the four for the whole batch.
    """
    kind = int(torch.randint(4, (), generator=generator))
    if kind == 0:
        soft = blurred(latents[:, :3], 0.6 + 1.6 * strength), blurred(latents[:, 1:], 0.6 + 1.6 * strength)
        return torch.lerp(latents, torch.cat((soft[0], soft[1][:, 2:]), 1), 0.5 + 0.5 * strength)
    if kind == 1:
        other = latents[torch.randperm(len(latents), generator=generator)]
        return torch.lerp(latents, other, 0.2 + 0.3 * strength)
    coarse = torch.randn(len(latents), latents.shape[1], 4, 4, generator=generator)
    blotches = F.interpolate(coarse, latents.shape[-2:], mode="bicubic", align_corners=False)
    if kind == 2:
        return latents + (0.3 + 1.2 * strength) * blotches
    return latents * (1.2 + 0.8 * strength) + 0.6 * strength * blotches[:, :, :1, :1]


@torch.no_grad()
def smeared(vae: AutoencoderKL, images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Encode, disturb and decode pictures."""
    latents = vae.encode(2 * images - 1).latent_dist.mean
    return ((vae.decode(disturbed_latents(latents, strength, generator)).sample + 1) / 2).clamp(0, 1)
