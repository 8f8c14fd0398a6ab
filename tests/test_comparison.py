"""Comparing methods: the statistics against numbers worked out by hand, and a small comparison from end to end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats
import yaml
from typer.testing import CliRunner

from alignprop import emoji
from alignprop.charts import Band, bands_chart
from alignprop.cli import app
from alignprop.comparison import outcome, page, running
from alignprop.comparison.budget import Budget, read_budget
from alignprop.comparison.claims import claimed
from alignprop.comparison.declaration import Declaration, declare, read_declaration
from alignprop.comparison.methods import Search
from alignprop.comparison.page import write_page
from alignprop.comparison.results import results
from alignprop.comparison.search import choose_settings
from alignprop.comparison.statistics import (
    at_place,
    common_grid,
    crossing,
    interpolate,
    mean_interval,
    t_probability,
    t_quantile,
)
from alignprop.config import ConfigError
from alignprop.probe import Finding
from alignprop.report import lower_bound, summarise
from alignprop.runfolder import RunFolder, write_atomically
from alignprop.trainer import TrainingStopped

needs_emoji = pytest.mark.skipif(
    not (emoji.WEIGHTS / "model_index.json").exists(), reason="the embedded model's weights are not built yet"
)
RECIPE = {
    "model": {"name": "emoji"},
    "sampling": {"num_inference_steps": 2, "guidance_scale": 1.0},
    "rewards": {"emoji-aesthetic": 1.0},
    "judges": ["brightness"],
    "prompts": {"train": ["a cat", "a dog", "a hen"], "unseen": ["a fox", "an owl"]},
    "optimizer": {"learning_rate": 4.0e-3},
    "training": {"batch_size": 4},
    "evaluation": {"images_per_prompt": 2, "num_train_prompts": 1},
    "checkpoints": {"every": 2},
}


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 29, 30, 100, 999])
def test_t_quantile_is_scipys(degrees):
    for confidence in (0.5, 0.95, 0.999):
        expected = scipy.stats.t.ppf((1 + confidence) / 2, degrees)
        assert t_quantile(degrees, confidence) == pytest.approx(expected, rel=1e-9)
    assert t_probability(1.7, degrees) == pytest.approx(1 - 2 * scipy.stats.t.sf(1.7, degrees), abs=1e-12)


def test_interval_of_a_mean_is_the_textbooks():
    # Sum 30, mean 6, squared deviations 16 + 4 + 0 + 4 + 16 = 40, s = sqrt(10), t(4) = 2.7764.
    interval = mean_interval([2, 4, 6, 8, 10])
    assert (interval.mean, interval.n) == (6, 5)
    assert interval.half_width == pytest.approx(2.776445 * (10 / 5) ** 0.5, rel=1e-6)
    assert interval.low == pytest.approx(6 - 3.926486, rel=1e-6)
    one = mean_interval([3.5])
    assert (one.mean, one.low, one.high, one.half_width) == (3.5, None, None, None)


def test_a_crossing_lies_between_two_evaluations():
    place = crossing([1.0, 2.0, 4.0, 3.0], 3.5)  # three quarters of the way from the second to the third
    assert place == pytest.approx(1.75)
    assert at_place([0, 100, 300, 400], place) == pytest.approx(250)
    assert crossing([1.0, 2.0, 1.5, 3.0], 2.0) == 1.0  # the first time, exactly at an evaluation
    assert crossing([5.0, 6.0], 4.0) == 0.0
    assert crossing([1.0, 2.0], 2.1) is None


def test_curves_meet_on_a_grid_inside_what_all_cover():
    assert common_grid([[0, 8, 16], [0, 8, 16]]) == [0, 8, 16]
    assert common_grid([[0, 1, 5, 9], [1, 7]]) == [1, 7]
    assert interpolate([1, 4, 7], [0, 2, 8], [0, 20, 80]) == pytest.approx([10, 40, 70])
    with pytest.raises(AssertionError, match="extrapolated"):
        interpolate([9], [0, 8], [0, 1])


# ------------------------------------------------------------------------------------ comparisons that nothing trained


def declared(folder, methods=("fast", "slow"), seeds=2, search=None, **changes):
    settings = {name: {} for name in methods}
    asked = Declaration("emoji", {}, (), settings, seeds, Budget("images", 100), 2, search, **changes)
    return declare(folder, asked)


def line(images, unseen, train=None, seconds=None, trained=("glow",), judges=("blur",)):
    def one(value):
        statistics = {"mean": value, "std": 0.1, "sem": 0.1}
        return {"reward": statistics, "rewards": dict.fromkeys((*trained, *judges), statistics), "diversity": 0.5}

    return {
        "step": images,
        "images_scored": images,
        "denoiser_calls": 3 * images,
        "train_seconds": images / 2 if seconds is None else seconds,
        "trained": list(trained),
        "sets": {"unseen": one(unseen), "train": one(unseen if train is None else train)},
        "kept": True,
    }


def write_run(folder, *lines):
    for each in lines:
        RunFolder(folder).evaluations.append(each)


def write_runs(folder, rewards):
    """Runs of 0, 50 and 100 images with these rewards, by method and seed."""
    for method, seeds in rewards.items():
        for seed, values in enumerate(seeds):
            lines = [line(images, value) for images, value in zip((0, 50, 100), values, strict=True)]
            write_run(folder / "runs" / method / f"seed-{seed}", *lines)


def test_what_it_costs_to_reach_a_value(tmp_path):
    declaration = declared(tmp_path)
    write_runs(tmp_path, {"fast": [(1, 3, 5), (1, 5, 5)], "slow": [(1, 1, 2), (1, 2, 3.5)]})
    found = results(declaration, tmp_path)
    # Base 1, best mean at the end 5: the value is 3, which fast reaches after 50 and 25 images.
    assert found["reach"]["value"] == 3
    assert found["reach"]["chosen"] == "halfway between the base model's and the mean final one of fast"
    fast, slow = found["reach"]["methods"]["fast"], found["reach"]["methods"]["slow"]
    assert fast["images"]["seeds"] == {"0": 50, "1": 25}
    assert fast["images"]["interval"]["mean"] == 37.5
    assert fast["images"]["interval"]["high"] == pytest.approx(37.5 + 12.7062 * 12.5, rel=1e-5)  # s / sqrt(2) = 12.5
    assert fast["denoiser_calls"]["interval"]["mean"] == pytest.approx(3 * 37.5)
    assert fast["seconds"]["seeds"] == {"0": 25, "1": 12.5}
    # One of slow's seeds crosses 2/3 of the way from 50 to 100; the other has spent all 100.
    assert (slow["reached"], slow["of"], slow["images"]["interval"]) == (1, 2, None)
    assert slow["images"]["seeds"] == {"0": None, "1": pytest.approx(50 + 50 * 2 / 3)}
    assert slow["images"]["at_least"] == pytest.approx((100 + 83.3333) / 2, rel=1e-5)
    ratio = found["reach"]["ratios"]["fast"]["slow"]["images"]
    assert ratio == {"times": pytest.approx(91.6667 / 37.5, rel=1e-5), "bound": True}
    assert "slow" not in found["reach"]["ratios"]
    assert outcome.headline(found) == (
        "fast reached glow 3.00 on unseen prompts with 37.5 images; slow more than 2.4 times as many"
    )
    assert "more than 91.6<" in write_page(tmp_path, {**found, "versions": {}}).read_text()  # 91.67 would be too much


def test_ratio_of_two_that_reach_it_is_exact_and_of_none_is_told_by_seeds(tmp_path):
    declaration = declared(tmp_path)
    write_runs(tmp_path, {"fast": [(1, 3, 5)] * 2, "slow": [(1, 2, 3)] * 2})
    found = results(declaration, tmp_path)
    assert found["reach"]["ratios"]["fast"]["slow"]["images"] == {"times": 2.0, "bound": False}
    assert found["reach"]["ratios"]["slow"]["fast"]["images"] == {"times": 0.5, "bound": False}
    above = results(replace(declaration, reach=4.5), tmp_path)
    assert (above["reach"]["chosen"], above["reach"]["methods"]["slow"]["reached"]) == ("given", 0)
    assert above["reach"]["ratios"]["fast"]["slow"]["images"] == {"times": pytest.approx(100 / 87.5), "bound": True}
    nobody = results(replace(declaration, reach=9.0), tmp_path)
    assert outcome.headline(nobody).endswith("with every seed: fast with 0 of 2 seeds, slow with 0 of 2 seeds")
    assert nobody["reach"]["ratios"] == {}


@pytest.mark.parametrize(
    ("value", "digits", "told"),
    [(11.98, 2, "11"), (592.57, 3, "592"), (5120, 3, "5,120"), (2.4444, 2, "2.4"), (9.999, 2, "9.9"), (0, 3, "0.00"),
     (3.1, 2, "3.1"), (0.0298, 2, "0.029"), (1.15, 3, "1.15")],
)  # fmt: skip
def test_a_lower_bound_is_never_rounded_up(value, digits, told):
    assert lower_bound(value, digits) == f"more than {told}"


def test_a_seed_that_failed_before_its_first_evaluation_counts_among_those_that_have_not_reached_it(tmp_path):
    declaration = declared(tmp_path, methods=("fast",))
    write_run(tmp_path / "runs/fast/seed-0", line(0, 1), line(50, 3), line(100, 5))
    (tmp_path / "runs/fast/seed-1").mkdir()
    (tmp_path / "runs/fast/seed-1/failure.json").write_text('{"reason": "no memory"}')
    cost = results(declaration, tmp_path)["reach"]["methods"]["fast"]
    assert (cost["reached"], cost["of"], cost["images"]["interval"]) == (1, 2, None)
    assert cost["images"]["at_least"] == 50


def test_no_gain_is_told(tmp_path):
    declaration = declared(tmp_path)
    write_runs(tmp_path, {"fast": [(3, 2, 1)] * 2, "slow": [(3, 3, 3)] * 2})
    found = results(declaration, tmp_path)
    assert found["reach"]["value"] is None
    assert outcome.headline(found) == "No method raised glow above the base model's on the unseen prompts"
    assert "What it costs" not in write_page(tmp_path, {**found, "versions": {}}).read_text()


def test_means_over_seeds_are_taken_where_all_seeds_have_been(tmp_path):
    declaration = declared(tmp_path, methods=("one",))
    write_run(tmp_path / "runs/one/seed-0", line(0, 1, seconds=0), line(50, 2, seconds=10), line(100, 3, seconds=20))
    write_run(tmp_path / "runs/one/seed-1", line(0, 1, seconds=0), line(50, 4, seconds=20), line(100, 6, seconds=40))
    method = results(declaration, tmp_path)["methods"]["one"]
    by_images, by_seconds = (method["aggregated"][axis] for axis in ("images", "seconds"))
    assert by_images["x"] == [0, 50, 100]
    assert by_images["sets"]["unseen"]["reward"]["mean"] == [1, 3, 4.5]
    assert by_images["sets"]["unseen"]["rewards"]["blur"]["high"][2] == pytest.approx(4.5 + 12.7062 * 1.5, rel=1e-5)
    assert by_seconds["x"] == [0, 10, 20]  # the second seed went on to 40
    assert by_seconds["sets"]["unseen"]["reward"]["mean"] == pytest.approx([1, (2 + 2.5) / 2, (3 + 4) / 2])
    assert method["final"]["train"]["reward"]["mean"] == 4.5
    assert method["spent"] == {"images": 100, "denoiser_calls": 300, "seconds": 30}


def test_a_method_that_goes_on_is_compared_where_the_others_end(tmp_path):
    declaration = declared(tmp_path, budgets={"slow": Budget("images", 300)})
    write_runs(tmp_path, {"fast": [(1, 3, 5)] * 2})
    for seed in range(2):
        write_run(tmp_path / f"runs/slow/seed-{seed}", line(0, 1), line(75, 1.5), line(125, 2.5), line(300, 6))
    found = results(declaration, tmp_path)
    slow = found["methods"]["slow"]
    assert slow["final"]["unseen"]["reward"]["mean"] == 2.0  # at 100 images, between two evaluations
    assert slow["end"]["unseen"]["reward"]["mean"] == 6.0 and found["methods"]["fast"]["end"] is None
    assert found["reach"]["value"] == 3.0  # halfway to the best at 100 images
    assert slow["spent"]["images"] == 300 and found["complete"]
    assert found["reach"]["ratios"]["fast"]["slow"]["images"]["times"] == pytest.approx((125 + 175 / 7) / 50)
    text = write_page(tmp_path, {**found, "versions": {}}).read_text()
    assert "slow, after 300 images" in text and "slow went on beyond it" in text
    assert read_declaration(tmp_path).budgets == {"slow": Budget("images", 300)}
    with pytest.raises(ConfigError, match=r"budgets\.slow was images=300 and is images=100"):
        declare(tmp_path, replace(declaration, budgets={}))


def test_a_failed_seed_is_left_out_of_means_and_has_not_reached_the_value(tmp_path):
    declaration = declared(tmp_path, methods=("fast",))
    write_run(tmp_path / "runs/fast/seed-0", line(0, 1), line(50, 3), line(100, 5))
    write_run(tmp_path / "runs/fast/seed-1", line(0, 1), line(50, 1.5))
    (tmp_path / "runs/fast/seed-1/failure.json").write_text('{"reason": "step 51: <b>not finite</b>"}')
    found = results(declaration, tmp_path)
    assert found["complete"]
    assert found["methods"]["fast"]["final"]["unseen"]["reward"]["n"] == 1
    assert (found["reach"]["methods"]["fast"]["reached"], found["reach"]["methods"]["fast"]["of"]) == (1, 2)
    text = write_page(tmp_path, {**found, "versions": {}}).read_text()
    told = (
        "which its means leave out (to try it again, delete runs/fast/seed-1): step 51: &lt;b&gt;not finite&lt;/b&gt;"
    )
    assert f"fast failed with seed 1, {told}" in text


SEARCH = Search(Budget("images", 40), 100, {name: ({"optimizer.learning_rate": 1e-3}, {}) for name in ("fast", "slow")})


def test_a_search_is_won_on_the_training_prompts(tmp_path):
    declaration = declared(tmp_path, search=SEARCH)
    write_run(tmp_path / "search/fast/trial-0", line(0, 1), line(40, unseen=2, train=4))
    assert choose_settings(declaration, tmp_path, "fast") is None  # the other trial is still to come
    write_run(tmp_path / "search/fast/trial-1", line(0, 1), line(40, unseen=9, train=3))
    choice = choose_settings(declaration, tmp_path, "fast")
    assert (choice.winner, choice.settings) == (0, {"optimizer.learning_rate": 1e-3})
    assert [trial["reward"] for trial in choice.trials] == [4, 3]


def test_trials_with_rewards_of_their_own_are_judged_by_the_recipes(tmp_path):
    declaration = replace(declared(tmp_path, search=SEARCH), rewards={"blur": 1.0})
    for trial, (trained, blur) in enumerate([(9.0, 1.0), (2.0, 5.0)]):
        last = line(40, 1, train=trained)
        last["sets"]["train"]["rewards"]["blur"] = {"mean": blur}
        write_run(tmp_path / f"search/fast/trial-{trial}", line(0, 1), last)
    choice = choose_settings(declaration, tmp_path, "fast")
    assert (choice.winner, [trial["reward"] for trial in choice.trials]) == (1, [1.0, 5.0])


def test_a_trial_that_fails_is_lost(tmp_path):
    declaration = declared(tmp_path, search=SEARCH)
    for trial, reason in ((0, "not finite"), (1, None)):
        write_run(tmp_path / f"search/fast/trial-{trial}", line(0, 1), line(40, 1, train=9 - trial))
        if reason:
            (tmp_path / f"search/fast/trial-{trial}/failure.json").write_text(json.dumps({"reason": reason}))
    choice = choose_settings(declaration, tmp_path, "fast")
    assert (choice.winner, choice.settings, choice.trials[0]["failure"]) == (1, {}, "not finite")


# ------------------------------------------------------------------------------------------------------ declarations


def test_a_folder_holds_one_comparison_that_may_grow(tmp_path):
    folder = tmp_path / "a"
    first = declared(folder)
    assert read_declaration(folder) == first
    assert declared(folder, methods=("fast", "slow", "third"), seeds=3).seeds == 3
    for change, told in (
        ({"seeds": 2, "methods": ("fast", "slow", "third")}, "seeds was 3 and is 2"),
        ({"seeds": 3}, "third is left out"),
    ):
        with pytest.raises(ConfigError, match=f"a holds another comparison, {told}: ask for the same"):
            declared(folder, **change)
    now = read_declaration(folder)
    for changed, told in (
        (replace(now, budget=Budget("images", 200)), "budget was images=100 and is images=200"),
        (replace(now, settings=("training.batch_size=2",)), "settings was none and is training.batch_size=2"),
        (replace(now, recipe_settings={"a": 1}), "the recipe's file has changed"),
        (replace(now, methods={**now.methods, "fast": {"a": 1}}), re.escape("methods.fast was {} and is {a: 1}")),
        (replace(now, search=SEARCH), "it had no search, and one is asked for"),
    ):
        with pytest.raises(ConfigError, match=told):
            declare(folder, changed)
    assert read_declaration(folder) == now


def test_the_value_to_reach_is_kept_and_may_be_changed(tmp_path):
    declared(tmp_path, reach=2.5)
    assert declared(tmp_path).reach == 2.5
    assert declared(tmp_path, reach=3.5).reach == 3.5


def test_budgets():
    assert read_budget("--budget", "images=640") == Budget("images", 640)
    assert read_budget("--budget", "seconds=2.5") == Budget("seconds", 2.5)
    # 640 images in 12 evaluations: every 54, as every 53 would be a thirteenth.
    assert Budget("images", 640).settings(12)["evaluation.every_images"] == 54
    assert Budget("seconds", 30).settings(12)["evaluation.every_seconds"] == 2.5
    for text in ("640", "images=0", "images=2.5", "seconds=inf", "hours=2", "images=-3", ""):
        with pytest.raises(ValueError, match="--budget"):
            read_budget("--budget", text)


# ------------------------------------------------------------------------------------------------------------ claims


@pytest.fixture
def claiming():
    """Starts a process that holds a claim until it is killed."""
    processes = []

    def start(lock):
        code = (
            "import pathlib, sys, time\nfrom alignprop.comparison.claims import claimed\n"
            "with claimed(pathlib.Path(sys.argv[1])) as mine:\n    print(mine, flush=True); time.sleep(60)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "True\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_claim_is_held_once_and_given_back(tmp_path):
    lock = tmp_path / "runs" / ".seed-0.lock"
    for _ in range(2):
        with claimed(lock) as mine:
            assert mine
            with claimed(lock) as second:
                assert not second
            with claimed(lock.with_name(".seed-1.lock")) as another:
                assert another


def test_a_dead_process_loses_its_claim_and_a_living_one_keeps_it(tmp_path, claiming):
    lock = tmp_path / "seed-0.lock"
    other = claiming(lock)
    with claimed(lock) as mine:
        assert not mine
    other.kill()  # without a chance to give it back
    other.wait()
    with claimed(lock) as mine:
        assert mine


def test_one_of_many_has_a_claim(tmp_path):
    code = (
        "import sys, time, pathlib\nfrom alignprop.comparison.claims import claimed\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "with claimed(pathlib.Path(sys.argv[1])) as mine:\n    print(int(mine)); time.sleep(1.5)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "seed-0.lock"), str(time.time() + 2.0)]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    wins = [int(process.communicate(timeout=30)[0]) for process in processes]
    assert sum(wins) == 1


def test_processes_that_start_at_once_declare_one_comparison(tmp_path):
    code = (
        "import sys, time, pathlib\nfrom alignprop.comparison.declaration import Declaration, declare\n"
        "from alignprop.comparison.budget import Budget\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "declare(pathlib.Path(sys.argv[1]), Declaration('emoji', {}, (), {'a': {}}, 2, Budget('images', 9), 2))\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "c"), str(time.time() + 2.0)]
    processes = [subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=30)[1] for process in processes] == [""] * 4
    assert sorted(os.listdir(tmp_path / "c")) == [".compare.lock", "compare.yaml"]


def test_processes_that_write_the_same_file_at_once_do_not_trip_over_each_other(tmp_path, monkeypatch):
    path, replaced = tmp_path / "compare.json", os.replace

    def slower(source, target):  # another process begins and ends between the two halves of this one's writing
        monkeypatch.setattr(os, "replace", replaced)
        write_atomically(path, "theirs")
        replaced(source, target)

    monkeypatch.setattr(os, "replace", slower)
    write_atomically(path, "ours")
    assert path.read_text() == "ours" and os.listdir(tmp_path) == [path.name]


# ------------------------------------------------------------------------ the command, with trainings of no length


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe of the embedded model; the working directory is ours."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": "200"})


class FakeTrainer:
    """Writes the evaluations of a run whose rewards its settings decide."""

    def __init__(self, config, folder):
        self.config, self.folder = config, folder

    def train(self):
        config, rate = self.config, self.config.optimizer.learning_rate
        if rate > 0.5:
            raise TrainingStopped("step 3: the gradient of glow is not finite")
        if config.training.num_threads == 7 and config.training.seed == 1:
            raise KeyboardInterrupt
        budget = config.training.max_images
        gain = 3.0 if config.estimator.name == "alignprop" else 1.0
        names = {"trained": tuple(config.rewards), "judges": tuple(config.judges)}
        last = line(budget, 1 + gain + 0.1 * config.training.seed, train=100 * rate, **names)
        write_run(self.folder, line(0, 1.0, **names), last)


@pytest.fixture
def built(monkeypatch):
    """The folders of the runs that were trained."""
    folders = []

    def build(config, folder, callbacks):
        folders.append("/".join(folder.parts[-3:]))
        return FakeTrainer(config, folder)

    monkeypatch.setattr(running, "build", build)
    monkeypatch.setattr(running, "probe_trainer", lambda trainer: [])
    monkeypatch.setattr(page, "write_page", lambda folder, found: folder / "compare.html")  # takes a second or more
    return folders


METHODS = """
methods:
  full: {estimator.truncation: {kind: all}, training: {batch_size: 2}}
  ddpo: {optimizer.learning_rate: 1e-3}
