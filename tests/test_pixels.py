"""Pixels: closed forms, Pillow as the oracle of resizing, and gradients."""

import numpy as np
import pytest
import torch
from PIL import Image

from alignprop.pixels import clamp_straight_through, from_pil, normalise, resize, to_pil, to_unit


@pytest.mark.parametrize(
    "value_range, expected", [((-1.0, 1.0), [-0.1, 0.0, 0.5, 1.0]), ((0.0, 1.0), [-1.2, -1.0, 0.0, 1.0])]
)
def test_to_unit_maps_black_to_zero_and_white_to_one(value_range, expected):
    decoded = torch.tensor([-1.2, -1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(to_unit(decoded, value_range), torch.tensor(expected, dtype=torch.float64))


def test_to_unit_agrees_with_diffusers():
    from diffusers.image_processor import VaeImageProcessor

    decoded = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(to_unit(decoded), VaeImageProcessor.denormalize(decoded))


def test_clamp_clamps_values_exactly_and_passes_every_gradient():
    images = torch.tensor([-3e8, -0.3, 0.1, 1.0, 1.7, 5e7], requires_grad=True)
    clamped = clamp_straight_through(images)
    assert clamped.tolist() == images.clamp(0, 1).tolist()
    gradient = torch.arange(6.0)
    clamped.backward(gradient)
    assert torch.equal(images.grad, gradient)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(20, 31), (90, 70), 32])
def test_resize_agrees_with_pillow(mode, size):
    picture = torch.rand(48, 64, generator=torch.Generator().manual_seed(0))
    height, width = (size, size) if isinstance(size, int) else size
    expected = Image.fromarray(picture.numpy()).resize((width, height), Image.Resampling[mode.upper()])
    resized = resize(picture[None, None], size, mode)[0, 0]
    np.testing.assert_allclose(resized.numpy(), np.asarray(expected), atol=1e-5)


def test_resize_without_antialias_skips_pixels():
    picture = torch.zeros(1, 1, 8, 8)
    picture[..., ::4, ::4] = 1.0  # bilinear samples pixels 1 and 2 of each four
    assert resize(picture, 2, antialias=False).sum() == 0
    assert resize(picture, 2).sum() > 0


def test_gradient_passes_resize_and_normalise():
    images = torch.rand(1, 3, 6, 5, dtype=torch.float64, requires_grad=True)

    def preprocess(x):
        return normalise(resize(x, (3, 4), "bicubic"), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))

    assert torch.autograd.gradcheck(preprocess, images)


def test_normalise_works_by_channel():
    images = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    normalised = normalise(images, mean=(0.1, 0.5, 1.0), std=(0.5, 0.25, 0.2))
    torch.testing.assert_close(normalised[1, :, 2, 3], torch.tensor([0.2, 0.0, -0.5]))


def test_pil_round_trip_rounds_to_the_nearest_of_256_levels():
    images = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    pictures = to_pil(images.requires_grad_())
    assert pictures[0].size == (7, 5)
    assert (from_pil(pictures) - images).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(from_pil(to_pil(from_pil(pictures))), from_pil(pictures))


def test_to_pil_clamps():
    assert to_pil(torch.tensor([-0.5, 0.5, 1.5]).view(1, 3, 1, 1))[0].getpixel((0, 0)) == (0, 128, 255)
