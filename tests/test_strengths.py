"""An adapter at other strengths than it was trained with, and the choice of the best one."""

import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

import tiny
from alignprop.adapters import Lora
from alignprop.cli import app
from alignprop.cli.strengths import read_strengths
from alignprop.config import Config, ConfigError
from alignprop.drawing import measures
from alignprop.guard import Guard
from alignprop.rollout import Sampler
from alignprop.runfolder import RunFolder
from alignprop.strength import set_strength

PROMPTS, SEEDS = ["a cat", "a dog"], [3, 4]


def with_adapter(path, factor=1.0, text_encoders=False):
    """A tiny Stable Diffusion with a saved adapter, whose second factors are multiplied."""
    pipeline = tiny.stable_diffusion()
    adapter = Lora(rank=3, alpha=2.0, text_encoders=text_encoders).attach(pipeline)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in adapter.parameters.items():
            scale = factor if "lora_B" in name else 1.0
            value.copy_(scale * 0.3 * torch.randn(value.shape, generator=generator))
    adapter.save(path)
    plain = tiny.stable_diffusion()
    plain.load_lora_weights(path)
    return plain


def pictures(pipeline):
    return Sampler(pipeline, tiny.CALL).sample(PROMPTS, SEEDS)


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.7, -0.5])
def test_a_strength_multiplies_the_update(tmp_path, strength):
    pipeline = with_adapter(tmp_path / "whole")
    set_strength(pipeline, 0.3)
    set_strength(pipeline, strength)  # in place of the one before, not on top of it
    expected = pictures(with_adapter(tmp_path / "scaled", strength))
    assert torch.allclose(pictures(pipeline), expected, atol=1e-5)
    assert not torch.allclose(expected, pictures(tiny.stable_diffusion()), atol=1e-3)


@pytest.mark.parametrize("text_encoders", [False, True])
def test_strength_zero_is_the_base_model(tmp_path, text_encoders):
    pipeline = with_adapter(tmp_path, text_encoders=text_encoders)
    set_strength(pipeline, 0.0)
    assert torch.equal(pictures(pipeline), pictures(tiny.stable_diffusion()))


def test_a_pipeline_without_an_adapter_has_no_strength():
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no adapter"):
        set_strength(tiny.stable_diffusion(), 1.0)


def test_strengths_are_numbers_with_the_base_model_among_them():
    assert read_strengths("1,0.5") == [0.0, 0.5, 1.0]
    assert read_strengths("-0.5,0,2") == [-0.5, 0.0, 2.0]
    for text in ("", "a", "1;2", "nan", "inf,1", "0"):
        with pytest.raises(ConfigError, match="--strengths"):
            read_strengths(text)


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


redness.features = lambda images: torch.ones(len(images), 1)  # to which all pictures are the same


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """A run of two steps on redness, which greenness watches."""
    folder = tmp_path_factory.mktemp("strengths")
    tiny.stable_diffusion().save_pretrained(folder / "tiny")
    settings = {
        "model": {"name": str(folder / "tiny")},
        "sampling": {"num_inference_steps": 3, "guidance_scale": 3.0},
        "estimator": {"truncation": {"kind": "last", "steps": 2}},
        "rewards": {"red": {"target": "test_strengths:redness", "weight": 2.0}},
        "judges": {"green": {"target": "test_strengths:greenness"}},
        "prompts": {"train": ["a cat", "a dog", "a hen"], "unseen": ["a fox", "an ox"]},
        "optimizer": {"learning_rate": 0.05},
        "training": {"steps": 4, "batch_size": 2},
        "evaluation": {"every": 2, "images_per_prompt": 2, "batch_size": 3, "seed": 7, "num_train_prompts": 2},
        "guard": {"keep": "reward", "max_fall": 0.3, "window": None, "min_diversity": None, "max_saturated": None},
    }
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    result = command("train", recipe, "--output", folder / "run", "--no-probe")
    assert result.exit_code == 0, result.output
    return folder / "run"


def greenness(images, prompts):
    return images[:, 1].mean((1, 2))


greenness.features = lambda images: torch.nn.functional.normalize(images.flatten(1) - 0.5, dim=1)


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_every_strength_is_measured_against_the_base_model(a_run):
    result = command("evaluate", a_run, "--strengths", "0.5,1", "--images-per-prompt", 2, "--json")
    found = json.loads(result.output)
    lines = {line["step"]: line for line in found["strengths"]}
    assert list(lines) == [0.0, 0.5, 1.0]
    plain = json.loads(command("evaluate", a_run, "--images-per-prompt", 2, "--json").output)
    for prompts in ("unseen", "train"):
        for strength, label in ((0.0, "base"), (1.0, "adapter")):
            rewards = lines[strength]["sets"][prompts]["rewards"]
            assert rewards["red"]["mean"] == pytest.approx(plain[prompts][label]["rewards"]["red"]["mean"], abs=1e-6)
            assert lines[strength]["sets"][prompts]["reward"]["mean"] == pytest.approx(2 * rewards["red"]["mean"])
        distances = [lines[strength]["sets"][prompts]["distance"] for strength in (0.0, 0.5, 1.0)]
        assert distances[0] == 0 and distances[0] < distances[1] < distances[2]
    assert not (a_run / "strengths.html").exists()