search:
  budget: images=8
  trials:
    full: [{optimizer.learning_rate: 1e-3}, {optimizer.learning_rate: 4e-3}]
    ddpo: [{optimizer.learning_rate: 0.9}, {optimizer.learning_rate: 0.002}]
    rwr: [{}]
"""


def test_search_and_comparison_from_a_methods_file(recipe, built, tmp_path):
    (tmp_path / "m.yaml").write_text(METHODS)
    command = (recipe, "--methods", "full,ddpo", "--methods-file", "m.yaml", "--seeds", "2", "--budget", "images=40")
    result = run(*command, "--output", "c")
    assert result.exit_code == 0, result.output
    trials = [f"search/{method}/trial-{i}" for method in ("full", "ddpo") for i in (0, 1)]
    assert built == [*trials, "runs/full/seed-0", "runs/ddpo/seed-0", "runs/full/seed-1", "runs/ddpo/seed-1"]
    found = json.loads((tmp_path / "c/compare.json").read_text())
    assert [found["methods"][name]["search"]["winner"] for name in ("full", "ddpo")] == [1, 1]
    lost = found["methods"]["ddpo"]["search"]["trials"][0]
    assert (lost["failure"], lost["reward"]) == ("step 3: the gradient of glow is not finite", None)
    assert found["methods"]["full"]["settings"] == {
        "estimator.truncation": {"kind": "all"},
        "training.batch_size": 2,
        "optimizer.learning_rate": 0.004,
    }
    config = yaml.safe_load((tmp_path / "c/runs/full/seed-1/config.yaml").read_text())
    assert config["optimizer"]["learning_rate"] == 0.004
    assert (config["training"]["batch_size"], config["training"]["seed"]) == (2, 1)
    assert (config["training"]["max_images"], config["evaluation"]["every_images"]) == (40, 4)
    assert config["run"] == {"name": "seed-1", "folder": "c/runs/full"}
    trial = yaml.safe_load((tmp_path / "c/search/full/trial-0/config.yaml").read_text())
    assert (trial["training"]["max_images"], trial["training"]["seed"]) == (8, 100)
    text = write_page(tmp_path / "c", found).read_text()
    assert "failed: step 3: the gradient of glow is not finite" in text
    assert "2 trials of 8 images each" in text
    built.clear()
    assert run(*command, "--output", "c").exit_code == 0
    assert built == []


def test_a_run_that_fails_stops_no_other_and_is_not_repeated(recipe, built, tmp_path):
    (tmp_path / "m.yaml").write_text("methods: {hot: {optimizer.learning_rate: 0.9}}")
    command = (recipe, "--methods", "hot,ddpo", "--methods-file", "m.yaml", "--seeds", "2", "--budget", "images=40")
    result = run(*command, "--output", "c")
    assert result.exit_code == 0, result.output
    assert re.search(r"hot seed 0, \d+ s: failed: step 3: the gradient of glow is not finite", result.output)
    found = json.loads((tmp_path / "c/compare.json").read_text())
    assert found["complete"]
    assert found["methods"]["hot"]["failures"] == dict.fromkeys("01", "step 3: the gradient of glow is not finite")
    assert found["methods"]["ddpo"]["final"]["unseen"]["reward"]["mean"] == pytest.approx(2.05)
    built.clear()
    shutil.rmtree(tmp_path / "c/runs/hot/seed-1")
    assert run(*command, "--output", "c").exit_code == 0
    assert built == ["runs/hot/seed-1"]


def test_a_method_that_the_probe_refuses_is_not_trained(recipe, built, monkeypatch):
    probed = []

    def refusing(trainer):
        probed.append(trainer)
        return [Finding("live gradient", False, "no gradient reaches the adapter.")]

    monkeypatch.setattr(running, "probe_trainer", refusing)
    assert (
        run(recipe, "--methods", "alignprop", "--budget", "images=40", "--seeds", "2", "--output", "c").exit_code == 0
    )
    found = json.loads(Path("c/compare.json").read_text())["methods"]["alignprop"]
    assert found["failures"] == dict.fromkeys("01", "live gradient: no gradient reaches the adapter.")
    assert len(probed) == 1 and built == ["runs/alignprop/seed-0"]  # its seeds are alike


def test_more_seeds_and_methods_train_only_what_is_new(recipe, built):
    settings = ("--budget", "images=40", "--output", "c")
    assert run(recipe, "--methods", "ddpo", "--seeds", "1", *settings).exit_code == 0
    built.clear()
    assert run(recipe, "--methods", "ddpo,alignprop", "--seeds", "2", *settings).exit_code == 0
    assert built == ["runs/alignprop/seed-0", "runs/ddpo/seed-1", "runs/alignprop/seed-1"]


def test_ctrl_c_gives_the_claim_back_and_says_how_to_go_on(recipe, built, tmp_path):
    result = run(
        recipe, "--methods", "ddpo", "--seeds", "2", "--budget", "images=40", "--set", "training.num_threads=7"
    )
    assert result.exit_code == 130
    command = (
        f"alignprop compare {recipe} --methods ddpo --seeds 2 --budget images=40 --evaluations 12 "
        "--output comparisons/tiny --set training.num_threads=7"
    )
    assert command in result.output
    with claimed(tmp_path / "comparisons/tiny/runs/ddpo/.seed-0.lock") as free:
        assert free
    assert not (tmp_path / "comparisons/tiny/compare.json").exists()


def test_what_another_process_trains_is_left_to_it(recipe, built, tmp_path, claiming):
    command = (recipe, "--methods", "ddpo", "--seeds", "2", "--budget", "images=40", "--output", "c")
    assert run(*command).exit_code == 0
    shutil.rmtree(tmp_path / "c/runs")
    other = claiming(tmp_path / "c/runs/ddpo/.seed-0.lock")
    (tmp_path / "c/compare.json").unlink()
    built.clear()
    result = run(*command)
    assert (result.exit_code, built) == (0, ["runs/ddpo/seed-1"])
    assert "Other processes are training what is left (runs/ddpo/seed-0); the last one writes" in result.output
    assert not (tmp_path / "c/compare.json").exists()
    other.kill()
    other.wait()
    assert run(*command).exit_code == 0
    assert built == ["runs/ddpo/seed-1", "runs/ddpo/seed-0"]
    assert json.loads((tmp_path / "c/compare.json").read_text())["complete"]


def test_trials_of_another_process_are_waited_for(recipe, built, tmp_path, claiming, monkeypatch):
    (tmp_path / "m.yaml").write_text(METHODS)
    other = claiming(tmp_path / "c/search/full/.trial-1.lock")
    shutil.move(tmp_path / "c", tmp_path / "aside")  # until the comparison is declared
    waits, shown = [], []

    def sleep(seconds):  # meanwhile the other process dies, and its claim with it
        waits.append(seconds)
        assert built == ["search/full/trial-0", "search/ddpo/trial-0", "search/ddpo/trial-1", "runs/ddpo/seed-0"]
        assert shown == ["Waiting for another process, which trains full, trial 1"]
        other.kill()
        other.wait()

    monkeypatch.setattr(running.time, "sleep", sleep)
    monkeypatch.setattr("rich.status.Status.update", lambda self, text: shown.append(text))
    command = [recipe, "--methods", "full,ddpo", "--methods-file", "m.yaml", "--seeds", "1", "--budget", "images=40"]
    from alignprop.cli.comparing import _asked, _declared

    asked = _asked(str(recipe), ["full", "ddpo"], 1, "images=40", [], tmp_path / "m.yaml", None, 12)
    _declared(Path("c"), asked, Path("m.yaml"))
    shutil.move(tmp_path / "aside/search", tmp_path / "c/search")
    assert run(*command, "--output", "c").exit_code == 0
    assert waits == [running.POLL_S]
    assert built[-2:] == ["search/full/trial-1", "runs/full/seed-0"]


def test_runs_of_settings_that_are_chosen_no_more_are_not_taken_for_others(recipe, built, tmp_path):
    (tmp_path / "m.yaml").write_text(METHODS)
    command = (recipe, "--methods", "full,ddpo", "--methods-file", "m.yaml", "--seeds", "1", "--budget", "images=40")
    assert run(*command, "--output", "c").exit_code == 0
    winner = RunFolder(tmp_path / "c/search/full/trial-1")
    (winner.path / "failure.json").write_text('{"reason": "lost"}')
    result = run(*command, "--output", "c")
    assert result.exit_code == 2
    told = "c/runs/full/seed-0 was trained with other settings, optimizer.learning_rate was 0.004 and is 0.001"
    assert f"{told}: delete it, to train it again." in " ".join(result.stderr.split())
    shutil.rmtree(tmp_path / "c/runs/full/seed-0")
    built.clear()
    assert run(*command, "--output", "c").exit_code == 0
    assert built == ["runs/full/seed-0"]


OWN_REWARDS = """
methods:
  light: {rewards: {brightness: 1.0}, judges: {emoji-aesthetic: {}}}
  both: {rewards: {brightness: 2.0, emoji-aesthetic: 1.0}, judges: {}}
