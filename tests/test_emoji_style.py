"""The reward of a style of drawing and the embedded classifier behind it."""

import math

import pytest
import torch

from alignprop import emoji
from alignprop.config import guard_of, load_config, recipes
from alignprop.rewards import check_scores, load_reward
from alignprop.rewards.classifier import log_probability
from pictures import directional_derivatives, waves

PROMPTS = ["a cat", "a red car"]


def pictures():
    return waves(64, 64)


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("style", emoji.STYLES)
def test_a_style_keeps_the_contract_of_rewards(style, absent):
    images = pictures().requires_grad_()
    scores = load_reward("emoji-style", style=style, absent=absent)(images, PROMPTS)
    check_scores(scores, images, "emoji-style", PROMPTS)
    assert (scores <= 0).all()
    scores.sum().backward()
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()


def test_scores_are_logarithms_of_probabilities_that_sum_to_one_with_none():
    images = pictures()
    clip, _ = emoji.clip()
    expected = emoji.classifier()(emoji.aesthetic_features(clip, images)).softmax(1)
    present = [load_reward("emoji-style", style=style)(images, PROMPTS).exp() for style in emoji.STYLES]
    torch.testing.assert_close(torch.stack(present, 1), expected[:, :4])
    torch.testing.assert_close(sum(present) + expected[:, 4], torch.ones(2))


def test_the_absence_of_a_style_is_a_drawing_in_another_and_no_damaged_one():
    images = pictures()
    clip, _ = emoji.clip()
    probabilities = emoji.classifier()(emoji.aesthetic_features(clip, images)).softmax(1)
    absent = load_reward("emoji-style", style="flat", absent=True)(images, PROMPTS)
    torch.testing.assert_close(absent.exp(), probabilities[:, [0, 2, 3]].sum(1))


def test_probabilities_near_one_and_near_zero_keep_their_digits():
    logits = torch.tensor([[40.0, 0.0, 0.0]])
    assert log_probability(logits, [0]).item() == pytest.approx(-2 * math.exp(-40))
    assert log_probability(logits, [1, 2]).item() == pytest.approx(math.log(2) - 40)


@pytest.mark.parametrize("arguments", [{"style": "line"}, {"style": "line", "absent": True}])
def test_the_gradient_agrees_with_finite_differences(arguments):
    derivative, difference = directional_derivatives(load_reward("emoji-style", **arguments).double(), PROMPTS, 64, 64)
    assert derivative == pytest.approx(difference, rel=1e-4)


def test_the_classifier_knows_the_styles_that_the_model_draws_and_calls_noise_none():
    from alignprop.rollout import Sampler

    words = {"3d": "3d", "flat": "flat", "noto": "noto", "line": "line drawing"}
    prompts = [f"{animal}, {words[style]}" for style in emoji.STYLES for animal in ("a fox", "an owl")]
    sampler = Sampler(emoji.pipeline(), {"num_inference_steps": 5, "guidance_scale": 3.0})
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = torch.cat([sampler.sample(prompts, list(range(8))).clamp(0, 1), noise])
    clip, _ = emoji.clip()
    with torch.no_grad():
        found = emoji.classifier()(emoji.aesthetic_features(clip, images)).argmax(1)
    assert found.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("style", "remedy"), [("lines", "did you mean 'line'?"), ("oil", "choose one of 3d, flat, noto, line.")]
)
def test_an_unknown_style_is_refused_by_name(style, remedy):
    with pytest.raises(ValueError, match="is no style of the embedded model") as error:
        load_reward("emoji-style", style=style)
    assert str(error.value) == f"style={style!r} is no style of the embedded model; {remedy}"


@pytest.mark.parametrize(("name", "absent"), [("emoji-outlines", False), ("emoji-no-outlines", True)])
def test_the_recipes_ask_for_outlines_and_for_none(name, absent):
    assert name in recipes()
    (reward,) = load_config(name).rewards.values()
    assert reward.arguments == ({"style": "line", "absent": True} if absent else {"style": "line"})


def test_one_line_drawing_of_each_thing_is_no_loss_to_the_guard_of_outlines():
    assert guard_of(load_config("emoji-outlines")).min_diversity is None


def test_all_weights_stay_small_enough_to_ship():
    size = sum(path.stat().st_size for path in emoji.WEIGHTS.rglob("*") if path.is_file())
    assert size < 32e6
    assert sum(path.stat().st_size for path in (emoji.WEIGHTS / "classifier").iterdir()) < 0.8e6


def test_the_weights_name_no_folder_of_the_machine_that_made_them():
    named = [path for path in emoji.WEIGHTS.rglob("*.json") if '"_name_or_path": "/' in path.read_text("utf-8")]
    assert named == []
