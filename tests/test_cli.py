"""The command line, from end to end on a tiny pipeline, and what a person sees when something is wrong."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny
from alignprop import emoji
from alignprop.cli import app
from alignprop.config import recipes
from alignprop.rollout import Sampler
from alignprop.runfolder import RunFolder
from zoo import ROWS

COMMANDS = ("train", "check", "sample", "evaluate", "export", "recipes", "rewards", "report")
needs_emoji = pytest.mark.skipif(
    not (emoji.WEIGHTS / "model_index.json").exists(), reason="the embedded model's weights are not built yet"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Stable Diffusion in a folder."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny.stable_diffusion().save_pretrained(path)
    return path


@pytest.fixture
def recipe(model, tmp_path, monkeypatch):
    """A recipe that trains it for four steps; the working directory is ours."""
    monkeypatch.chdir(tmp_path)
    settings = {
        "description": "Red pictures from a tiny model",
        "model": {"name": str(model)},
        "sampling": {"num_inference_steps": 3, "guidance_scale": 3.0},
        "estimator": {"truncation": {"kind": "last", "steps": 1}},
        "rewards": {"redness": 1.0},
        "judges": ["brightness"],
        "prompts": {"train": ["a cat", "a dog", "a hen"], "unseen": ["a fox", "an ox"]},
        "optimizer": {"learning_rate": 0.02},
        "training": {"steps": 4, "batch_size": 2},
        "evaluation": {"every": 2, "images_per_prompt": 2, "num_train_prompts": 2},
        "checkpoints": {"every": 2},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def trained(recipe, output, *arguments):
    result = run("train", recipe, "--output", output, "--no-probe", *arguments)
    assert result.exit_code == 0, result.output
    return result


def without_timings(lines):
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "train_seconds", "peak_memory_mb")} for line in lines
    ]


def test_train_writes_a_run_and_says_what_came_out(recipe, tmp_path):
    result = run("train", recipe, "--output", "runs/a")
    assert result.exit_code == 0, result.output
    folder = RunFolder(tmp_path / "runs" / "a")
    assert [line["step"] for line in folder.metrics.read()] == [1, 2, 3, 4]
    assert [line["step"] for line in folder.evaluations.read()] == [0, 2, 4]
    assert {name: sets["num_images"] for name, sets in folder.evaluations.read()[0]["sets"].items()} == {
        "unseen": 4,
        "train": 4,
    }
    made = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "evaluation.jsonl",
        "report.html",
        "adapter/pytorch_lora_weights.safetensors",
        "samples/step-000000/unseen.png",
        "samples/step-000004/train.png",
        "checkpoints/step-000002/state.json",
        "checkpoints/step-000004/state.safetensors",
    } <= made
    settings = yaml.safe_load(folder.config.read_text())
    assert (settings["run"], settings["optimizer"]["betas"]) == ({"name": "a", "folder": "runs"}, [0.9, 0.999])
    assert result.output.count("✓") == 5
    first, *_, last = (line["sets"]["unseen"]["rewards"]["redness"]["mean"] for line in folder.evaluations.read())
    assert f"redness {last:.3g} ({last - first:+.2g})" in result.output
    for told in (
        "1 × redness; watched: brightness",
        "step 0 on unseen",
        "runs/a/report.html",
        "load_lora_weights('runs/a/adapter')",
    ):
        assert told in result.output


def test_the_code_that_is_printed_loads_the_adapter(recipe, tmp_path):
    result = trained(recipe, "a", "--set", "training.steps=1")
    code = result.output.partition("Use it:")[2]
    exec("\n".join(line.strip() for line in code.splitlines()), {})
    assert Image.open("fox.png").size == (16, 16)


def test_a_run_that_is_resumed_is_the_run_that_never_stopped(recipe, tmp_path):
    trained(recipe, "whole")
    trained(recipe, "parts", "--set", "training.steps=2")
    settings = yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text())
    assert settings["training"]["steps"] == 2
    result = run("train", "--resume", "parts", "--set", "training.steps=4", "--no-probe")
    assert result.exit_code == 0, result.output
    assert "Going on after step 2." in result.output
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    assert without_timings(parts.metrics.read()) == without_timings(whole.metrics.read())
    assert without_timings(parts.evaluations.read()) == without_timings(whole.evaluations.read())
    state = "checkpoints/step-000004/state.safetensors"
    one, other = load_file(whole.path / state), load_file(parts.path / state)
    assert one.keys() == other.keys() and all((value == other[name]).all() for name, value in one.items())


def test_ctrl_c_leaves_a_run_that_can_be_resumed(recipe, tmp_path):
    command = [sys.executable, "-m", "alignprop.cli", "train", str(recipe), "--output", "a", "--no-probe"]
    command += ["--set", "training.steps=5000", "--set", "checkpoints.every=10000", "--set", "evaluation.every=10000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder, deadline = RunFolder(tmp_path / "a"), time.monotonic() + 200
    while len(folder.metrics.read()) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    done = len(folder.metrics.read())
    assert f"Stopped after step {done} of 5000." in output and "alignprop train --resume a" in output
    assert "Traceback" not in output
    assert [path.name for path in folder.checkpoints.iterdir()] == [f"step-{done:06d}"]
    result = run("train", "--resume", "a", "--set", f"training.steps={done + 1}", "--no-probe")
    assert result.exit_code == 0, result.output
    assert len(folder.metrics.read()) == done + 1


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again(recipe, tmp_path):
    trained(recipe, "a", "--set", "training.steps=1", "--set", "checkpoints.every=1")
    checkpoint = tmp_path / "a" / "checkpoints"
    checkpoint.rename(tmp_path / "elsewhere")
    assert run("train", "--resume", "a", "--no-probe").exit_code == 0
    assert [line["step"] for line in RunFolder(tmp_path / "a").metrics.read()] == [1]


def test_what_is_there_is_never_overwritten(recipe, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("all of it")
    result = run("train", recipe, "--output", "a")
    assert result.exit_code == 2
    assert "a is not empty: go on with `alignprop train --resume a`, or give another folder" in result.stderr
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["thesis.tex"]


def test_a_truncated_checkpoint_is_refused_by_name(recipe, tmp_path):
    trained(recipe, "a", "--set", "training.steps=2")
    file = tmp_path / "a" / "checkpoints" / "step-000002" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    result = run("train", "--resume", "a", "--no-probe")
    assert result.exit_code == 1
    assert "step-000002 is damaged" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["train", "emojy"], 2, "did you mean 'emoji'?"),
        (["train", "--set", "prompts.train=none.txt"], 2, "prompts.train='none.txt' cannot be read"),
        (["train", "--set", "rewards.rednes=1"], 2, "did you mean 'redness'?"),
        (["train", "--set", "training.steps=0", "--set", "a=1"], 2, "2 settings cannot be used:"),
        (["train", "--resume", "nowhere"], 1, "nowhere is no run: it has no config.yaml."),
        (["train", "emoji", "--resume", "x"], 2, "--resume takes everything from the run"),
        (["sample", "-p", "a cat", "--adapter", "nowhere"], 1, "holds no pytorch_lora_weights.safetensors"),
        (["sample", "-p", "a cat", "--compare"], 2, "--compare needs --adapter"),
        (["sample", "-p", "a cat", "--model", "no/such-model"], 2, "download it elsewhere"),
        (["report", "nowhere"], 1, "nowhere is no run"),
        (["recipes", "emojy"], 2, "did you mean 'emoji'?"),
    ],
)
def test_a_mistake_is_one_message_without_a_traceback(arguments, code, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert told in result.stderr
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_settings_that_do_not_fit_the_pipeline_are_refused(recipe):
    result = run("train", recipe, "--output", "a", "--set", "sampling.extra={clip_skp: 1, strength: 2}")
    assert result.exit_code == 2
    assert (
        "sampling.extra.clip_skp is no argument of StableDiffusionPipeline; did you mean 'clip_skip'?" in result.stderr
    )
    result = run("train", recipe, "--output", "a", "--set", "model.scheduler=FlowMatchEulerDiscreteScheduler")
    assert "does not go with a model made for DDIMScheduler" in result.stderr


def test_a_reward_that_cannot_train_is_found_before_the_first_step(recipe, tmp_path):
    (tmp_path / "blind.py").write_text("def score(images, prompts):\n    return images.detach().mean((1, 2, 3))\n")
    for arguments in (["check", recipe], ["train", recipe, "--output", "a"]):
        result = run(*arguments, "--set", "rewards={blind:score: 1}")
        assert result.exit_code == 1
        assert "✗ reward: " in result.output and "gives no gradient to the pixels" in result.output
    assert not (tmp_path / "a").exists()


def test_a_reward_that_stops_being_finite_ends_the_run_with_a_remedy(recipe, tmp_path):
    code = "import torch\ncalls = []\ndef score(images, prompts):\n    calls.append(0)\n"
    code += "    return images.mean((1, 2, 3)) + (float('nan') if len(calls) > 12 else 0)\n"
    (tmp_path / "fragile.py").write_text(code)
    arguments = ["--set", "rewards={fragile:score: 1}", "--set", "evaluation=null", "--set", "training.steps=20"]
    result = run("train", recipe, "--output", "a", "--no-probe", *arguments)
    assert result.exit_code == 1
    assert "step 13: reward 'fragile:score' is not finite" in result.stderr
    assert "alignprop train --resume a --set" in result.stderr
    assert (tmp_path / "a" / "checkpoints" / "step-000012").exists()


def test_without_evaluation_the_last_adapter_is_kept(recipe, tmp_path):
    trained(recipe, "a", "--set", "evaluation=null", "--set", "training.steps=2")
    kept = load_file(tmp_path / "a" / "adapter" / "pytorch_lora_weights.safetensors")
    state = load_file(tmp_path / "a" / "checkpoints" / "step-000002" / "state.safetensors")
    trained_up = sorted(value.norm().item() for name, value in state.items() if "adapter/" in name and "lora_B" in name)
    assert sorted(value.norm().item() for name, value in kept.items() if "lora_B" in name) == pytest.approx(trained_up)
    assert trained_up[-1] > 0


def test_automatic_checkpointing_keeps_to_the_memory_given(recipe, tmp_path):
    from alignprop.config import build, load_config
    from alignprop.memory import MemoryPlan

    def plan(memory_gb):
        overrides = [
            "estimator.checkpointing=auto",
            f"estimator.memory_gb={memory_gb}",
            "estimator.truncation={kind: all}",
        ]
        trainer = build(load_config(recipe, overrides), tmp_path / "a")
        assert all(parameter.grad is None for parameter in trainer.parameters.values())
        return trainer.estimator.checkpointing

    assert isinstance(plan(100), MemoryPlan)
    assert plan(100)(3) == "none"
    assert plan(1e-6)(3) != "none"


def test_sample_draws_the_pipelines_pictures_at_the_seeds_asked_for(model, recipe, tmp_path):
    trained(recipe, "a", "--set", "training.steps=2", "--set", "optimizer.learning_rate=0.5")
    assert (
        run("sample", "-p", "a fox", "--seed", 7, "--model", model, "--steps", 3, "--output", "one.png").exit_code == 0
    )
    assert Image.open("one.png").size == (16, 16)
    assert run("sample", "-p", "a fox", "--seed", 7, "--adapter", "a", "--output", "tuned.png").exit_code == 0
    assert run("sample", "-p", "a fox", "--seed", 7, "--adapter", "a/adapter", "--output", "again.png").exit_code == 0
    assert (tmp_path / "tuned.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    result = run(
        "sample",
        "-p",
        "a fox",
        "-p",
        "an ox",
        "-n",
        2,
        "--seed",
        7,
        "--adapter",
        "a",
        "--compare",
        "--output",
        "all.png",
    )
    assert result.exit_code == 0, result.output
    grid, tuned = Image.open("all.png").convert("RGB"), Image.open("tuned.png").convert("RGB")
    # The first row of the second column is the adapter's picture of the first prompt, enlarged 8 times.
    column = 6 + 128 + 6
    assert (
        grid.crop((column, 24, column + 128, 152)).resize((16, 16), Image.Resampling.NEAREST).tobytes()
        == tuned.tobytes()
    )


def test_evaluate_measures_what_the_run_measured(recipe, tmp_path, monkeypatch):
    trained(recipe, "a", "--set", "evaluation.seed=3", "--set", "evaluation.batch_size=3")
    sample, sizes = Sampler.sample, []
    monkeypatch.setattr(Sampler, "sample", lambda self, *batch: (sizes.append(len(batch[1])), sample(self, *batch))[1])
    result = run("evaluate", "a", "--json")
    assert result.exit_code == 0, result.output
    assert sizes == [3, 1] * 4  # of the base model and the adapter, on two sets of four pictures
    measured, lines = json.loads(result.stdout), RunFolder(tmp_path / "a").evaluations.read()
    kept = [line for line in lines if line["kept"]][-1]
    for name in ("unseen", "train"):
        for label, line in (("base", lines[0]), ("adapter", kept)):
            for reward, score in line["sets"][name]["rewards"].items():
                assert measured[name][label]["rewards"][reward]["mean"] == pytest.approx(score["mean"], abs=1e-6)
    other = json.loads(run("evaluate", "a", "--seed", 4, "--json").stdout)
    assert other["unseen"]["base"]["rewards"]["redness"] != measured["unseen"]["base"]["rewards"]["redness"]
    table = run("evaluate", "a", "--reward", "brightness", "--images-per-prompt", 1).output
    assert "unseen prompts: 2 prompts, 2 images" in table and "brightness" in table and "redness" not in table


def test_export_writes_for_other_programs(recipe, model, tmp_path):
    trained(recipe, "a")
    assert run("export", "a").exit_code == 0
    clean = tiny.stable_diffusion()
    clean.load_lora_weights("a/adapter", weight_name="kohya.safetensors")
    assert run("export", "a", "--format", "merged", "--output", "merged").exit_code == 0
    merged = StableDiffusionPipeline.from_pretrained("merged", safety_checker=None)
    theirs, ours = (Sampler(p, tiny.CALL).sample(tiny.PROMPTS, [0, 1]) for p in (merged, clean))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert "no pytorch_lora_weights.safetensors" in run("export", tmp_path).output.replace("\n", " ")


def test_recipes_rewards_version_and_report(recipe, tmp_path):
    listed = run("recipes").output
    assert all(name in listed and row.description in listed for name, row in recipes().items())
    assert run("recipes", "emoji").output == recipes()["emoji"].path.read_text()
    assert "jpeg-compressibility" in run("rewards").output
    assert run("--version").output.startswith("alignprop ")
    trained(recipe, "a", "--set", "training.steps=1")
    (tmp_path / "a" / "report.html").unlink()
    assert run("report", "a").exit_code == 0
    assert (tmp_path / "a" / "report.html").stat().st_size > 1000


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_fits_a_narrow_terminal(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "60", "TERMINAL_WIDTH": "60"})
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 60
    assert f"alignprop {command}" in result.output


def test_two_processes_choose_one_folder_and_print_once(recipe, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "alignprop.cli", "train"]
    command += [str(recipe), "--no-probe", "--set", "training.steps=2", "--set", "training.num_threads=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("tiny-")
    assert [line["images_scored"] for line in RunFolder(folder).metrics.read()] == [4, 8]
    assert result.stdout.count("Adapter: ") == 1
    assert (folder / "report.html").exists()


@needs_emoji
@pytest.mark.parametrize("name", [name for name in recipes() if name.startswith("emoji")])
def test_every_recipe_trains_two_steps(name, tmp_path):
    small = ("training={steps: 2, batch_size: 2}", "evaluation.images_per_prompt=1")
    arguments = [part for setting in (*small, "evaluation.num_train_prompts=1") for part in ("--set", setting)]
    result = run("train", name, "--output", tmp_path / "a", "--no-probe", *arguments)
    assert result.exit_code == 0, result.output
    lines = RunFolder(tmp_path / "a").evaluations.read()
    assert [line["step"] for line in lines] == [0, 2]
    first, last = (line["sets"]["train"]["reward"]["mean"] for line in lines)
    assert first != last
    assert "emoji.pipeline()" in result.output


def row(name):
    return next(row.build for row in ROWS if row.name == name)


STAND_INS = {
    "flux-dev-hps": row("Flux"),
    "sd-turbo-pickscore": row("SD-Turbo"),
    "sd15-aesthetic": row("Stable Diffusion 1.5"),
    "sd35-hps": functools.partial(tiny.stable_diffusion_3, t5=True),
    "sdxl-hps": row("SDXL"),
}
"""Tiny pipelines of the family that a recipe is made for."""


@pytest.mark.parametrize("name", [name for name in recipes() if not name.startswith("emoji")])
def test_every_recipe_of_a_large_model_trains_a_tiny_one_of_its_family(name, tmp_path):
    """All settings are the recipe's own, but for the sizes and the rewards, whose weights are not here."""
    STAND_INS[name](torch.float32).save_pretrained(tmp_path / "model")
    changes = {
        "model.name": tmp_path / "model",
        "model.variant": "null",
        "sampling.height": 16,
        "sampling.width": 16,
        "rewards": "{redness: 1}",
        "judges": "[brightness]",
        "training": "{steps: 2, batch_size: 1, accumulation: 2}",
        "evaluation": "{images_per_prompt: 1, num_train_prompts: 1}",
        "prompts": "{train: [a cat, a dog], unseen: [a fox]}",
    }
    settings = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    result = run("train", name, "--output", tmp_path / "a", *settings)
    assert result.exit_code == 0, result.output
    first, last = (line["sets"]["train"]["reward"]["mean"] for line in RunFolder(tmp_path / "a").evaluations.read())
    assert first != last


@needs_emoji
def test_no_arguments_at_all_draw_with_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("sample", "-p", "a fox", "--steps", 4).exit_code == 0
    assert Image.open("sample.png").size == (emoji.IMAGE_SIZE, emoji.IMAGE_SIZE)
