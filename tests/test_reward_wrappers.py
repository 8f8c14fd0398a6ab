"""What is put around a reward: closed forms, other implementations and finite differences; training with all of it."""

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from typer.testing import CliRunner

import test_trainer
import test_vision_rewards
import tiny
from alignprop import distributed
from alignprop.checkpointing import load_checkpoint
from alignprop.config import ConfigError, load_config, read_config, save
from alignprop.config.settings import Augmentation
from alignprop.estimators import AlignProp
from alignprop.evaluation import optimised, summaries
from alignprop.guard import Guard
from alignprop.measures import Evaluated
from alignprop.memory import peak_bytes
from alignprop.prompts import Choice, Prompts, load_prompts
from alignprop.rewards import (
    REWARDS,
    Augmented,
    Checkpointed,
    Clamped,
    Normalised,
    OnFrames,
    PerPrompt,
    WeightedSum,
    as_weighted_sum,
    check_scores,
    is_differentiable,
    load_per_prompt,
    load_reward,
    modality_of,
    score,
)
from alignprop.rewards.augmented import window_matrix
from alignprop.rewards.colour import brightness, redness
from alignprop.runfolder import RunFolder
from alignprop.truncation import Last

TRAIN = test_trainer.TRAIN


def wavy(images, prompts):
    """A reward that bends: of no pixel's sign or place alone."""
    places = torch.arange(images[0].numel()).view(images.shape[1:]).to(images)
    return (torch.sin(3 * images + places) * images).flatten(1).mean(1)


def pictures(num=3, size=12, dtype=torch.float64, seed=0):
    """Pictures away from black and white."""
    generator = torch.Generator().manual_seed(seed)
    return 0.2 + 0.6 * torch.rand(num, 3, size, size, dtype=dtype, generator=generator)


def assert_gradient_is_that_of_finite_differences(function, images):
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(images).sum(), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ahead, behind = (function(images + sign * 1e-6 * direction).sum().item() for sign in (1, -1))
    assert abs(gradient * direction).sum() > 1e-3
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind) / 2e-6, rel=1e-6)


def prompts_for(images):
    return ["a cat"] * len(images)


# Targets


def test_a_clamp_is_the_minimum_and_its_gradient_is_zero_above():
    images = pictures(4).requires_grad_()
    plain = wavy(images, prompts_for(images))
    target = plain.detach().sort().values[1].item() + 1e-9  # two are above
    clamped = Clamped(wavy, target)
    scores = clamped(images, prompts_for(images))
    assert torch.equal(scores, torch.minimum(plain, torch.tensor(target, dtype=torch.float64)))
    (gradient,) = torch.autograd.grad(scores.sum(), images, retain_graph=True)
    (own,) = torch.autograd.grad(plain.sum(), images)
    above = plain > target
    assert above.sum() == 2
    assert torch.equal(gradient[above], torch.zeros_like(own[above]))
    assert torch.equal(gradient[~above], own[~above])
    assert clamped.share(plain) == 0.5


@pytest.mark.parametrize("target, moves", [(-9.0, False), (9.0, True)])
def test_training_stands_still_above_the_target_and_shows_the_score_all_the_same(target, moves):
    run = test_trainer.trainer(reward=Clamped(test_trainer.redness, target), dropout=0.0)
    plain = test_trainer.trainer(dropout=0.0)
    clamped, metrics = run.train_step(), plain.train_step()
    assert (clamped["grad_norm"] > 0) == moves
    assert (clamped["reward"], clamped["rewards"]) == (metrics["reward"], metrics["rewards"])
    assert clamped["clamped"] == {"redness": 0.0 if moves else 1.0}
    assert clamped["objective"] == pytest.approx(clamped["reward"] if moves else target)
    assert "objective" not in metrics and "clamped" not in metrics
    if moves:
        assert clamped["grad_norm"] == metrics["grad_norm"]


# Normalisation


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_statistics_are_those_of_weighted_batches(decay):
    rng = np.random.default_rng(0)
    batches = [rng.normal(3 + i, 1 + i, size=rng.integers(1, 6)) for i in range(7)]
    normalised = Normalised(wavy, decay)
    for count in range(1, 8):
        normalised.observe(torch.from_numpy(batches[count - 1]))
        weights = np.concatenate(
            [np.full(len(b), decay ** (count - 1 - k) / len(b)) for k, b in enumerate(batches[:count])]
        )
        values = np.concatenate(batches[:count])
        mean = np.average(values, weights=weights)
        assert normalised.mean == pytest.approx(mean, rel=1e-12)
        assert normalised.variance == pytest.approx(
            np.average((values - mean) ** 2, weights=weights), rel=1e-10, abs=1e-15
        )


def test_normalised_scores_are_deviations_from_the_mean_and_calls_change_nothing():
    normalised, images = Normalised(wavy), pictures()
    normalised.observe(torch.tensor([1.0, 3.0, 8.0]))
    before = normalised.state()
    deviation = np.std([1, 3, 8])
    together = normalised(images, prompts_for(images))
    torch.testing.assert_close(together, (wavy(images, prompts_for(images)) - 4) / deviation)
    assert torch.equal(together[1:2], normalised(images[1:2], ["a cat"]))
    assert normalised.state() == before
    assert_gradient_is_that_of_finite_differences(lambda x: normalised(x, prompts_for(x)), images)


