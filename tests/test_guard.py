"""The guard: which adapter is kept, what is warned of, when a run is ended; and what it looks at."""

import math

import pytest
import torch
from rich.console import Console

import tiny
from alignprop.adapters import Lora
from alignprop.checkpointing import Checkpoints, list_checkpoints, load_checkpoint
from alignprop.config import Config, build
from alignprop.estimators import AlignProp
from alignprop.evaluation import Evaluation
from alignprop.guard import NO_GUARD, Guard
from alignprop.measures import Evaluated, diversity, evaluate, feature_diversity, saturated
from alignprop.progress import ProgressBar
from alignprop.report import summarise, write_report
from alignprop.report.watch import in_deviations, trained_curve, watch_of, worth_curve
from alignprop.rewards import Clamped, Normalised, WeightedSum
from alignprop.rollout import Sampler
from alignprop.runfolder import RunFolder, measured_alike
from alignprop.tracking import MetricsFile
from alignprop.trainer import Optimizer, Trainer
from alignprop.truncation import Last

TRAIN = ("a cat", "a dog", "a fox")


def score(mean, std=1.0):
    return {"mean": mean, "std": std, "sem": std / 4}


def line(step, reward, judge=5.0, other=0.0, *, sets=("unseen",), **pictures):
    """An evaluation: two judges of which one varies by 2 between pictures, and one by 0.1."""
    rewards = {"trained": score(reward), "judge": score(judge, 2.0), "other": score(other, 0.1)}
    measured = {"reward": score(reward), "rewards": rewards, "num_prompts": 8, "num_images": 32}
    pictures = {"diversity": 0.4, "feature_diversity": 0.3, "saturated": 0.1} | pictures
    return {"step": step, "trained": ["trained"], "sets": {name: measured | pictures for name in sets}}


def names(guard, first, other):
    return [alarm.measure for alarm in guard.alarms(first, other)]


@pytest.mark.parametrize(
    ("change", "alarms"),
    [
        ({}, []),
        ({"judge": 3.01}, []),  # a fall of just below one deviation of 2
        ({"judge": 2.99}, ["judge"]),
        ({"judge": 9.0}, []),
        ({"other": -0.11}, ["other"]),  # a deviation of 0.1: the judges' own units count
        ({"judge": 2.0, "other": -1.0}, ["judge", "other"]),
        ({"diversity": 0.21}, []),
        ({"diversity": 0.19}, ["diversity"]),
        ({"feature_diversity": 0.14}, ["feature_diversity"]),
        ({"saturated": 0.29}, []),
        ({"saturated": 0.31}, ["saturated"]),
        ({"saturated": 0.0}, []),
    ],
)
def test_alarms_begin_at_their_thresholds(change, alarms):
    guard = Guard(max_fall=1.0, min_diversity=0.5, max_saturated=0.2)
    assert names(guard, line(0, 1.0), line(1, 9.0, **change)) == alarms
    assert names(NO_GUARD, line(0, 1.0), line(1, 9.0, **change)) == []


def test_what_is_trained_is_no_judge_of_itself():
    assert names(Guard(max_fall=0.1), line(0, 5.0), line(1, 1.0)) == []


def test_unseen_prompts_decide_where_there_are_some():
    first, fallen = line(0, 1.0, sets=("train", "unseen")), line(1, 2.0, sets=("train", "unseen"))
    fallen["sets"]["train"] = line(1, 2.0, judge=-9.0)["sets"]["unseen"]
    assert names(Guard(), first, fallen) == []
    fallen["sets"]["unseen"] = fallen["sets"].pop("train")
    assert names(Guard(), first, fallen) == ["judge"]