"""


def test_methods_with_rewards_of_their_own_are_compared_by_the_recipes(recipe, built, tmp_path):
    (tmp_path / "m.yaml").write_text(OWN_REWARDS)
    command = (recipe, "--methods", "light,both", "--methods-file", "m.yaml", "--seeds", "1", "--budget", "images=40")
    assert run(*command, "--output", "c").exit_code == 0
    assert read_declaration(tmp_path / "c").rewards == {"emoji-aesthetic": 1.0}
    for folder, rewards in (("light", {"glow": 7, "blur": 1}), ("both", {"glow": 7, "flash": 2})):
        path = tmp_path / "d/runs" / folder / "seed-0"
        for images in (0, 100):
            given = line(images, 3.0)
            for measured in given["sets"].values():
                measured["rewards"] = {name: {"mean": value + images} for name, value in rewards.items()}
            write_run(path, given)
    own = {"light": {"rewards": {"blur": 1.0}}, "both": {"rewards": {"glow": 1.0, "flash": 1.0}}}
    asked = Declaration("emoji", {}, (), own, 1, Budget("images", 100), 2, rewards={"glow": 2.0})
    found = results(asked, tmp_path / "d")
    assert found["trained"] == ["glow"] and list(found["base"]["unseen"]["rewards"]) == ["glow"]
    assert [found["methods"][name]["final"]["unseen"]["reward"]["mean"] for name in own] == [214.0, 214.0]
    text = write_page(tmp_path / "d", {**found, "versions": {}}).read_text()
    told = "Not trained on glow, the recipe&#39;s, by which all are compared, but on rewards of their own"
    assert f"{told}: light, both" in text
    (tmp_path / "m.yaml").write_text("methods: {light: {rewards: {brightness: 1.0}, judges: {}}}")
    result = run(recipe, "--methods", "light", "--methods-file", "m.yaml", "--budget", "images=40", "--output", "e")
    assert result.exit_code == 2
    told = "light: emoji-aesthetic, by which methods are compared, is none of its rewards and judges: add it"
    assert told in " ".join(result.stderr.split())


FILE = "m.yaml"
REFUSED = [
    (["--methods", "alingprop"], "--methods=alingprop is unknown; did you mean 'alignprop'?"),
    (["--methods", ""], "--methods needs names"),
    (["--methods", "ddpo,ddpo"], "--methods names ddpo twice"),
    (["--seeds", "0"], "--seeds=0 needs a whole number, at least 1."),
    (["--evaluations", "0"], "--evaluations=0 needs a whole number, at least 1."),
    (["--budget", "image=3"], "--budget=image=3 needs the form images=640 or seconds=300"),
    (["--set", "training.seed=3"], "--set training.seed is set by the comparison"),
    (["--set", "training.batch_size=0"], "training.batch_size=0 needs at least 1."),
    (["--set", "optimizer.schedule=cosine"], "optimizer.schedule=cosine follows the number of steps"),
    (["--set", "rewards.rednes=1"], "did you mean 'redness'?"),
    (["--set", "prompts={train: [a cat]}"], "prompts.unseen needs prompts"),
    (["--methods-file", "none.yaml"], "--methods-file=none.yaml cannot be read"),
    (
        ["--methods-file", FILE, "--methods", "a,ddpo"],
        "a: optimizer.learning_rat is no setting; did you mean optimizer",
    ),
    (["--methods-file", FILE, "--methods", "b,ddpo"], "methods.b: training.seed is set by the comparison"),
    (["--methods-file", FILE, "--methods", "c"], "methods.c: prompts.unseen is to be the same for every method"),
    (["--methods-file", FILE, "--methods", "d"], "methods.d: evaluation.images_per_prompt is to be the same"),
    (["--report-only", "--output", "nowhere"], "nowhere is no comparison: it has no compare.yaml."),
]


@pytest.mark.parametrize(("arguments", "told"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_bad_input_is_told_in_a_sentence(recipe, built, tmp_path, arguments, told):
    (tmp_path / FILE).write_text(
        "methods: {a: {optimizer.learning_rat: 1}, b: {training.seed: 3}, "
        "c: {prompts: {unseen: [a fox]}}, d: {evaluation.images_per_prompt: 3}}"
    )
    result = run(recipe, "--methods", "alignprop,ddpo", "--budget", "images=40", *arguments)
    assert result.exit_code in (1, 2)
    message = " ".join(result.stderr.split())
    assert told in message
    assert message.startswith("Error: ")
    assert "Traceback" not in message
    assert built == []
    assert not (tmp_path / "comparisons").exists()


@pytest.mark.parametrize(
    ("file", "methods", "told"),
    [
        (METHODS, "full,rwr", "needs as many trials for each method that is compared, and full has 2, rwr has 1."),
        (METHODS, "full,draft-k", "and full has 2, draft-k has 0."),
        (METHODS.replace("budget: images=8", "budget: 8"), "full", "search.budget=8 needs the form images=640"),
        (
            METHODS.replace("trials:", "seed: 4\n  trials:"),
            "full,ddpo",
            "search.seed=4 is one of the comparison's seeds",
        ),
        (
            METHODS.replace("trials:", "sed: 4\n  trials:"),
            "full,ddpo",
            "search.sed is none of budget, seed, trials; did",
        ),
        ("method: {}", "ddpo", "method is no key of a methods file; did you mean 'methods'?"),
        ("methods: {../up: {}}", "ddpo", "methods.../up names a folder"),
        ("methods: {ddpo: [1]}", "ddpo", "methods.ddpo needs a mapping of settings"),
        ("[1]", "ddpo", "needs the keys methods or search"),
        ("budgets: {ddpo: images=39}", "ddpo", "budgets.ddpo=images=39 needs at least --budget images=40"),
        ("budgets: {ddpo: seconds=90}", "ddpo", "budgets.ddpo=seconds=90 needs at least --budget images=40"),
        ("budgets: {ddpo: 90}", "ddpo", "budgets.ddpo=90 needs the form images=640"),
    ],
)
def test_bad_methods_files_are_told_in_a_sentence(recipe, built, tmp_path, file, methods, told):
    (tmp_path / "m.yaml").write_text(file)
    result = run(recipe, "--methods", methods, "--methods-file", "m.yaml", "--budget", "images=40")
    assert (result.exit_code, built) == (2, [])
    assert told in " ".join(result.stderr.split())


def test_what_is_wrong_for_every_method_is_told_once(recipe, built):
    command = (recipe, "--methods", "refl,draft-k,ddpo", "--budget", "images=40", "--set")
    sentences = " ".join(run(*command, "estimator.arguments={clip_range: 0.1}").stderr.split())
    assert "draft-k: estimator.arguments.clip_range is none of draft-k's" in sentences
    assert "refl: estimator.arguments.clip_range is none of refl's" in sentences
    assert "ddpo: " not in sentences
    result = run(*command, "training.batch_size=0")
    assert result.stderr.count("training.batch_size=0") == 1


def test_another_declaration_is_refused(recipe, built):
    command = (recipe, "--methods", "ddpo", "--seeds", "1", "--output", "c")
    assert run(*command, "--budget", "images=40").exit_code == 0
    result = run(*command, "--budget", "images=80")
    assert result.exit_code == 2
    assert "c holds another comparison, budget was images=40 and is images=80" in " ".join(result.stderr.split())


def test_a_broken_recipe_is_told_as_by_train(recipe, built):
    recipe.write_text("a: [")
    result = run(recipe, "--methods", "ddpo", "--budget", "images=40")
    assert (result.exit_code, built) == (2, [])
    assert "tiny.yaml cannot be read" in " ".join(result.stderr.split())


def test_help_has_examples_and_fits_a_narrow_terminal():
    shown = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "60", "TERMINAL_WIDTH": "60"})
    assert max(map(len, shown.output.splitlines())) <= 60
    assert "alignprop compare emoji --methods" in shown.output
    assert "compare" in CliRunner().invoke(app, ["--help"]).output


def test_arguments_of_the_recipes_estimator_are_not_another_methods(recipe, built, tmp_path):
    recipe.write_text(yaml.safe_dump({**RECIPE, "estimator": {"name": "draft-k", "arguments": {"steps": 2}}}))
    assert run(recipe, "--methods", "ddpo,draft-k", "--seeds", "1", "--budget", "images=40").exit_code == 0
    configs = [
        yaml.safe_load((tmp_path / f"comparisons/tiny/runs/{name}/seed-0/config.yaml").read_text())["estimator"]
        for name in ("ddpo", "draft-k")
    ]
    assert [config["arguments"] for config in configs] == [{}, {"steps": 2}]


# ---------------------------------------------------------------------------------------------------------- the charts


def test_a_band_has_the_colour_of_its_place_and_no_more_room_than_lines_need():
    line_ = Band([0, 10, 20], [1.0, 2.0, 3.0], [1.0, -90.0, 2.5], [1.0, 99.0, 3.5])
    svg = str(bands_chart([None, line_], 2.5, log_x=False))
    assert "var(--curve-1)" in svg and "var(--curve-0)" not in svg
    labels = [float(text.replace("−", "-")) for text in re.findall(r">([−\d.]+)</text>", svg)]
    assert re.findall(r"var\(--[\w-]+\)[^;\" )]", svg) == []  # nothing clings to a colour
    assert max(labels) <= 20  # of the horizontal axis; the band reaches 99
    assert "stroke-dasharray" not in str(bands_chart([line_], None, log_x=False))
    assert "stroke-dasharray" in str(bands_chart([None] * 4 + [line_], None, log_x=False))


def test_no_id_of_a_chart_is_in_another():
    def ids(scale):
        return set(
            re.findall(
                r' id="([^"]+)"', str(bands_chart([Band([0, 1], [0, scale], [None], [None])], None, log_x=False))
            )
        )

    assert ids(1) and ids(1).isdisjoint(ids(2))


def test_far_apart_spendings_are_drawn_on_a_logarithmic_axis():
    near, far = (Band([0, end / 2, end], [0, 1, 2], [None] * 3, [None] * 3) for end in (100, 40000))
    labels = re.findall(r">([\d,]+)</text>", str(bands_chart([near, far], None, log_x=True)))
    assert labels[:3] == ["0", "100", "300"] and "30,000" in labels


# ------------------------------------------------------------------------------------------------- a real comparison


def comparing(folder, recipe, *arguments):
    command = ["--methods", "alignprop,ddpo", "--seeds", "2", "--budget", "images=16", "--evaluations", "2"]
    result = run(recipe, *command, "--output", folder, *arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two methods with two seeds on the embedded model, trained by the command."""
    folder = tmp_path_factory.mktemp("compared")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    output = comparing(folder / "c", path).output
    return folder / "c", path, output


