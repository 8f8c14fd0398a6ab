"""The embedded namer, its reward, and the features of the judges that compare pictures."""

import pytest
import torch

from alignprop import emoji
from alignprop.rewards import check_scores, load_reward
from alignprop.rewards.clip import Clip
from pictures import directional_derivatives, waves

PROMPTS = ["a cat", "a red car"]
ANIMALS = emoji.prompts("animals")[::6] + emoji.prompts("unseen")


@pytest.fixture(scope="module")
def reward():
    return load_reward("emoji-names")


@pytest.fixture(scope="module")
def drawings():
    from alignprop.rollout import Sampler

    sampler = Sampler(emoji.pipeline(), {"num_inference_steps": 5, "guidance_scale": 3.0, "eta": 1.0})
    return sampler.sample(ANIMALS, list(range(len(ANIMALS)))).clamp(0, 1)


def test_it_keeps_the_contract_of_rewards(reward):
    images = waves(64, 64).requires_grad_()
    scores = reward(images, PROMPTS)
    check_scores(scores, images, "emoji-names", PROMPTS)
    scores.sum().backward()
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()


def test_scores_are_logarithms_of_probabilities_that_sum_to_one_with_none(reward, drawings):
    *things, none = reward.namer.labels
    assert (len(things), none) == (116, "none of these")
    for image, prompt in ((drawings[0], ANIMALS[0]), (waves(64, 64)[0], "a cat")):
        scores = reward(image.expand(116, -1, -1, -1), things)
        probabilities = emoji.names()(image[None]).softmax(1)[0]
        torch.testing.assert_close(scores.exp(), probabilities[:-1])
        torch.testing.assert_close(scores.exp().sum() + probabilities[-1], torch.tensor(1.0))
        assert (scores < 0).all()
        torch.testing.assert_close(reward(image[None], [prompt])[0], scores[things.index(prompt.split(" ", 1)[1])])


def test_it_names_what_the_model_draws_and_does_not_saturate(reward, drawings):
    things = reward.namer.labels
    found = [things[label] for label in reward.namer(drawings).argmax(1)]
    assert [f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}" for thing in found] == ANIMALS
    right, wrong = reward(drawings, ANIMALS), reward(drawings, ANIMALS[1:] + ANIMALS[:1])
    assert right.min() > -1.0
    assert right.max() < -0.01
    assert wrong.max() < -3.0


def test_the_gradient_agrees_with_finite_differences():
    reward = load_reward("emoji-names").double()
    derivative, difference = directional_derivatives(reward, PROMPTS, 64, 64, step=1e-7)  # between two kinks of a ReLU
    assert derivative == pytest.approx(difference, rel=1e-4)


def test_blurred_noisy_and_shuffled_drawings_score_lower(reward, drawings):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(drawings.shape, generator=generator)
    blurred = torch.nn.functional.avg_pool2d(drawings, 9, stride=1, padding=4, count_include_pad=False)
    tiles = drawings.unflatten(2, (4, 16)).flip(2).flatten(2, 3).unflatten(3, (4, 16)).flip(3).flatten(3, 4)
    clean = reward(drawings, ANIMALS)
    scores = [clean] + [reward((drawings + level * noise).clamp(0, 1), ANIMALS) for level in (0.2, 0.4)]
    assert (scores[0].mean() > scores[1].mean() > scores[2].mean()).item()
    assert (reward(blurred, ANIMALS) < clean).all()
    for nothing in (tiles, torch.rand(noise.shape, generator=generator)):
        assert reward(nothing, ANIMALS).max() < -2.0


def test_pictures_of_any_size_are_shrunk_to_the_model_s_own(reward, drawings):
    large = drawings.repeat_interleave(4, 2).repeat_interleave(4, 3)
    small = emoji.preprocess(large) / 2 + 0.5
    torch.testing.assert_close(reward(large, ANIMALS), reward(small, ANIMALS))
    assert (reward(large, ANIMALS) - reward(drawings, ANIMALS)).abs().max() < 0.5


@pytest.mark.parametrize("prompt", ["red car", "the red car", "A  Red Car", "a red car, 3d", "a red car, line drawing"])
def test_a_thing_may_have_an_article_and_a_style(prompt):
    labels = emoji.names().labels
    assert labels[emoji.label_of(prompt, labels)] == "red car"


def test_every_prompt_of_the_model_names_a_thing_of_its_own(reward):
    prompts = [prompt for name in ("animals", "unseen", "drift") for prompt in emoji.prompts(name)]
    assert [emoji.label_of(prompt, reward.namer.labels) for prompt in prompts] == list(range(57))


@pytest.mark.parametrize(
    ("prompt", "remedy"),
    [
        ("a foxx", "did you mean 'a fox'?"),
        ("a fox riding a bicycle through the snow", "did you mean 'a fox'?"),
        ("a 3d rendering of one owl", "did you mean 'an owl'?"),
        ("none of these", "give one such as 'a cat'."),
        ("", "give one such as 'a cat'."),
    ],
)
def test_a_prompt_that_is_not_just_a_known_thing_is_refused(reward, prompt, remedy):
    with pytest.raises(ValueError, match="emoji-names") as error:
        reward(waves(64, 64), ["a cat", prompt])
    advice = "For other prompts leave it out of the judges and rewards."
    assert str(error.value) == f"prompt={prompt!r} is not just a thing that emoji-names knows: {remedy} {advice}"


@pytest.mark.parametrize(("name", "length"), [("emoji-names", 128), ("emoji-clip", 128)])
def test_features_are_of_unit_length_and_near_for_the_same_thing(name, length, drawings):
    judge = load_reward(name)
    features = judge.features(drawings)
    assert features.shape == (len(drawings), length)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(drawings)))
    moved = 1 - torch.nn.functional.pad(1 - drawings, (3, -3, -2, 2)).flip(3)
    assert (judge.features(moved) @ features.T).argmax(1).tolist() == list(range(len(drawings)))


def test_the_clip_s_features_are_the_embeddings_that_it_compares_with_prompts(drawings):
    judge = load_reward("emoji-clip")
    tokens = judge.tokenizer(["a fox"], return_tensors="pt")
    text = judge.clip.text_projection(judge.clip.text_model(**tokens).pooler_output)[0]
    cosines = judge.features(drawings) @ (text / text.norm())
    torch.testing.assert_close(cosines, judge(drawings, ["a fox"] * len(drawings)))


def test_features_have_a_gradient(reward):
    images = waves(64, 64).requires_grad_()
    reward.features(images)[:, :9].sum().backward()
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()


def test_the_namer_is_small():
    assert sum(path.stat().st_size for path in (emoji.WEIGHTS / "names").iterdir()) < 1.2e6


@pytest.mark.parametrize(("name", "module"), [("clip-score", "clip_score"), ("pickscore", "pickscore")])
def test_rewards_on_any_clip_have_its_embeddings_as_features(name, module, drawings, monkeypatch):
    monkeypatch.setattr(f"alignprop.rewards.{module}.load_clip", lambda *_: Clip(*emoji.clip(), emoji.preprocess))
    expected = load_reward("emoji-clip").features(drawings)
    torch.testing.assert_close(load_reward(name).features(drawings), expected)