def test_a_judge_that_never_varied_counts_in_its_own_unit():
    first = line(0, 1.0)
    first["sets"]["unseen"]["rewards"]["other"]["std"] = 0.0
    assert names(Guard(max_fall=1.0), first, line(1, 2.0, other=-0.9)) == []
    assert names(Guard(max_fall=1.0), first, line(1, 2.0, other=-1.1)) == ["other"]
    assert Guard(judge_weight=1.0).value(first, line(1, 1.0, other=-0.5)) == pytest.approx(-math.log(1.5) / 2)


def test_the_reason_has_the_numbers():
    (alarm,) = Guard().alarms(line(0, 1.0), line(1, 2.0, judge=0.0))
    assert alarm.reason == "judge fell by 2.5 deviations (5 → 0)"
    (alarm,) = Guard().alarms(line(0, 1.0), line(1, 2.0, diversity=0.02))
    assert alarm.reason == "diversity fell to 5% of the base's"
    (alarm,) = Guard().alarms(line(0, 1.0), line(1, 2.0, saturated=0.6))
    assert alarm.reason == "black and white values rose from 10% to 60%"


def test_what_an_adapter_is_worth_is_the_reward_and_the_judges_in_deviations():
    guard, first = Guard(judge_weight=0.6, max_gain=5.0), line(0, 1.0)
    assert guard.value(first, first) == 0
    assert guard.value(first, line(1, 3.0)) == pytest.approx(2.0)  # the reward's deviation is 1
    assert guard.value(first, line(1, 3.0, judge=3.0)) == pytest.approx(2.0 - 0.6 * math.log(2) / 2)  # the judge's is 2
    assert guard.value(first, line(1, 3.0, other=-0.4)) == pytest.approx(2.0 - 0.6 * math.log(5) / 2)  # the other's 0.1
    assert guard.value(first, line(1, 3.0, judge=7.0, other=-0.1)) == pytest.approx(2.0)  # one makes up for the other
    assert guard.value(first, line(1, 3.0, judge=11.0)) == pytest.approx(2.0 + 0.6 * math.log(4) / 2)
    assert guard.value(first, line(1, 99.0)) == 5.0
    assert Guard(max_gain=None).value(first, line(1, 99.0)) == pytest.approx(98.0)
    assert guard.value(first, line(1, 0.0)) == pytest.approx(-1.0)


def test_without_judges_the_reward_alone_counts():
    first, later = line(0, 1.0), line(1, 3.0)
    for each in (first, later):
        each["trained"] = ["trained", "judge", "other"]
    assert Guard().value(first, later) == pytest.approx(2.0)
    later["sets"]["unseen"]["reward"]["mean"] = 10.0
    assert Guard(max_gain=2.0).value(first, later) == pytest.approx(9.0)  # or the first one beyond 2 would be kept


@pytest.mark.parametrize("pictures", [{"diversity": 0.02}, {"feature_diversity": 0.02}, {"saturated": 0.6}])
def test_pictures_that_are_all_the_same_or_burnt_out_are_not_kept(pictures):
    first, later = line(0, 1.0), line(1, 3.0, **pictures)
    assert Guard().value(first, later) == -math.inf
    assert Guard(min_diversity=None, max_saturated=None).value(first, later) == pytest.approx(2.0)
    assert Guard(keep="reward").value(first, later) == 3.0


def test_measures_that_there_are_not_are_not_watched():
    """Sound is not saturated, and without a judge that embeds pictures there is no diversity of features."""
    lines = [line(0, 1.0), line(1, 3.0)]
    for each in lines:
        for name in ("diversity", "feature_diversity", "saturated"):
            del each["sets"]["unseen"][name]
    assert names(Guard(), *lines) == []
    assert Guard().value(*lines) == pytest.approx(2.0)


def test_an_evaluation_is_told_what_it_is_worth_where_that_is_what_counts():
    first, later = line(0, 1.0), line(1, 5.0, judge=0.0)
    alarms = ["judge fell by 2.5 deviations (5 → 0)"]
    assert Guard(judge_weight=0.6, max_gain=4.0).told(first, later) == {
        "worth": pytest.approx(4.0 - 0.6 * math.log(3.5) / 2),
        "alarms": alarms,
    }
    assert Guard(keep="reward").told(first, later) == {"worth": None, "alarms": alarms}