@needs_emoji
def test_a_comparison_leaves_ordinary_runs_and_their_numbers(compared, tmp_path, monkeypatch):
    folder, _, output = compared
    found = json.loads((folder / "compare.json").read_text())
    for method in ("alignprop", "ddpo"):
        for seed in ("0", "1"):
            files = RunFolder(folder / f"runs/{method}/seed-{seed}")
            lines = files.evaluations.read()
            series = found["methods"][method]["seeds"][seed]["series"]
            assert series["images"] == [0, 8, 16] == [line["images_scored"] for line in lines]
            assert series["seconds"] == [line["train_seconds"] for line in lines]
            for name in ("unseen", "train"):
                assert series["sets"][name]["diversity"] == [line["sets"][name]["diversity"] for line in lines]
                brightness = [line["sets"][name]["rewards"]["brightness"]["mean"] for line in lines]
                assert series["sets"][name]["rewards"]["brightness"] == brightness
            assert (files.samples(4) / "unseen.png").exists() and (files.adapter).is_dir()
            assert len(files.metrics.read()) == 4
            assert f"{method} seed {seed}" in output
        ends = [found["methods"][method]["seeds"][s]["final"]["unseen"]["reward"] for s in "01"]
        final = found["methods"][method]["final"]["unseen"]["reward"]
        assert final["mean"] == pytest.approx(sum(ends) / 2)
        assert final["high"] - final["mean"] == pytest.approx(12.7062 * abs(ends[0] - ends[1]) / 2, rel=1e-5)
    assert summarise(folder / "runs/ddpo/seed-0").planned_steps == 4  # not the bound that no run reaches
    # A run of the comparison is the run that `alignprop train` makes with its settings.
    monkeypatch.chdir(tmp_path)
    alone = CliRunner().invoke(
        app, ["train", str(folder / "runs/ddpo/seed-1/config.yaml"), "--output", "alone", "--no-probe"]
    )
    assert alone.exit_code == 0, alone.output
    ours, theirs = (RunFolder(path).metrics.read() for path in (folder / "runs/ddpo/seed-1", tmp_path / "alone"))
    assert [line["reward"] for line in ours] == [line["reward"] for line in theirs]
    assert [line["grad_norm"] for line in ours] == [line["grad_norm"] for line in theirs]