def test_scores_that_are_all_equal_have_deviation_one():
    normalised = Normalised(wavy)
    assert normalised.normalise(torch.tensor([2.0])).tolist() == [2.0]
    for _ in range(3):
        normalised.observe(torch.full((4,), 20.1))
    assert normalised.deviation == 1.0
    normalised.observe(torch.tensor([20.1, 20.100001], dtype=torch.float64))  # single precision would not tell
    assert normalised.deviation == 1.0 and normalised.variance > 0
    normalised.observe(torch.tensor([20.1, 20.2]))
    assert normalised.deviation < 0.1
    with pytest.raises(ValueError, match="decay=1 needs 0 <= decay < 1"):
        Normalised(wavy, decay=1)


def test_a_normalised_reward_trains_the_same_whatever_its_scale():
    def run(scale):
        def scaled(images, prompts):
            return scale * redness(images, prompts) + 5 * scale

        reward = WeightedSum({"a": Normalised(scaled), "b": Normalised(brightness)}, {"a": 1.0, "b": -1.0})
        made = test_trainer.trainer(reward=reward, dtype=torch.float64, dropout=0.0)
        return made, [made.train_step() for _ in range(3)]

    (one, _), (other, lines) = run(1.0), run(1000.0)
    change = torch.cat([(one.parameters[n] - other.parameters[n]).flatten() for n in one.parameters]).abs().max()
    assert change < 1e-5
    assert max(line["grad_norm"] for line in lines) > 1e-3
    assert 4000 < lines[0]["rewards"]["a"] < 6000  # shown in its own unit
    assert lines[0]["reward"] == pytest.approx(lines[0]["rewards"]["a"] - lines[0]["rewards"]["b"], rel=1e-6)
    assert abs(lines[0]["objective"]) < 5


def test_training_observes_each_step_once_and_the_base_model_before(monkeypatch):
    seen, observe = [], Normalised.observe
    monkeypatch.setattr(Normalised, "observe", lambda self, scores: (seen.append(scores), observe(self, scores))[1])
    run = test_trainer.trainer(reward=Normalised(redness), dropout=0.0)
    lines = [run.train_step() for _ in range(3)]
    assert [len(scores) for scores in seen] == [4, 4, 4, 4]
    torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=0)  # the same pictures before and in the first step
    assert [scores.mean().item() for scores in seen[1:]] == [line["reward"] for line in lines]
    assert lines[0]["objective"] == pytest.approx(0, abs=1e-3)


def test_a_reward_that_is_not_finite_before_the_first_step_stops_the_run():
    run = test_trainer.trainer(reward=Normalised(lambda images, prompts: redness(images, prompts) * math.nan))
    with pytest.raises(test_trainer.TrainingStopped, match="step 1: reward '<lambda>' is not finite"):
        run.train_step()
    assert run.objective.needs_statistics


# Views


ROWS, COLUMNS = (torch.arange(float(length), dtype=torch.float64) for length in (24, 30))


def windows(seeds, **settings):
    """What augmented rewards see of a picture whose channels are the numbers of its columns, its rows, and grey."""
    picture = torch.stack([COLUMNS.expand(24, 30), ROWS[:, None].expand(24, 30), torch.full((24, 30), 0.5)])
    augmented = Augmented(wavy, views=1, **settings)
    augmented.seeds = seeds
    return augmented.views(picture.expand(len(seeds), 3, 24, 30))[0]


def test_shifts_are_whole_pixels_of_all_sizes_up_to_the_largest():
    views = windows(range(300), shift=2, crop=0.0, noise=0.0)
    shifts = views[:, :2, 12, 12] - 12
    assert {tuple(shift) for shift in shifts.tolist()} == {(x, y) for x in range(-2, 3) for y in range(-2, 3)}
    for view, (x, y) in zip(views, shifts, strict=True):
        assert torch.equal(view[0], (COLUMNS + x).clamp(0, 29).expand(24, 30))
        assert torch.equal(view[1], (ROWS + y).clamp(0, 23)[:, None].expand(24, 30))


def test_crops_are_windows_inside_the_picture_that_are_enlarged_to_it():
    views = windows(range(300), shift=0, crop=0.25, noise=0.0)
    inner = views[:, :2, 6:18, 6:24]
    across, down = inner[:, 0].diff(dim=2), inner[:, 1].diff(dim=1)
    scale = across[:, :1, :1]
    torch.testing.assert_close(across, scale.expand_as(across))  # even,
    torch.testing.assert_close(down, scale.expand_as(down))  # and the same for rows and columns
    assert 0.75 <= scale.min() < 0.76 and 0.99 < scale.max() <= 1
    for axis, length in ((0, 30), (1, 24)):
        begin = inner[:, axis, 0, 0] - 6.5 * scale.flatten() + 0.5  # the edges of the window
        end = begin + length * scale.flatten()
        assert begin.min() >= -1e-9 and end.max() <= length + 1e-9
        assert begin.max() > 0.16 * length and end.min() < 0.84 * length  # the most there can be is a quarter