def test_a_judge_that_fell_is_weighed_and_bars_nothing():
    first, later = line(0, 1.0), line(1, 5.0, judge=0.0)
    assert names(Guard(), first, later) == ["judge"]
    assert Guard(judge_weight=0.6, max_gain=4.0).value(first, later) == pytest.approx(4.0 - 0.6 * math.log(3.5) / 2)
    assert [Guard(keep="reward").value(first, each) for each in (first, later)] == [1.0, 5.0]


def test_the_objective_counts_where_rewards_are_clamped_or_normalised():
    first, clamped = line(0, 1.0), line(1, 9.0)
    first["sets"]["unseen"]["objective"] = score(1.0, std=2.0)
    clamped["sets"]["unseen"]["objective"] = score(4.0)
    assert Guard().value(first, clamped) == pytest.approx(1.5)


LOST = {"other": -1.0}
WATCHFUL = {"judge_weight": 6 / math.log(11)}
"""Ten deviations of one of two judges, and the weight with which they cost three of the reward."""


@pytest.mark.parametrize(
    ("later", "ends"),
    [
        ([(2.0, LOST), (3.0, LOST)], True),  # worth -2 and -1, and the base model 0
        ([(2.0, LOST)], False),  # too few
        ([(2.0, LOST), (3.0, {})], False),  # the judge has recovered
        ([(2.0, {}), (3.0, LOST)], False),  # not in a row
        ([(3.0, {}), (2.0, LOST), (2.5, LOST)], False),  # the reward fell as well: there is nothing to be fooled by
        ([(3.0, {}), (3.5, LOST), (4.0, LOST)], True),
        ([(3.0, {}), (3.5, LOST), (4.0, {"other": -0.3})], False),  # worth 2, -0.5 and 1.3: a loss of 0.7
        ([(3.0, {}), (3.5, LOST), (4.0, {"other": -0.4})], True),  # and here of 1.0
        ([(2.0, LOST), (6.5, LOST)], False),  # the reward has gained as much as the judge has lost
        ([(2.0, {"diversity": 0.0}), (3.0, {"diversity": 0.0})], False),  # no judge fell
        ([(2.0, LOST), (3.0, {"judge": -19.0})], True),  # one judge or the other
        ([(2.0, LOST), (0.5, LOST)], False),
        ([(2.0, {"diversity": 0.0}), (3.0, LOST)], False),  # a judge in one of them alone
    ],
)
@pytest.mark.parametrize("keep", ["guarded", "reward"])
def test_a_run_ends_when_judges_lose_more_than_the_reward_gains(later, ends, keep):
    lines = [line(0, 1.0), *(line(step, reward, **change) for step, (reward, change) in enumerate(later, 1))]
    verdict = Guard(window=2, keep=keep, max_gain=None, max_loss=0.9, **WATCHFUL).verdict(lines)
    assert (verdict is not None) is ends
    assert Guard(window=None, keep=keep).verdict(lines) is None


def test_the_verdict_says_why():
    lines = [line(0, 1.0), line(1, 2.0, **LOST), line(2, 3.0, judge=4.0, **LOST)]
    assert Guard(window=2, max_loss=0.5, **WATCHFUL).verdict(lines) == (
        "the reward rises and judge fell by 0.5 deviations (5 → 4), other fell by 10.0 deviations (0 → -1), "
        "2 evaluations in a row"
    )
    lines = [line(0, 1.0), line(1, 2.0, **LOST), line(2, 3.0, judge=6.0, **LOST)]  # one has risen
    assert Guard(window=2, max_loss=0.3, **WATCHFUL).verdict(lines) == (
        "the reward rises and other fell by 10.0 deviations (0 → -1), 2 evaluations in a row"
    )


# What it looks at


