"""Rewards: real JPEG files, Pillow, scipy and finite differences as oracles; the contract; its messages."""

import io
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import scipy.stats
import torch
from PIL import Image

from alignprop.pixels import from_pil, to_pil
from alignprop.rewards import REWARDS, WeightedSum, as_weighted_sum, check_scores, jpeg, load_reward
from alignprop.rewards.colour import brightness, redness
from pictures import photograph


def file_kilobytes(picture, quality):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.tell() / 1000


def blurred_noise(height, width, blur, contrast, seed):
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    noise = scipy.ndimage.gaussian_filter(noise, (blur, blur, 0))
    return Image.fromarray((128 + contrast * noise / noise.std()).clip(0, 255).astype(np.uint8))


def drawing(height, width, num_shapes, seed):
    """Discs and diamonds on a sloping background: like the emoji drawings, flat areas and sharp edges."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    slope = rng.uniform(0, 120, 3) / (height + width)
    pixels = np.stack([x, y, x + y], -1) * slope + rng.uniform(60, 130, 3)
    for _ in range(num_shapes):
        cy, cx, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(3, min(height, width) / 3)
        distance = np.hypot(y - cy, x - cx) if rng.random() < 0.5 else abs(y - cy) + abs(x - cx)
        pixels[distance < radius] = rng.uniform(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


SIZES = [(64, 64), (96, 96), (128, 128), (50, 75), (33, 128), (200, 71)]
PICTURES = [
    *(drawing(*SIZES[i % 6], num_shapes=(0, 1, 3, 8, 20)[i % 5], seed=i) for i in range(30)),
    *(blurred_noise(*SIZES[i % 6], (0, 0.5, 1, 2, 5)[i % 5], (4, 15, 40)[i % 3], seed=i) for i in range(30)),
]
LARGE_SIZES = [(256, 256), (512, 512), (384, 512), (512, 300)]
LARGE_PICTURES = [
    *(drawing(*LARGE_SIZES[i % 4], num_shapes=(1, 8, 40)[i % 3], seed=i) for i in range(100, 106)),
    *(blurred_noise(*LARGE_SIZES[i % 4], (0, 1, 4)[i % 3], (8, 30)[i % 2], seed=i) for i in range(100, 106)),
]


# JPEG: each stage against an independent implementation


@pytest.mark.parametrize("quality", [1, 10, 33, 49, 50, 75, 95, 100])
def test_quantisation_tables_are_those_of_pillow(quality):
    buffer = io.BytesIO()
    PICTURES[0].save(buffer, "JPEG", quality=quality)
    real = Image.open(buffer).quantization
    assert jpeg.quantisation_tables(quality).flatten(1).tolist() == [list(real[0]), list(real[1])]


def test_dct_is_that_of_scipy():
    block = torch.randn(3, 5, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = scipy.fft.dctn(block.numpy(), axes=(-2, -1), norm="ortho")
    np.testing.assert_allclose(jpeg.dct(block).numpy(), expected, atol=1e-12)


def test_colour_conversion_is_that_of_pillow():
    picture = blurred_noise(32, 32, 0, 60, seed=0)
    expected = np.asarray(picture.convert("YCbCr")).astype(float)
    converted = jpeg.ycbcr(from_pil([picture]) * 255)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(converted, expected, atol=1.0)  # Pillow truncates in fixed point
    assert abs(converted - expected).mean() < 0.5


def test_luma_blocks_come_in_units_of_two_by_two():
    index = torch.arange(32.0) // 8
    plane = 10 * index[None, :, None] + index  # the block in row r and column c holds 10 r + c
    cut = jpeg.blocks(plane, 2)
    assert cut.shape == (1, 16, 8, 8)
    assert cut[0, :, 3, 5].tolist() == [0, 1, 10, 11, 2, 3, 12, 13, 20, 21, 30, 31, 22, 23, 32, 33]
    assert torch.equal(jpeg.blocks(torch.arange(64.0).view(1, 8, 8), 1)[0, 0], torch.arange(64.0).view(8, 8))


def test_zigzag_order():
    assert jpeg.ZIGZAG[:16] == [0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5]
    assert jpeg.ZIGZAG[-4:] == [47, 55, 62, 63]


# JPEG: the estimate against real files


@pytest.mark.parametrize("quality", [10, 20, 50, 75, 90, 95])
def test_estimate_follows_real_file_sizes_from_64_to_512_pixels(quality):
    score = load_reward("jpeg-incompressibility", quality=quality)
    photographs = [photograph(size, size) for size in (64, 128, 256, 512)]
    pictures = [*PICTURES, *LARGE_PICTURES, *photographs]
    estimates = np.array([score(from_pil([picture]), [""]).item() for picture in pictures])
    real = np.array([file_kilobytes(picture, quality) for picture in pictures])
    ratio = estimates / real
    print(
        f"quality {quality}: rank correlation {scipy.stats.spearmanr(estimates, real).statistic:.4f}, "
        f"ratio mean {ratio.mean():.3f}, {ratio.min():.3f} to {ratio.max():.3f}"
    )
    assert scipy.stats.spearmanr(estimates, real).statistic >= 0.99
    assert abs(ratio.mean() - 1) < 0.02
    assert abs(ratio[: len(PICTURES)] - 1).max() < 0.17  # 0.16 at quality 10, 0.13 at 95
    assert abs(ratio - 1).max() < 0.22  # faint white noise at quality 10, whose coefficients are all near rounding


def test_plain_pictures_cost_their_header_and_blocks():
    plain = [Image.new("RGB", (16, 16), name) for name in ("#808080", "white", "black", "red")]
    estimates = load_reward("jpeg-incompressibility")(from_pil(plain), [""] * 4)
    real = torch.tensor([file_kilobytes(picture, 95) for picture in plain])
    torch.testing.assert_close(estimates, real, atol=0.0015, rtol=0)
    assert estimates[1] - estimates[0] == pytest.approx(0.002, abs=0.0005)  # grey is the zero that coding starts from


def test_quality_95_is_the_default_and_signs_are_opposite():
    images = from_pil([PICTURES[0], PICTURES[30]])
    small, large = load_reward("jpeg-compressibility"), load_reward("jpeg-incompressibility", quality=95)
    assert torch.equal(small(images, ["", ""]), -large(images, ["", ""]))


def test_a_batch_scores_as_its_pictures_do():
    score = load_reward("jpeg-compressibility")
    together = score(from_pil([PICTURES[0], PICTURES[30]]), ["", ""])
    alone = torch.cat([score(from_pil([PICTURES[i]]), [""]) for i in (0, 30)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pixels_are_scored_in_single(dtype):
    images = from_pil([PICTURES[3]]).to(dtype)
    score = load_reward("jpeg-compressibility")
    assert torch.equal(score(images, [""]), score(images.float(), [""]))


def test_jpeg_gradient_agrees_with_finite_differences():
    images = from_pil([blurred_noise(18, 35, 1, 40, seed=1)]).double().requires_grad_()
    tables = jpeg.quantisation_tables(90)
    (gradient,) = torch.autograd.grad(jpeg.kilobytes(images, tables).sum(), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift = 1e-6 * direction
    difference = jpeg.kilobytes(images + shift, tables) - jpeg.kilobytes(images - shift, tables)
    torch.testing.assert_close((gradient * direction).sum(), difference[0].detach() / 2e-6, rtol=1e-6, atol=0)


@pytest.mark.parametrize("quality", [10, 50, 95])
@pytest.mark.parametrize("value", ["black", "white", "grey"])
def test_gradient_is_finite_where_coefficients_are_zero_or_huge(quality, value):
    flat = Image.new("RGB", (24, 24), value)
    checkers = Image.fromarray(np.uint8(255 * (np.indices((24, 24)).sum(0) % 2))).convert("RGB")
    images = from_pil([flat, checkers]).requires_grad_()
    load_reward("jpeg-compressibility", quality=quality)(images, ["", ""]).sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad[1].abs().sum() > 0


@pytest.mark.parametrize("name, wanted", [("jpeg-compressibility", -1), ("jpeg-incompressibility", 1)])
def test_ascent_changes_real_files_as_promised(name, wanted):
    pictures = [drawing(64, 64, 8, seed=1), blurred_noise(64, 64, 1, 40, seed=2)]
    images = from_pil(pictures).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        (-load_reward(name)(images.clamp(0, 1), ["", ""])).sum().backward()
        optimizer.step()
    for before, after in zip(pictures, to_pil(images), strict=True):
        change = file_kilobytes(after, 95) / file_kilobytes(before, 95) - 1
        assert wanted * change > 0.2, change


@pytest.mark.parametrize("quality", [0, 101])
def test_quality_out_of_range_is_refused(quality):
    with pytest.raises(ValueError, match="needs 1 <= quality <= 100"):
        load_reward("jpeg-compressibility", quality=quality)


# Colour


def test_colour_of_plain_pictures():
    images = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.5]])
    images = images.view(4, 3, 1, 1).expand(4, 3, 5, 6)
    torch.testing.assert_close(brightness(images, [""] * 4), torch.tensor([0.299, 0.587, 0.114, 0.5]))
    torch.testing.assert_close(redness(images, [""] * 4), torch.tensor([1.0, -0.5, -0.5, 0.0]))


def test_brightness_is_pillows_grey():
    picture = PICTURES[3]
    grey = np.asarray(picture.convert("L")).mean() / 255
    assert brightness(from_pil([picture]), [""]).item() == pytest.approx(grey, abs=1 / 255)


@pytest.mark.parametrize("reward", [brightness, redness])
def test_colour_gradients(reward):
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reward(x, ["", ""]), images)


# Sums


def test_weighted_sum_adds_and_shows_its_parts():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    total = WeightedSum({"red": redness, "bright": brightness}, {"bright": -0.5, "red": 2.0})
    red, bright = redness(images, ["", ""]), brightness(images, ["", ""])
    torch.testing.assert_close(total(images, ["", ""]), 2 * red - 0.5 * bright)
    parts = total.components(images, ["", ""])
    assert list(parts) == ["red", "bright"]
    assert torch.equal(parts["bright"], bright)
    check_scores(total(images, ["", ""]), images, "sum")


class Linear(torch.nn.Module):
    """A reward with a parameter and a dropout."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.dropout = torch.nn.Dropout()

    def forward(self, images, prompts):
        return self.scale * self.dropout(images).mean((1, 2, 3))