def test_windows_are_those_of_grid_sample():
    images = pictures(3, 16)
    cut = torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64)
    top, left = torch.tensor([[2.0, 0.3, 7.5], [-1.0, 1.1, 0.0]], dtype=torch.float64)
    ours = window_matrix(16, cut, top)[:, None] @ images @ window_matrix(16, cut, left)[:, None].mT
    # Its coordinates are from -1 to 1, from edge to edge.
    centre = [2 * (start + 8 * (1 - cut)) / 16 - 1 for start in (left, top)]
    zero = torch.zeros_like(cut)
    theta = torch.stack([torch.stack([1 - cut, zero, centre[0]], 1), torch.stack([zero, 1 - cut, centre[1]], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    expected = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


def test_noise_has_its_deviation_and_leaves_white_with_a_gradient():
    augmented = Augmented(wavy, views=3, shift=0, crop=0.0, noise=0.05)
    grey = torch.full((2, 3, 64, 64), 0.5)
    views = augmented.views(grey)
    assert all((view - grey).std().item() == pytest.approx(0.05, rel=0.03) for view in views)
    assert not torch.equal(views[0], views[1]) and not torch.equal(views[0][0], views[0][1])
    white = torch.ones(1, 3, 8, 8, requires_grad=True)
    view = augmented.views(white)[0]
    assert view.max() <= 1 and view.min() < 1
    assert torch.equal(torch.autograd.grad(view.sum(), white)[0], torch.ones_like(white))


def test_an_augmented_score_is_the_mean_over_views_and_its_gradient_that_of_finite_differences():
    augmented, images = Augmented(wavy, views=3), pictures()
    expected = torch.stack([wavy(view, prompts_for(images)) for view in augmented.views(images)]).mean(0)
    assert torch.equal(augmented(images, prompts_for(images)), expected)
    assert (expected - wavy(images, prompts_for(images))).abs().min() > 1e-3
    assert_gradient_is_that_of_finite_differences(lambda x: augmented(x, prompts_for(x)), images)


def test_views_depend_on_the_pictures_seed_alone():
    augmented, images = Augmented(wavy), pictures()
    state = torch.get_rng_state()
    scores = {}
    for seeds in ([5, 6, 7], [5, 8, 9]):
        with WeightedSum({"a": augmented}, {"a": 1.0}).views_of(seeds):
            scores[tuple(seeds)] = augmented(images, prompts_for(images))
            again = augmented(images, prompts_for(images))
        assert torch.equal(again, scores[tuple(seeds)])
    assert augmented.seeds is None
    assert torch.equal(torch.get_rng_state(), state)
    first, second = scores.values()
    assert first[0] == second[0] and first[1] != second[1]
    augmented.seeds = [6]
    assert torch.equal(augmented(images[1:2], ["a cat"]), first[1:2])


def test_frames_of_a_video_have_one_window_and_noise_each():
    video = pictures(2, 16)[:, None].expand(2, 4, 3, 16, 16)
    seen = []
    reward = Augmented(OnFrames(lambda images, prompts: (seen.append(images), wavy(images, prompts))[1]), views=1)
    assert modality_of(reward) == "video"
    score(reward, video, ["a cat", "a dog"])
    frames = seen[0].unflatten(0, (2, 4))
    change = (frames[:, 1:] - frames[:, :1]).std((2, 3, 4))
    torch.testing.assert_close(change, torch.full_like(change, 0.02 * 2**0.5), rtol=0.2, atol=0)
    # A reward of pictures around which it is put without saying which frames: four, each with a window of its own.
    alone = Augmented(wavy, views=1)
    alone.seeds = [3, 4]
    both = score(alone, video, ["a cat", "a dog"])
    alone.seeds = [4]
    assert torch.equal(score(alone, video[1:], ["a dog"]), both[1:])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"views": 0}, "views=0 needs 1 <= views"),
        ({"shift": -1}, "shift=-1 needs 0 <= shift."),
        ({"crop": 0.6}, "crop=0.6 needs 0 <= crop <= 0.5"),
        ({"noise": 2}, "noise=2 needs 0 <= noise <= 1"),
        ({"shift": 0, "crop": 0, "noise": 0}, "change nothing"),
    ],
)
def test_views_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmented(wavy, **settings)


def test_sound_has_no_views_and_other_wrappers_pass_on_what_a_reward_is():
    def loudness(waveforms, prompts):
        return waveforms.square().mean((1, 2))

    loudness.modality = "audio"
    with pytest.raises(ValueError, match="a reward of sound"):
        Augmented(loudness)
    loudness.differentiable = False
    for wrapper in (Checkpointed, Normalised, lambda reward: Clamped(reward, 9.0)):
        assert not is_differentiable(wrapper(loudness)) and is_differentiable(wrapper(wavy))
        assert modality_of(wrapper(loudness)) == "audio"
        torch.testing.assert_close(score(wrapper(loudness), torch.ones(2, 1, 5), ["", ""]), torch.ones(2))


def test_the_settings_of_views_are_their_own_defaults():
    own = {name: parameter.default for name, parameter in inspect.signature(Augmented).parameters.items()}
    assert Augmentation().model_dump() == {name: own[name] for name in own if name != "reward"}