def test_diversity_of_features_is_the_mean_cosine_distance_within_a_prompt():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(2, 3, 5, generator=generator), dim=-1)
    pairs = [(0, 1), (0, 2), (1, 2)]
    by_hand = [1 - torch.dot(features[n, i], features[n, j]).item() for n in range(2) for i, j in pairs]
    assert feature_diversity(features) == pytest.approx(sum(by_hand) / 6, abs=1e-6)
    assert feature_diversity(features[:, :1]) == 0
    assert feature_diversity(features[:, :1].expand(2, 4, 5)) == pytest.approx(0, abs=1e-6)


def test_diversity_does_not_count_a_picture_against_itself():
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])[None]
    assert diversity(images) == pytest.approx(1.0, abs=1e-9)


def test_saturated_values_are_those_that_a_file_holds_as_black_or_white():
    values = torch.tensor([0.0, 0.4, 1.0, 254.4, 254.6, 255.0, 128.0, 0.6]) / 255
    assert saturated(values.view(1, 1, 1, 2, 4)) == pytest.approx(4 / 8)


def test_distances_are_measured_picture_by_picture():
    base = Evaluated(
        ("a", "b"), torch.zeros(2, 2, 3, 4, 4), {"r": torch.zeros(2, 2)}, torch.eye(2)[None].repeat(2, 1, 1)
    )
    moved = base.images.clone()
    moved[0, 0] = 0.5
    moved[0, 1, :, :2] = 0.5  # half of the pixels, so that the root of their mean square is no mean
    turned = base.features.clone()
    turned[1, 1] = -turned[1, 1]
    found = Evaluated(base.prompts, moved, base.scores, turned).summary({"r": 1.0}, base)
    assert found["distance"] == pytest.approx((0.5 + 0.5**1.5) / 4)
    assert found["feature_distance"] == pytest.approx(2 / 4)
    assert base.compact().images.dtype == torch.float16
    itself = base.summary({"r": 1.0}, base.compact())
    assert (itself["distance"], itself["feature_distance"]) == (0.0, 0.0)


def test_waveforms_have_no_black_and_white():
    sound = Evaluated(("a",), torch.zeros(1, 2, 1, 16), {"r": torch.zeros(1, 2)})
    assert "saturated" not in sound.summary({"r": 1.0}, sound)


class Embeds:
    """Embeds a picture by the colours of its mean."""

    def __init__(self, turned=False):
        self.turned = turned

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))

    def features(self, images):
        features = torch.nn.functional.normalize(images.mean((2, 3)), dim=1)
        return -features if self.turned else features


def test_pictures_are_embedded_by_the_last_reward_that_can():
    sampler = Sampler(tiny.stable_diffusion(), tiny.CALL)
    rewards = {"first": Embeds(), "last": Embeds(turned=True), "plain": redness}
    result = evaluate(sampler, TRAIN, rewards, images_per_prompt=2, batch_size=4)
    expected = -torch.nn.functional.normalize(result.images.mean((3, 4)), dim=2)
    assert torch.allclose(result.features, expected, atol=1e-6)
    assert evaluate(sampler, TRAIN[:1], {"plain": redness}, images_per_prompt=1).features is None


# Runs


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def greenness(images, prompts):
    return images[:, 1].mean((1, 2))


def run_with(path, guard, *, steps=8, judges=None, reward=None, prompts=None):
    """A run whose reward rises at the cost of the judge: red pictures are not green."""
    judges = {"green": greenness, "embeds": Embeds()} if judges is None else judges
    folder = RunFolder(path)
    prompts = prompts or {"unseen": ("a bee", "an elk")}
    evaluation = Evaluation(folder, prompts, judges, every=1, images_per_prompt=2, guard=guard)
    return Trainer(
        tiny.stable_diffusion(),
        reward or redness,
        TRAIN,
        call=tiny.CALL,
        steps=steps,
        batch_size=2,
        lora=Lora(),
        optimizer=Optimizer(learning_rate=3e-2),
        estimator=AlignProp(Last(2)),
        callbacks=(evaluation, MetricsFile(folder), Checkpoints(folder, every=1, keep=99)),
    )