def test_modules_in_a_sum_are_frozen_and_move_with_it():
    module = Linear(3.0)
    total = WeightedSum({"linear": module, "red": redness}, {"linear": 1.0, "red": 1.0}).to(torch.float64)
    assert module.scale.dtype == torch.float64
    assert not module.scale.requires_grad
    assert not module.dropout.training
    images = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
    assert total(images, [""]).item() == 1.5


def test_a_single_reward_is_a_sum_of_one_under_its_own_name():
    images = torch.rand(2, 3, 4, 4)
    alone = as_weighted_sum(redness)
    assert torch.equal(alone(images, ["", ""]), redness(images, ["", ""]))
    assert list(alone.weights) == ["redness"]
    assert list(as_weighted_sum(Linear()).weights) == ["Linear"]
    assert as_weighted_sum(alone) is alone


@pytest.mark.parametrize("rewards, weights", [({}, {}), ({"red": redness}, {"rde": 1.0})])
def test_sum_needs_a_weight_for_each_reward(rewards, weights):
    with pytest.raises(ValueError, match="need the same names"):
        WeightedSum(rewards, weights)


# The check of scores


@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda x: x.mean((2, 3)), "'mine' returned shape (2, 3); it must be (2,)"),
        (lambda x: x.mean(), "'mine' returned shape (); it must be (2,)"),
        (lambda x: 0.5, "'mine' returned 0.5; return a tensor of shape (2,)"),
        (lambda x: x.mean((1, 2, 3)).round().long(), "'mine' returned torch.int64"),
        (lambda x: x.mean((1, 2, 3)) / torch.tensor([1.0, 0.0]), "not finite: inf for 'a dog'."),
        (lambda x: x.mean((1, 2, 3)) * math.nan, "not finite: nan for 'a cat', nan for 'a dog'."),
        (lambda x: x.detach().mean((1, 2, 3)), "no gradient to the pixels"),
        (lambda x: Linear()(x.detach(), []), "no gradient to the pixels"),
    ],
)
def test_bad_scores_are_refused_in_one_sentence(reward, message):
    images = torch.ones(2, 3, 4, 4, requires_grad=True) * 1.0
    with pytest.raises(ValueError, match=re.escape(message)):
        check_scores(reward(images), images, "mine", ["a cat", "a dog"])