# Checkpointing


class Deep(torch.nn.Module):
    """A reward whose activations weigh more than its pictures."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(8))
        self.calls = 0

    def forward(self, images, prompts):
        self.calls += 1
        values = images.repeat(1, 6, 1, 1)[:, :16]
        for layer in self.layers:
            values = torch.tanh(layer(values))
        return values.mean((1, 2, 3))


def test_a_checkpointed_reward_gives_the_same_for_less_memory():
    reward, gradients, peaks = Deep().requires_grad_(False), [], []
    for wrapped in (reward, Checkpointed(reward)):
        images = pictures(2, 32, torch.float32).requires_grad_()
        augmented = Augmented(wrapped, views=4)
        reward.calls = 0
        peaks.append(peak_bytes(lambda a=augmented, i=images: a(i, ["", ""]).sum().backward(), torch.device("cpu")))
        gradients.append(images.grad)
        assert reward.calls == (4 if wrapped is reward else 8)
    assert torch.equal(*gradients)
    assert peaks[1] < 0.5 * peaks[0]


@pytest.mark.parametrize("name", [name for name, card in REWARDS.items() if not card.downloads and card.differentiable])
def test_every_named_reward_can_be_checkpointed(name):
    reward, gradients = load_reward(name), []
    for wrapped in (Checkpointed(reward), reward):  # the first call fills what a reward keeps of prompts
        images = pictures(2, 64, torch.float32).requires_grad_()
        scores = wrapped(images, ["a cat", "a dog"])
        check_scores(scores, images, name)
        scores.sum().backward()
        gradients.append((scores.detach(), images.grad))
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


# Per prompt


def test_each_prompt_has_its_own_reward():
    calls = []

    def spied(images, prompts):
        calls.append(list(prompts))
        return wavy(images, prompts)

    reward = PerPrompt({"a cat": spied, "a dog": redness, "an ox": spied}, default=brightness)
    images, prompts = pictures(5), ["a dog", "a cat", "a bee", "an ox", "a dog"]
    expected = [redness, wavy, brightness, wavy, redness]
    scores = reward(images, prompts)
    alone = [own(images[i : i + 1], [prompts[i]]) for i, own in enumerate(expected)]
    assert torch.equal(scores, torch.cat(alone))
    assert calls == [["a cat", "an ox"]]
    assert_gradient_is_that_of_finite_differences(lambda x: reward(x, prompts), images)
    check_scores(reward(images.requires_grad_(), prompts), images, "own", prompts)


def test_prompts_without_a_reward_and_mixed_modalities_are_refused():
    with pytest.raises(ValueError, match="prompt 'a dog' has no reward of its own"):
        PerPrompt({"a cat": redness})(pictures(2), ["a cat", "a dog"])
    with pytest.raises(ValueError, match="score image and video"):
        PerPrompt({"a cat": redness, "a dog": OnFrames(redness)})
    with pytest.raises(ValueError, match="score nothing"):
        PerPrompt({})
    with pytest.raises(ValueError, match=r"the reward of prompt 'a cat' returned shape \(\)"):
        PerPrompt({"a cat": lambda images, prompts: images.mean()})(pictures(1), ["a cat"])
    assert modality_of(PerPrompt({"a cat": OnFrames(redness)})) == "video"


def test_lines_of_a_file_choose_rewards(tmp_path):
    file = tmp_path / "own.jsonl"
    rows = [
        {"prompt": "a cat"},
        {"prompt": "a dog", "reward": "redness"},
        {"prompt": "a hen", "arguments": {"quality": 50}},
        {"prompt": "an ox", "reward": "jpeg-compressibility", "arguments": {"quality": 20}},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    prompts = load_prompts(str(file), ["a bee"])
    assert prompts.choices == {
        "a dog": Choice("redness", {}, ""),
        "a hen": Choice(None, {"quality": 50}, ""),
        "an ox": Choice("jpeg-compressibility", {"quality": 20}, ""),
    }
    assert prompts.choices["an ox"].place == f"prompts={str(file)!r}, line 4"
    everything = (*prompts.train, *prompts.unseen)
    reward = load_per_prompt("jpeg-incompressibility", {"quality": 75}, everything, prompts.choices)
    expected = {
        "a cat": load_reward("jpeg-incompressibility", quality=75),
        "a dog": redness,
        "a hen": load_reward("jpeg-incompressibility", quality=50),
        "an ox": load_reward("jpeg-compressibility", quality=20),
        "a bee": load_reward("jpeg-incompressibility", quality=75),
    }
    images = pictures(5, 16)
    alone = [own(images[i : i + 1], [prompt]) for i, (prompt, own) in enumerate(expected.items())]
    assert torch.equal(reward(images, list(expected)), torch.cat(alone))
    with pytest.raises(ValueError, match=r"own.jsonl', line 3: quality=500 needs"):
        bad = {"a hen": Choice(None, {"quality": 500}, prompts.choices["a hen"].place)}
        load_per_prompt("jpeg-incompressibility", {}, ["a hen"], bad)


def test_a_reward_that_no_line_is_left_for_is_not_loaded():
    choices = {"a cat": Choice("redness", {}, "here")}
    assert load_per_prompt("no_such_module:f", {}, ["a cat"], choices).default is None
    with pytest.raises(ValueError, match="no_such_module"):
        load_per_prompt("no_such_module:f", {}, ["a cat", "a dog"], choices)


def test_rewards_of_one_checkpoint_share_its_weights(tmp_path):
    test_vision_rewards.owl_folder(tmp_path, "owlv2")
    choices = {
        "a cat": Choice(None, {"contains": "a cat"}, ""),
        "a dog": Choice(None, {"contains": "a red car"}, ""),
        "a hen": Choice(None, {"contains": "a red car"}, ""),
    }
    reward = load_per_prompt("objects", {"model": str(tmp_path)}, list(choices), choices)
    cat, dog, hen = reward.by_prompt.values()
    assert dog is hen and cat is not dog
    assert cat.detector.model is dog.detector.model
    assert (cat.contains, dog.contains) == ("a cat", "a red car")
    assert load_reward("objects", model=str(tmp_path)).detector.model is not cat.detector.model
    images = pictures(2, 64, torch.float32)
    separate = [load_reward("objects", model=str(tmp_path), contains=text) for text in ("a cat", "a red car")]
    alone = [own(images[i : i + 1], [""]) for i, own in enumerate(separate)]
    assert torch.equal(reward(images, ["a cat", "a dog"]), torch.cat(alone))


# Sums


def test_a_sum_optimises_what_is_wrapped_and_shows_the_rewards_own_scores():
    images = pictures()
    normalised = Normalised(Clamped(Augmented(Checkpointed(wavy)), above=0.1))
    normalised.observe(torch.tensor([0.0, 0.4]))
    total = WeightedSum({"w": normalised, "r": redness}, {"w": 3.0, "r": -1.0})
    assert total.rewards == {"w": wavy, "r": redness}
    parts = total.components(images, prompts_for(images))
    assert torch.equal(parts["w"], Augmented(wavy)(images, prompts_for(images)))
    expected = 3 * (parts["w"].clamp(max=0.1) - 0.2) / 0.2 - redness(images, [])
    torch.testing.assert_close(total(images, prompts_for(images)), expected)
    torch.testing.assert_close(total.add_up(parts), 3 * parts["w"] - redness(images, []))
    assert list(as_weighted_sum(normalised).weights) == ["wavy"]


def test_wrappers_in_another_order_are_refused():
    for wrong in (
        Clamped(Normalised(wavy), 1.0),
        Augmented(Clamped(wavy, 1.0)),
        Checkpointed(Normalised(wavy)),
        PerPrompt({"a cat": Augmented(wavy)}),
    ):
        with pytest.raises(ValueError, match=r"reward 'w' has .* the order is Normalised\(Clamped\(Augmented"):
            WeightedSum({"w": wrong}, {"w": 1.0})


def test_modules_in_wrappers_are_frozen_and_move():
    deep = Deep()
    total = WeightedSum(
        {"d": Normalised(Checkpointed(deep)), "p": PerPrompt({"": deep})}, {"d": 1.0, "p": 1.0}
    ).double()
    assert {p.dtype for p in deep.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in total.parameters()) and not deep.training


def test_the_best_adapter_is_chosen_by_what_is_optimised_in_a_unit_that_stays():
    objective = WeightedSum({"a": Normalised(Clamped(wavy, 7.0)), "b": redness}, {"a": 2.0, "b": -1.0})
    scores = {"a": torch.tensor([[5.0, 8.0]]), "b": torch.tensor([[0.1, 0.2]])}
    first = {"a": {"std": 0.5}, "b": {"std": 99.0}}
    torch.testing.assert_close(optimised(objective, scores, first), torch.tensor([[19.9, 27.8]]))
    objective.observe({"a": torch.tensor([100.0, 200.0])})
    torch.testing.assert_close(optimised(objective, scores, first), torch.tensor([[19.9, 27.8]]))


def test_later_evaluations_are_in_the_unit_of_the_first():
    objective = WeightedSum({"a": Normalised(wavy)}, {"a": 1.0})
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    narrow, wide = (Evaluated(("p", "q"), torch.zeros(2, 2, 3, 4, 4), {"a": scores * scale}) for scale in (1.0, 10.0))
    first = summaries({"unseen": narrow}, {"unseen": narrow}, objective, None)
    later = summaries({"unseen": wide}, {"unseen": narrow}, objective, first)
    unit = first["unseen"]["rewards"]["a"]["std"]
    assert first["unseen"]["objective"]["mean"] == pytest.approx(2.5 / unit)
    assert later["unseen"]["objective"]["mean"] == pytest.approx(25 / unit)


def test_an_adapter_is_kept_for_what_is_optimised_and_not_for_the_sum_of_the_scores(tmp_path):
    """The weight of a reward that is above its target all the time decides nothing."""
    reward = WeightedSum({"red": Clamped(redness, -0.5), "bright": brightness}, {"red": 1000.0, "bright": 1.0})
    fast = test_trainer.Optimizer(learning_rate=3e-2)
    settings = {"call": tiny.CALL, "dropout": 0.0, "optimizer": fast}
    callbacks = test_trainer.callbacks(tmp_path, guard=Guard(judge_weight=0.0, max_gain=None))
    run = test_trainer.trainer(reward=reward, callbacks=callbacks, **settings)
    run.train()
    lines = RunFolder(tmp_path).evaluations.read()
    measured = [line["sets"]["unseen"] for line in lines]
    objective = [line["objective"]["mean"] for line in measured]
    assert objective == pytest.approx([line["rewards"]["bright"]["mean"] - 500 for line in measured], abs=1e-3)
    assert [line["kept"] for line in lines] == [
        value > max(objective[:i], default=-999) for i, value in enumerate(objective)
    ]
    sums = [line["reward"]["mean"] for line in measured]
    assert [line["kept"] for line in lines] != [value > max(sums[:i], default=-999) for i, value in enumerate(sums)]


# Training


def everything():
    """Two rewards with all that can be put around them."""
    red = Normalised(Clamped(Augmented(Checkpointed(redness), views=2), above=-0.0455))
    return WeightedSum({"red": red, "bright": Normalised(Augmented(brightness, views=2))}, {"red": 1.0, "bright": -0.5})


def test_a_resumed_run_with_all_of_it_is_the_run_that_never_stopped(tmp_path):
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    straight = test_trainer.trainer(reward=everything(), callbacks=test_trainer.callbacks(whole.path))
    straight.train()
    first = test_trainer.trainer(reward=everything(), callbacks=test_trainer.callbacks(parts.path))
    first.steps = 3  # as if killed one step after the checkpoint
    first.train()
    second = test_trainer.trainer(reward=everything(), callbacks=test_trainer.callbacks(parts.path))
    load_checkpoint(second, parts.checkpoints / "step-000002")
    assert second.objective.state()["red"]["num_updates"] == 3  # the base model's, and two steps
    second.train()
    assert all(torch.equal(value, second.parameters[name]) for name, value in straight.parameters.items())
    assert straight.objective.state() == second.objective.state()
    lines = test_trainer.without_timings(whole.metrics.read())
    assert lines == test_trainer.without_timings(parts.metrics.read())
    assert len({line["clamped"]["red"] for line in lines}) > 1  # the target is in reach
    final = [line["step"] for line in whole.evaluations.read()]
    assert test_trainer.without_timings(whole.evaluations.read()) == test_trainer.without_timings(
        line for line in parts.evaluations.read() if line["step"] in final
    )


def test_the_comparison_above_can_fail():
    """A resume without the statistics, or with other views, goes elsewhere."""
    run = test_trainer.trainer(reward=everything())
    run.train_step()
    state = run.state()
    again, without = (test_trainer.trainer(reward=everything()) for _ in range(2))
    again.load_state(state)
    without.load_state({**state, "rewards": {"red": {"mean": 0.0, "variance": 9.0, "num_updates": 1}}})
    old = test_trainer.trainer(reward=everything())
    old.load_state({name: value for name, value in state.items() if name != "rewards"})
    assert old.objective.needs_statistics  # a checkpoint of before: they begin anew
    lines = [each.train_step() for each in (run, again, without)]
    assert lines[0]["objective"] == lines[1]["objective"] != lines[2]["objective"]


def test_views_differ_from_step_to_step_and_with_the_seed(monkeypatch):
    drawn, forward = [], Augmented.forward
    monkeypatch.setattr(
        Augmented, "forward", lambda self, *arguments: (drawn.extend(self.seeds), forward(self, *arguments))[1]
    )
    for seed in (0, 1):
        run = test_trainer.trainer(reward=Augmented(redness, views=1), seed=seed)
        run.train_step(), run.train_step()
    assert len(drawn) == len(set(drawn)) == 16


def test_evaluation_measures_the_plain_rewards(tmp_path):
    run = test_trainer.trainer(reward=everything(), callbacks=test_trainer.callbacks(tmp_path / "a"), steps=1)
    sums = WeightedSum({"red": redness, "bright": brightness}, {"red": 1.0, "bright": -0.5})
    plain = test_trainer.trainer(reward=sums, callbacks=test_trainer.callbacks(tmp_path / "b"), steps=1)
    run.train(), plain.train()
    ours, theirs = (RunFolder(tmp_path / name).evaluations.read()[0] for name in "ab")
    for name, measured in ours["sets"].items():
        objective = measured.pop("objective")
        assert measured == theirs["sets"][name]
        assert objective["mean"] != pytest.approx(measured["reward"]["mean"], rel=0.01)


def make_for_ranks(batch_size):
    return test_trainer.trainer(
        reward=everything(),
        dtype=torch.float64,
        dropout=0.0,
        call={**tiny.CALL, "guidance_scale": 1.0},
        batch_size=batch_size,
        accumulation=1,
        estimator=AlignProp(Last(2)),
    )


def rank(folder):
    """One of two processes: two steps, and what became of the adapter and the statistics."""
    torch.set_num_threads(1)
    run = make_for_ranks(1)
    run.train_step(), run.train_step()
    result = {"weights": test_trainer.weights(run), "statistics": run.objective.state()}
    torch.save(result, folder / f"{distributed.process().process_index}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_statistics_and_views_of_one_with_twice_the_batch(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{i}.pt") for i in (0, 1))
    alone = make_for_ranks(2)
    alone.train_step(), alone.train_step()
    assert first["statistics"] == second["statistics"]
    for name, statistics in alone.objective.state().items():
        assert first["statistics"][name] == pytest.approx(statistics, rel=1e-9)
    for name, value in alone.parameters.items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value.detach(), atol=1e-9, rtol=0)


# Recipes

ALL = {
    "weight": 1.0,
    "clamp_above": 0.1,
    "normalise": True,
    "augment": {"views": 2, "shift": 1, "crop": 0.1, "noise": 0.02},
    "checkpoint": True,
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A function that writes a recipe for a tiny pipeline; the working directory is ours."""
    monkeypatch.chdir(tmp_path)
    tiny.stable_diffusion().save_pretrained(tmp_path / "model")

    def write(prompts, **rewards):
        settings = {
            "model": {"name": str(tmp_path / "model")},
            "sampling": {"num_inference_steps": 3, "guidance_scale": 3.0},
            "estimator": {"truncation": {"kind": "last", "steps": 1}},
            "rewards": rewards,
            "prompts": prompts,
            "optimizer": {"learning_rate": 0.02},
            "training": {"steps": 4, "batch_size": 2},
            "evaluation": {"every": 2, "images_per_prompt": 2, "num_train_prompts": 9, "seed": 0},
            "checkpoints": {"every": 2},
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(settings))
        return "recipe.yaml"

    return write