def lines_of(path):
    return RunFolder(path).evaluations.read()


def test_a_run_that_fools_its_reward_is_ended_and_keeps_what_was_sound(tmp_path):
    guard = Guard(max_fall=0.5, min_diversity=None, max_saturated=None, window=2)
    run = run_with(tmp_path, guard)
    run.train()
    lines = lines_of(tmp_path)
    worth = [guard.worth(lines[0], each) for each in lines]
    warned = [each["step"] for each in lines if each["alarms"]]
    kept = [each["step"] for each in lines if each["kept"]][-1]
    assert warned and lines[-1]["step"] == run.step < 8
    assert lines[-1]["stopped"] == run.stopped and "green fell" in run.stopped
    assert kept == worth.index(max(worth)) < warned[-1] and max(worth[-2:]) < worth[kept] - guard.max_loss
    assert lines[-1]["sets"]["unseen"]["reward"]["mean"] > lines[kept]["sets"]["unseen"]["reward"]["mean"]
    plain = tiny.stable_diffusion()
    if kept:
        plain.load_lora_weights(tmp_path / "adapter")
    again = evaluate(Sampler(plain, tiny.CALL), ("a bee", "an elk"), {"r": redness}, images_per_prompt=2, seed=1234)
    assert again.scores["r"].mean().item() == pytest.approx(lines[kept]["sets"]["unseen"]["reward"]["mean"], abs=1e-6)
    summary = summarise(tmp_path)
    assert summary.kept_step == kept and summary.steps == summary.planned_steps
    ended, higher = summary.guard_notes
    assert ended == f"The guard ended the run after step {run.step}: {run.stopped}."
    assert higher.startswith(f"The guard keeps {'the base model' if kept == 0 else f'step {kept}'}, and not step")


def test_what_a_checkpoint_has_as_the_best_is_the_adapter_that_is_kept(tmp_path):
    run = run_with(tmp_path, Guard(max_fall=0.5, min_diversity=None, max_saturated=None, window=2))
    run.train()
    kept = [each["step"] for each in lines_of(tmp_path) if each["kept"]][-1]
    assert kept < run.step
    then = run_with(tmp_path / "again", NO_GUARD, steps=kept)
    then.train()
    assert run.best.keys() == then.parameters.keys()
    assert all(torch.equal(value, run.best[name]) for name, value in then.parameters.items())


def test_of_evaluations_that_are_worth_the_same_the_first_is_kept(tmp_path):
    run = run_with(tmp_path, Guard(), steps=2, reward=lambda images, prompts: images.mean((1, 2, 3)) * 0.0)
    run.train()
    assert [each["kept"] for each in lines_of(tmp_path)] == [True, False, False]


def test_a_normalised_reward_is_evaluated_in_the_unit_of_the_base_model(tmp_path):
    reward = WeightedSum({"red": Normalised(redness)}, {"red": 1.0})
    run_with(tmp_path, NO_GUARD, steps=2, reward=reward).train()
    first, *later = (each["sets"]["unseen"] for each in lines_of(tmp_path))
    unit = first["rewards"]["red"]["std"]
    for each in later:
        assert each["rewards"]["red"]["std"] != pytest.approx(unit, rel=1e-3)
        assert each["objective"]["mean"] == pytest.approx(each["rewards"]["red"]["mean"] / unit)


def test_a_finished_run_that_is_resumed_is_not_evaluated_again(tmp_path):
    run_with(tmp_path, NO_GUARD, steps=2).train()
    before = lines_of(tmp_path)
    again = run_with(tmp_path, NO_GUARD, steps=2)
    load_checkpoint(again, list_checkpoints(tmp_path / "checkpoints")[-1])
    again.train()
    assert lines_of(tmp_path) == before