@needs_emoji
def test_the_page_is_one_offline_file(compared):
    folder, recipe, _ = compared
    text = (folder / "compare.html").read_text()
    assert text.count("data:image/png;base64,") == 3  # the base model's and each method's
    assert text.count("<svg") == 4 * 3  # two sets of the trained reward, brightness, diversity; three axes
    assert not re.findall(r"https?://|<script|{{|None", text)
    assert "same seeds, not picked" in text and f"alignprop compare {recipe} --methods alignprop,ddpo" in text
    ids = re.findall(r'<[^>]* id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 12


@needs_emoji
def test_only_what_is_missing_is_trained_again(compared, tmp_path):
    whole, recipe, _ = compared
    folder = tmp_path / "c"
    shutil.copytree(whole, folder)
    deleted, cut = folder / "runs/alignprop/seed-0", RunFolder(folder / "runs/ddpo/seed-1")
    shutil.rmtree(deleted)
    shutil.rmtree(cut.checkpoints / "step-000004")  # as if it had been stopped after its second step
    cut.evaluations.rewind(2)
    files = {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/metrics.jsonl")}
    first_lines = (cut.path / "metrics.jsonl").read_text().splitlines()[:2]
    output = comparing(folder, recipe).output
    assert "alignprop seed 0" in output and "ddpo seed 1" in output and "seed 1, " in output
    assert "ddpo seed 0" not in output and "alignprop seed 1" not in output
    changed = {path for path, modified in files.items() if path.stat().st_mtime_ns != modified}
    assert changed == {cut.path / "metrics.jsonl"}
    assert (cut.path / "metrics.jsonl").read_text().splitlines()[:2] == first_lines
    before, after = (json.loads((path / "compare.json").read_text())["methods"] for path in (whole, folder))
    for method, seed in (("alignprop", "0"), ("ddpo", "1")):
        assert after[method]["seeds"][seed]["series"]["sets"] == before[method]["seeds"][seed]["series"]["sets"]


@needs_emoji
def test_ctrl_c_stops_between_two_steps_with_a_checkpoint(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(running.Progress, "step", lambda self, trainer, metrics: signal.raise_signal(signal.SIGINT))
    result = run(recipe, "--methods", "alignprop", "--seeds", "2", "--budget", "images=400000", "--output", "c")
    assert result.exit_code == 130
    assert "Stopped; what was trained is kept. Go on with:" in result.output
    assert os.listdir(tmp_path / "c/runs/alignprop/seed-0/checkpoints") == ["step-000001"]
    assert sorted(os.listdir(tmp_path / "c/runs/alignprop")) == [".seed-0.lock", "seed-0"]  # no other seed


@needs_emoji
def test_ctrl_c_in_the_last_step_of_a_run_ends_the_comparison(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(running.Progress, "step", lambda self, trainer, metrics: signal.raise_signal(signal.SIGINT))
    result = run(recipe, "--methods", "alignprop", "--seeds", "2", "--budget", "images=4", "--output", "c")
    assert result.exit_code == 130
    assert len(RunFolder(tmp_path / "c/runs/alignprop/seed-0").evaluations.read()) == 2  # it was brought to its end
    assert not (tmp_path / "c/runs/alignprop/seed-1").exists()