def run(*arguments):
    from alignprop.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result


def test_a_recipe_trains_resumes_and_evaluates_with_all_of_it(recipe):
    written = recipe({"train": ["a cat", "a dog"]}, redness=ALL, brightness={"weight": -0.5, "augment": True})
    run("train", written, "--output", "whole")
    run("train", written, "--output", "parts", "--set", "training.steps=2")
    run("train", "--resume", "parts", "--set", "training.steps=4", "--no-probe")
    whole, parts = RunFolder(Path("whole")), RunFolder(Path("parts"))
    lines = whole.metrics.read()
    assert test_trainer.without_timings(lines) == test_trainer.without_timings(parts.metrics.read())
    assert test_trainer.without_timings(whole.evaluations.read()) == test_trainer.without_timings(
        parts.evaluations.read()
    )
    assert all(set(line["clamped"]) == {"redness"} and math.isfinite(line["objective"]) for line in lines)
    base = whole.evaluations.read()[0]["sets"]["train"]["rewards"]
    measured = json.loads(run("evaluate", "whole", "--images-per-prompt", 2, "--json").stdout)["train"]["base"]
    for name, numbers in base.items():
        assert measured["rewards"][name]["mean"] == pytest.approx(numbers["mean"], abs=1e-6)


def test_settings_become_wrappers(recipe):
    from alignprop.config import build

    objective = build(load_config(recipe({"train": ["a cat"]}, redness=ALL, brightness=-0.5)), Path("a")).objective
    assert objective.rewards == {"redness": redness, "brightness": brightness}
    assert objective.weights == {"redness": 1.0, "brightness": -0.5}
    assert list(objective.normalised) == ["redness"] and objective.clamped["redness"].above == 0.1
    augmented = objective.clamped["redness"].reward
    given = {"views": augmented.num_views, **{name: getattr(augmented, name) for name in ("shift", "crop", "noise")}}
    assert given == ALL["augment"]
    assert isinstance(augmented.reward, Checkpointed) and augmented.reward.reward is redness