def test_without_a_guard_the_same_run_goes_to_its_end(tmp_path):
    run = run_with(tmp_path, NO_GUARD)
    run.train()
    lines = lines_of(tmp_path)
    assert run.step == 8 and not any(each["alarms"] for each in lines)
    assert lines[-1]["kept"] and summarise(tmp_path).guard_notes == ()


def test_a_guard_changes_nothing_that_is_trained(tmp_path):
    """The same adapters up to the step at which it ends the run."""
    guarded = run_with(tmp_path / "guarded", Guard(max_fall=0.5, window=2))
    guarded.train()
    plain = run_with(tmp_path / "plain", NO_GUARD, steps=guarded.step)
    plain.train()
    for name, value in guarded.parameters.items():
        assert torch.equal(value, plain.parameters[name]), name


def test_a_run_that_was_ended_stays_ended_unless_the_guard_lets_it_go_on(tmp_path):
    guard = Guard(max_fall=0.5, min_diversity=None, max_saturated=None, window=2)
    run = run_with(tmp_path, guard)
    run.train()
    again = run_with(tmp_path, guard)
    load_checkpoint(again, list_checkpoints(tmp_path / "checkpoints")[-1])
    again.train()
    assert again.step == run.step and again.stopped == run.stopped
    free = run_with(tmp_path, Guard(judge_weight=0.0, window=2))
    load_checkpoint(free, list_checkpoints(tmp_path / "checkpoints")[-1])
    free.train()
    assert free.step == 8 and free.stopped is None


def test_a_resumed_run_measures_the_distance_from_the_same_base(tmp_path):
    run_with(tmp_path / "whole", NO_GUARD, steps=4).train()
    run_with(tmp_path / "parts", NO_GUARD, steps=2).train()
    rest = run_with(tmp_path / "parts", NO_GUARD, steps=4)
    load_checkpoint(rest, list_checkpoints(tmp_path / "parts" / "checkpoints")[-1])
    rest.train()
    for whole, parts in zip(lines_of(tmp_path / "whole"), lines_of(tmp_path / "parts"), strict=True):
        for name in ("distance", "feature_distance", "feature_diversity", "saturated"):
            assert parts["sets"]["unseen"][name] == whole["sets"]["unseen"][name], name
    assert whole["sets"]["unseen"]["distance"] > 0.01


def resumed(path, at, **changes):
    """The run, gone on with from a checkpoint."""
    rest = run_with(path, **({"guard": NO_GUARD} | changes))
    load_checkpoint(rest, path / "checkpoints" / f"step-{at:06d}")
    rest.train()
    return measured_alike(lines_of(path))


GREEN = {"green": greenness}
BLUE = {"blue": lambda images, prompts: images[:, 2].mean((1, 2))}


def test_a_judge_that_comes_with_a_resume_is_held_against_the_base_model(tmp_path):
    """Not against what it first saw, which may have fallen already."""
    run_with(tmp_path / "with", NO_GUARD, steps=6, judges=GREEN).train()
    run_with(tmp_path / "later", NO_GUARD, steps=4, judges=BLUE).train()
    guard = Guard(max_fall=0.01)
    lines = resumed(tmp_path / "later", 4, steps=6, judges=GREEN, guard=guard)
    expected = lines_of(tmp_path / "with")
    assert [each["step"] for each in lines] == [0, 5, 6] and lines[0]["base"]
    for line, other in zip(lines, (expected[0], *expected[-2:]), strict=True):
        assert line["sets"] == other["sets"] and line["terms"] == other["terms"]
    assert [each["alarms"] for each in lines[1:]] == [
        [alarm.reason for alarm in guard.alarms(expected[0], each)] for each in expected[-2:]
    ]
    assert lines[-1]["alarms"]
    again = resumed(tmp_path / "later", 5, steps=7, judges=GREEN)
    assert [each["step"] for each in again] == [0, 5, 6, 7] and again[:2] == lines[:2]  # nothing is measured anew
    summary = summarise(tmp_path / "later")
    assert (summary.first_step, {change.reward for change in summary.changes}) == (0, {"redness", "green"})
    assert watch_of(again, 0, 0.01).judges == ("green",)
    page = write_report(tmp_path / "later").read_text()
    assert "green" in page and "blue" not in page