@pytest.mark.parametrize("leaf", [True, False])
def test_good_scores_pass(leaf):
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    images = images if leaf else images * 1.0
    check_scores(redness(images, []), images, "redness")
    check_scores(images.flatten(1)[:, 0], images, "a pixel")
    with torch.no_grad():
        check_scores(redness(images.detach(), []), images.detach(), "redness")


# Loading


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    Path("my_rewards.py").write_text(
        "import torch\n"
        "def plain(images, prompts): return images.mean((1, 2, 3))\n"
        "def scaled(images, prompts, scale=1.0): return scale * plain(images, prompts)\n"
        "def build(scale=1.0): return lambda images, prompts: scaled(images, prompts, scale)\n"
        "def build_two(images, prompts): return lambda i, p: images * prompts * plain(i, p)\n"
        "class Module(torch.nn.Module):\n"
        "    def __init__(self, scale=1.0):\n"
        "        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.tensor(scale))\n"
        "    def forward(self, images, prompts): return scaled(images, prompts, self.scale)\n"
        "class Demanding:\n"
        "    def __init__(self, folder, scale): ...\n"
        "built = Module(3.0)\n"
        "number = 5\n"
    )


@pytest.mark.parametrize(
    "attribute, arguments, expected",
    [
        ("plain", {}, 0.5),
        ("scaled", {}, 0.5),
        ("scaled", {"scale": 3.0}, 1.5),
        ("build", {}, 0.5),
        ("build", {"scale": 3.0}, 1.5),
        ("build_two", {"images": 2.0, "prompts": 3.0}, 3.0),
        ("Module", {"scale": 3.0}, 1.5),
        ("built", {}, 1.5),
    ],
)
def test_own_rewards_load_from_the_working_directory(my_rewards, attribute, arguments, expected):
    reward = load_reward(f"my_rewards:{attribute}", **arguments)
    images = torch.full((2, 3, 2, 2), 0.5)
    scores = reward(images, ["", ""])
    assert scores.tolist() == [expected, expected]
    assert not scores.requires_grad  # modules are frozen


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("rednes", {}, "reward='rednes' is no named reward and no module:attribute; did you mean 'redness'?"),
        ("xyz", {}, "the rewards are emoji-aesthetic"),
        ("no_such_module:f", {}, "cannot be imported (No module named 'no_such_module')"),
        ("my_rewards:nothing", {}, "my_rewards has no 'nothing'"),
        ("my_rewards:number", {}, "is no callable but 5; give a function"),
        ("my_rewards:Demanding", {}, "needs folder, scale; give them as arguments"),
        ("my_rewards:Module", {"scael": 3.0}, "takes no scael; its arguments: (scale=1.0)"),
        ("my_rewards:built", {"scale": 3.0}, "is built already and takes no arguments"),
        ("redness", {"quality": 3}, "takes no quality"),
    ],
)
def test_bad_names_and_arguments_are_refused(my_rewards, name, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_reward(name, **arguments)


# The embedded model's rewards


def test_emoji_clip_is_the_cosine_of_the_whole_clip_model():
    from alignprop import emoji

    images = from_pil([drawing(64, 64, 5, seed) for seed in range(3)])
    prompts = ["a cat", "a red car, flat", "a cat"]
    model, tokenizer = emoji.clip()
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    logits = model(input_ids=tokens.input_ids, pixel_values=2 * images - 1).logits_per_image
    expected = logits.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(load_reward("emoji-clip")(images, prompts), expected, atol=1e-5, rtol=0)


def test_emoji_clip_embeds_each_prompt_once_and_trains_after_an_evaluation():
    reward = load_reward("emoji-clip")
    calls = []
    reward.clip.text_model.register_forward_hook(lambda *_: calls.append(1))
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        evaluated = reward(images, ["a cat", "a dog", "a cat"])
    images.requires_grad_()
    trained = reward(images, ["a cat", "a dog", "a cat"])
    assert len(calls) == 2  # a cat and a dog, each alone: a score must not depend on its company
    torch.testing.assert_close(trained.detach(), evaluated.clone())
    trained.sum().backward()
    assert images.grad.abs().sum() > 0


def test_emoji_clip_scores_a_prompt_the_same_whatever_else_is_in_the_batch():
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    together = load_reward("emoji-clip")
    together(images, ["a cat", "a red car, line drawing", "an octopus"])
    alone = load_reward("emoji-clip")
    assert torch.equal(together(images[:1], ["a cat"]), alone(images[:1], ["a cat"]))


def test_emoji_aesthetic_rates_a_drawing_above_noise():
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pictures = torch.cat([from_pil([drawing(64, 64, 5, seed=1)]), noise])
    drawn, noisy = load_reward("emoji-aesthetic")(pictures, ["a cat", "a cat"]).tolist()
    assert 1 < noisy < drawn < 10


@pytest.mark.parametrize("name", ["emoji-aesthetic", "emoji-clip"])
def test_emoji_rewards_gradient_agrees_with_finite_differences(name):
    reward = load_reward(name).double()
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, ["a cat"]).sum(), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shift = 1e-6 * direction
    difference = (reward(images + shift, ["a cat"]) - reward(images - shift, ["a cat"])).item() / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("name", [name for name, card in REWARDS.items() if card.differentiable and not card.downloads])
def test_every_named_reward_keeps_the_contract(name):
    """A new row of the table inherits this; those that download their weights are tested by files of their own."""
    images = from_pil([drawing(64, 64, 5, seed) for seed in range(2)]).requires_grad_()
    scores = load_reward(name)(images, ["a cat", "a red car"])
    check_scores(scores, images, name, ["a cat", "a red car"])
    scores.sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()