def test_a_recipe_trains_a_reward_per_prompt(recipe):
    Path("own.jsonl").write_text(
        '{"prompt": "a cat", "arguments": {"quality": 30}}\n{"prompt": "a dog", "reward": "redness"}\n'
        '{"prompt": "a hen"}\n'
    )
    reward = {"arguments": {"quality": 80}, "per_prompt": True, "normalise": True}
    written = recipe({"train": "own.jsonl"}, **{"jpeg-incompressibility": reward})
    run("train", written, "--output", "a", "--set", "training.steps=2")
    base = RunFolder(Path("a")).evaluations.read()[0]["sets"]["train"]["rewards"]["jpeg-incompressibility"]["mean"]
    low, high = (
        json.loads(run("evaluate", "a", "--json", "--images-per-prompt", 2).stdout)["train"]["base"]["rewards"][
            "jpeg-incompressibility"
        ]["mean"]
        for _ in range(2)
    )
    assert low == high == pytest.approx(base, abs=1e-6)

    from alignprop.config import build
    from alignprop.measures import evaluate

    trainer = build(load_config(written), Path("b"))
    rewards = {
        "a cat": load_reward("jpeg-incompressibility", quality=30),
        "a dog": redness,
        "a hen": load_reward("jpeg-incompressibility", quality=80),
    }
    by_hand = evaluate(trainer.sampler, list(rewards), {"x": PerPrompt(rewards)}, images_per_prompt=2, seed=0)
    separate = torch.stack([own(by_hand.images[i], [p] * 2) for i, (p, own) in enumerate(rewards.items())])
    assert separate.mean().item() == pytest.approx(base, abs=1e-5)