def test_the_numbers_are_those_of_the_runs_own_evaluations(a_run, monkeypatch):
    sample, sizes = Sampler.sample, []
    monkeypatch.setattr(Sampler, "sample", lambda self, *batch: (sizes.append(len(batch[1])), sample(self, *batch))[1])
    found = json.loads(command("evaluate", a_run, "--strengths", "1", "--json").output)["strengths"]
    assert sizes == [3, 1] * 4  # of two strengths, on two sets of four pictures
    first, *_, kept = (line for line in RunFolder(a_run).evaluations.read() if line["kept"])
    for line, own in zip(found, (first, kept), strict=True):
        for prompts in ("unseen", "train"):
            for name in ("red", "green"):
                own_mean = own["sets"][prompts]["rewards"][name]["mean"]
                assert line["sets"][prompts]["rewards"][name]["mean"] == pytest.approx(own_mean, abs=1e-6)
    other = json.loads(command("evaluate", a_run, "--strengths", "1", "--seed", 5, "--json").output)["strengths"]
    assert other[0]["sets"]["unseen"]["rewards"]["red"] != found[0]["sets"]["unseen"]["rewards"]["red"]


def test_diversity_is_in_the_eyes_of_a_judge_as_in_training(a_run):
    """The reward that is trained may be blind to what it destroys, as this one is to any difference."""
    own = RunFolder(a_run).evaluations.read()[0]["sets"]["unseen"]["feature_diversity"]
    assert own > 1e-3
    found = json.loads(command("evaluate", a_run, "--strengths", "1", "--json").output)["strengths"]
    plain = json.loads(command("evaluate", a_run, "--json").output)
    for measured in (found[0]["sets"]["unseen"], plain["unseen"]["base"]):
        assert list(measured["rewards"]) == ["red", "green"]
        assert measured["feature_diversity"] == pytest.approx(own, abs=1e-6)


def test_a_judge_that_is_trained_as_well_is_measured_among_the_rewards():
    config = Config(rewards={"redness": 1.0, "brightness": 2.0}, judges=["redness", "jpeg-size"])
    rewards, _ = measures(config, [], "animals", torch.device("cpu"))
    assert list(rewards) == ["redness", "brightness", "jpeg-size"]


@pytest.mark.parametrize(("keep", "guarded"), [("reward", False), ("guarded", True)])
def test_the_best_strength_is_the_best_by_the_runs_own_guard(a_run, keep, guarded):
    config = yaml.safe_load((a_run / "config.yaml").read_text())
    config["guard"] |= {"keep": keep, "judge_weight": 50.0}  # so that half of what it costs is too much
    (a_run / "config.yaml").write_text(yaml.safe_dump(config))
    found = json.loads(command("evaluate", a_run, "--strengths", "0.1,0.4,1", "--seed", 0, "--json").output)
    lines = found["strengths"]
    rewards = {line["step"]: line["sets"]["unseen"]["reward"]["mean"] for line in lines}
    highest = max(rewards, key=rewards.get)
    assert (found["best"] != highest) is guarded
    if guarded:
        guard = Guard(**config["guard"])
        worth = {line["step"]: guard.worth(lines[0], line) for line in lines}
        assert found["best"] == max(worth, key=worth.get)
    greens = [line["sets"]["unseen"]["rewards"]["green"] for line in lines]
    fallen = [green["mean"] < greens[0]["mean"] - 0.3 * greens[0]["std"] for green in greens]
    assert fallen == [bool(line["alarms"]) for line in lines] and any(fallen) and not all(fallen[1:])


def test_a_page_shows_all_of_it(a_run, tmp_path):
    result = command(
        "evaluate", a_run, "--strengths", "0.5,1", "--images-per-prompt", 1, "--output", tmp_path / "s.html"
    )
    assert result.exit_code == 0, result.output
    assert "best" in result.output and "Wrote" in result.output
    page = (tmp_path / "s.html").read_text()
    assert page.count("data:image") == 3 and "strength 0.5" in page and "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strengths", "1"), "--strengths needs a run or --adapter"),
        (("RUN", "--strengths", "half"), "--strengths=half needs numbers"),
    ],
)
def test_mistakes_are_told_before_anything_loads(a_run, arguments, message):
    result = command("evaluate", *(a_run if each == "RUN" else each for each in arguments))
    assert result.exit_code == 2 and message in " ".join(result.output.split())