@pytest.mark.parametrize(
    "objective",
    [
        WeightedSum({"redness": redness}, {"redness": 2.0}),
        WeightedSum({"redness": Clamped(redness, 0.1)}, {"redness": 1.0}),
        WeightedSum({"greenness": greenness}, {"greenness": 1.0}),
    ],
)
def test_other_rewards_are_compared_with_the_base_model_anew(tmp_path, objective):
    run_with(tmp_path, NO_GUARD, steps=2, judges=BLUE).train()
    lines = resumed(tmp_path, 2, steps=3, judges=BLUE, reward=objective)
    assert [each["step"] for each in lines] == [0, 3] and lines[1]["kept"]
    assert lines[0]["terms"] == objective.terms == lines[1]["terms"]
    if "redness" in objective.weights:
        before = lines_of(tmp_path)[0]["sets"]["unseen"]["rewards"]["redness"]
        assert lines[0]["sets"]["unseen"]["rewards"]["redness"] == before  # it is the base model


def test_other_prompts_are_compared_with_the_base_model_anew(tmp_path):
    run_with(tmp_path, NO_GUARD, steps=2).train()
    lines = resumed(tmp_path, 2, steps=3, prompts={"seen": TRAIN})
    assert [list(each["sets"]) for each in lines] == [["seen"], ["seen"]]
    assert "unseen prompts" not in write_report(tmp_path).read_text()
    bar = ProgressBar(Console(record=True), RunFolder(tmp_path))
    bar._told = 3  # what was measured before
    bar._tell_evaluations()
    assert bar.console.export_text().count("on seen prompts: redness") == 2


def test_the_watch_shows_what_is_trained_and_its_judges_in_deviations(tmp_path):
    run_with(tmp_path, Guard(max_fall=0.5, window=2)).train()
    lines = lines_of(tmp_path)
    watch = watch_of(lines, 0, 0.5)
    assert (watch.trained, watch.judges, watch.floor) == ("redness", ("green", "embeds"), -0.5)
    assert watch.has_worth and watch.chart.count("<path") > 20
    assert list(worth_curve(lines).mean) == [Guard(max_fall=0.5, window=2).worth(lines[0], each) for each in lines]
    assert worth_curve([{**each, "worth": None} for each in lines]) is None
    assert list(watch.warnings) == [each["step"] for each in lines if each["alarms"]]
    assert watch_of(lines[:1], 0, 0.5) is None
    assert list(trained_curve(lines).mean) == [each["sets"]["unseen"]["reward"]["mean"] for each in lines]
    scores = [each["sets"]["unseen"]["rewards"]["green"] for each in lines]
    curve = in_deviations(lines, "unseen", "green")
    assert list(curve.mean) == [(each["mean"] - scores[0]["mean"]) / scores[0]["std"] for each in scores]
    assert list(curve.sem) == [each["sem"] / scores[0]["std"] for each in scores]


def test_recipes_have_a_guard_unless_it_is_taken_away(tmp_path):
    settings = {
        "rewards": {"emoji-aesthetic": 1.0},
        "prompts": {"train": "animals"},
        "sampling": {"num_inference_steps": 2},
    }
    for given, expected in (
        ({}, Guard()),
        ({"guard": None}, NO_GUARD),
        ({"guard": {"window": None}}, Guard(window=None)),
    ):
        run = build(Config.model_validate(settings | given), tmp_path)
        (evaluation,) = (each for each in run.callbacks if isinstance(each, Evaluation))
        assert evaluation.guard == expected
