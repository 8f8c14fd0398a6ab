"""The embedded rater and its reward: a judge of the drawing beside the aesthetic head."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from alignprop import emoji
from alignprop.config import load_config
from alignprop.rewards import check_scores, load_reward
from alignprop.rollout import Sampler
from pictures import directional_derivatives, waves

PROMPTS = ["a cat", "a red car"]
ANIMALS = emoji.prompts("animals")[::4]
STYLES = ("3d", "line drawing")


@pytest.fixture(scope="module")
def reward():
    return load_reward("emoji-rating")


@pytest.fixture(scope="module")
def drawings():
    """A picture of each animal in 3d, and one as a line drawing."""
    sampler = Sampler(emoji.pipeline(), {"num_inference_steps": 5, "guidance_scale": 3.0})
    seeds = list(range(len(ANIMALS)))
    return [sampler.sample([f"{animal}, {style}" for animal in ANIMALS], seeds).clamp(0, 1) for style in STYLES]


def test_it_keeps_the_contract_of_rewards(reward):
    images = waves(64, 64).requires_grad_()
    scores = reward(images, PROMPTS)
    check_scores(scores, images, "emoji-rating", PROMPTS)
    assert ((scores > 1) & (scores < 10)).all()
    scores.sum().backward()
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()


def test_the_network_is_what_its_description_says(reward, drawings):
    """Computed again from the file alone, with another way to a deviation."""
    tensors = load_file(emoji.WEIGHTS / "rater" / "model.safetensors")
    weights = {name: tensor.float() for name, tensor in tensors.items()}

    def normalised(x, name):
        found = [weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        mean, variance, scale, shift = (value.view(-1, *[1] * (x.ndim - 2)) for value in found)
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def separable(x, name, first, stride):
        depthwise = F.conv2d(x, weights[f"{name}.{first}.weight"], stride=stride, padding=1, groups=x.shape[1])
        return F.conv2d(depthwise, weights[f"{name}.{first + 1}.weight"])

    images = drawings[0][:5]
    x = F.conv2d(2 * images - 1, weights["stem.weight"], weights["stem.bias"], stride=2, padding=2).relu()
    statistics = []
    for block in ("blocks.0", "blocks.1", "blocks.2"):
        x = normalised(separable(x, f"{block}.first", 0, 2), f"{block}.first.2").relu()
        x = (x + normalised(separable(x, f"{block}.second", 0, 1), f"{block}.second.2")).relu()
        statistics += [x.mean((2, 3)), (x.var((2, 3), correction=0) + 1e-3).sqrt()]
    logits = normalised(torch.cat(statistics, 1), "norm") @ weights["rating.weight"][0] + weights["rating.bias"]
    torch.testing.assert_close(reward(images, ANIMALS[:5]), 1 + 9 * logits.sigmoid(), rtol=1e-4, atol=1e-4)


def test_the_prompt_does_not_matter(reward):
    images = waves(64, 64)
    assert torch.equal(reward(images, PROMPTS), reward(images, PROMPTS[::-1]))


def test_the_gradient_agrees_with_finite_differences():
    reward = load_reward("emoji-rating").double()
    derivative, difference = directional_derivatives(reward, PROMPTS, 64, 64, step=1e-7)  # between two kinks of a ReLU
    assert derivative == pytest.approx(difference, rel=1e-4)


def test_what_is_drawn_well_is_rated_higher(reward, drawings):
    shaded, lines = (reward(images, ANIMALS) for images in drawings)
    assert shaded.mean() > lines.mean() + 2
    assert (shaded > lines).double().mean() > 0.9


def test_spoilt_drawings_are_rated_lower(reward, drawings):
    shaded, generator = drawings[0], torch.Generator().manual_seed(0)
    noise = torch.randn(shaded.shape, generator=generator)
    blurred = torch.nn.functional.avg_pool2d(shaded, 9, stride=1, padding=4, count_include_pad=False)
    tiles = shaded.unflatten(2, (4, 16)).flip(2).flatten(2, 3).unflatten(3, (4, 16)).flip(3).flatten(3, 4)
    clean = reward(shaded, ANIMALS).mean()
    for spoilt in (blurred, (shaded + 0.2 * noise).clamp(0, 1), tiles, torch.rand(shaded.shape, generator=generator)):
        assert reward(spoilt, ANIMALS).mean() < clean - 2


def test_pictures_of_any_size_are_shrunk_to_the_model_s_own(reward, drawings):
    large = drawings[0].repeat_interleave(4, 2).repeat_interleave(4, 3)
    small = emoji.preprocess(large) / 2 + 0.5
    torch.testing.assert_close(reward(large, ANIMALS), reward(small, ANIMALS))


def test_the_rater_is_very_small():
    """It was given what was left of the 32 MB that the embedded model may have."""
    assert sum(path.stat().st_size for path in (emoji.WEIGHTS / "rater").iterdir()) < 48e3


@pytest.mark.parametrize("recipe", ["emoji", "emoji-combined", "emoji-alignment"])
def test_recipes_watch_it(recipe):
    assert "emoji-rating" in load_config(recipe).judges
