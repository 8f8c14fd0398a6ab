"""Pictures for the rewards of real photographs."""

from pathlib import Path

import pytest
import torch
from PIL import Image

SHAPES = [(512, 600), (96, 96), (200, 313), (313, 200), (61, 97)]
"""Heights and widths: larger and smaller than models take, wide and tall."""


def photograph(height, width) -> Image.Image:
    """A public domain portrait that matplotlib ships: a detail of it, or all of it where it must be enlarged."""
    matplotlib = pytest.importorskip("matplotlib")
    picture = Image.open(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")).convert("RGB")
    if height > picture.height or width > picture.width:
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (picture.width - width) // 2, (picture.height - height) // 3
    return picture.crop((left, top, left + width, top + height))


def waves(height, width, batch=2, dtype=torch.float32) -> torch.Tensor:
    """Low-contrast waves, which bicubic interpolation does not carry beyond black or white."""
    y, x = torch.linspace(0, 1, height, dtype=dtype)[:, None], torch.linspace(0, 1, width, dtype=dtype)
    planes = [[torch.sin((3 + b + c) * x * (1 + b) + (2 * c + 1) * y) for c in range(3)] for b in range(batch)]
    return 0.5 + 0.3 * torch.stack([torch.stack(plane) for plane in planes])


def directional_derivatives(reward, prompts, height=40, width=52, step=1e-5):
    """Derivatives of the sum of scores along a random direction: by autograd, and by central differences."""
    images = waves(height, width, len(prompts), torch.float64).requires_grad_()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = reward(images, prompts)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step * direction, prompts).double().sum() for sign in (1, -1))
    return (gradient * direction).sum().item(), ((ahead - behind) / (2 * step)).item()


def randomise(model, seed=0):
    """Give a model weights that make every part matter; its own initialisation leaves it almost linear."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.data = noise / (weight[0].numel() ** 0.5)
        else:
            weight.data = 0.2 * noise + (1.0 if "norm" in name.lower() and "weight" in name else 0.0)
    return model.eval()