def problems(*overrides):
    with pytest.raises(ConfigError) as error:
        load_config("emoji-redness", overrides)
    return error.value.problems


MESSAGES = {
    "rewards.redness.clamp_above=high": "rewards.redness.clamp_above=high needs a number.",
    "rewards.redness.clamp_abov=1": "rewards.redness.clamp_abov is no setting; did you mean rewards.<name>.cl",
    "rewards.redness={weight: -1, clamp_above: 2}": "redness.clamp_above=2 needs a weight above 0, and it is -1",
    "rewards.redness.augment={views: 0}": "rewards.redness.augment.views=0 needs at least 1.",
    "rewards.redness.augment={shift: -1}": "rewards.redness.augment.shift=-1 needs at least 0.",
    "rewards.redness.augment={shift: 1.5}": "rewards.redness.augment.shift=1.5 needs a whole number.",
    "rewards.redness.augment={crop: 0.9}": "rewards.redness.augment.crop=0.9 needs at most 0.5.",
    "rewards.redness.augment={noise: 2}": "rewards.redness.augment.noise=2 needs at most 1.0.",
    "rewards.redness.augment={noize: 2}": "augment.noize is no setting; did you mean rewards.<name>.augment.noise?",
    "rewards.redness.augment=3": "rewards.redness.augment=3 needs a mapping of settings.",
    "rewards.redness.augment={shift: 0, crop: 0, noise: 0}": "rewards.redness.augment has shift=0, crop=0 and noise=0",
    "rewards.redness.normalise=maybe": "rewards.redness.normalise=maybe needs true or false",
    "rewards.redness.checkpoint=3": "rewards.redness.checkpoint=3 needs true or false",
    "judges={brightness: {clamp_above: 1}}": "judges.brightness.clamp_above is no setting",
    "rewards.redness.per_prompt=true": "rewards.redness.per_prompt=true needs a JSONL prompt file with",
}


@pytest.mark.parametrize("override", MESSAGES)
def test_every_error_names_the_setting_the_value_and_the_remedy(override):
    told = problems(override)
    assert len(told) == 1
    assert MESSAGES[override] in told[0]


LINES = {
    '"reward": "rednes"': "reward=rednes is unknown; did you mean 'redness'?",
    '"reward": "xyz"': "reward=xyz is unknown; see `alignprop rewards`",
    '"reward": 3.5': "reward=3.5 needs the name of a reward",
    '"arguments": "a hat"': "arguments='a hat' needs an object",
    '"arguments": {"qualty": 3}': "reward=jpeg-compressibility takes no argument 'qualty'; did you mean 'quality'?",
    '"reward": "redness", "arguments": {"contains": "x"}': "reward=redness takes no argument 'contains'; leave it out.",
    '"reward": "objects", "arguments": {"colour": 3}': "'colour'; its arguments are model, contains, count",
    '"reward": "image-classifier"': "reward=image-classifier needs model, label; give them as arguments.",
}


@pytest.mark.parametrize("fields", LINES)
def test_a_line_that_cannot_be_used_is_named(fields, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "a cat", "arguments": {"quality": 5}}\n{"prompt": "a dog", ' + fields + "}\n")
    settings = ["rewards={jpeg-compressibility: {per_prompt: true}}", f"prompts.train={file}", "prompts.unseen=null"]
    (told,) = problems(*settings)
    assert f"prompts.train={str(file)!r}, line 2: " in told and LINES[fields] in told


def test_choices_that_no_reward_takes_or_several_are_refused(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "a cat"}\n{"prompt": "a dog", "reward": "my_module:reward"}\n')
    (told,) = problems(f"prompts.unseen={file}")
    assert f"prompts.unseen={str(file)!r}, line 2: a reward or its arguments are chosen, and no reward" in told
    (told,) = problems(
        f"prompts.unseen={file}", "rewards.redness.per_prompt=true", "judges={brightness: {per_prompt: true}}"
    )
    assert told.startswith("judges.brightness and rewards.redness both have per_prompt=true")
    assert load_config("emoji-redness", [f"prompts.unseen={file}", "rewards.redness.per_prompt=true"])


@pytest.mark.parametrize("second", ["", ', "reward": "brightness"'])
def test_two_rewards_for_one_prompt_are_refused(second, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "a cat", "reward": "redness"}\n' * 2 + '{"prompt": "a cat"' + second + "}\n")
    with pytest.raises(ValueError, match=r"line \d: prompt 'a cat' has another reward (elsewhere|in .*line 1)"):
        load_prompts(file)


def test_settings_are_saved_and_read_back_whole(tmp_path):
    config = load_config("emoji-redness", [f"rewards.redness={json.dumps(ALL)}", "rewards.brightness.augment=true"])
    assert config.rewards["brightness"].augment == Augmentation()
    assert config.rewards["redness"].model_dump() | ALL == config.rewards["redness"].model_dump()
    save(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert load_config("emoji-redness", ["rewards.redness.augment=false"]).rewards["redness"].augment is None


def test_prompts_without_choices_are_as_before():
    assert load_prompts(["a cat"]) == Prompts(("a cat",))


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
