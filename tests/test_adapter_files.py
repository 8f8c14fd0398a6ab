"""Where adapters are found: in a run, in a folder of their own, or in none that only has one somewhere inside."""

import json
import shutil

import pytest
import torch
import yaml
from typer.testing import CliRunner

from alignprop.adapter_files import DIFFUSERS_FILE, FACTS_FILE, PEFT_FILE, facts_of, holds_adapter, load_adapter
from alignprop.adapters import Adapter, Full, Lora
from alignprop.cli import app
from alignprop.drawing import adapter_folder
from alignprop.mixing import Member, mix, read_adapter, save_mixture
from alignprop.rollout import Sampler
from alignprop.spec import DENOISER_NAMES, PipelineSpec
from zoo.stable_diffusion import ROWS
from zoo.video import ROWS as VIDEOS

PIXART = next(row for row in ROWS if row.name == "PixArt-Sigma")
WAN = next(row for row in VIDEOS if row.name == "Wan 2.2")
TWO_FOLDERS = PipelineSpec(("transformer", "transformer_2"), "vae", lora_files=False)
SEEDS = [0, 1]


def succeeded(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of a pipeline that diffusers loads no LoRA file into."""
    path = tmp_path_factory.mktemp("runs")
    PIXART.build(torch.float32).save_pretrained(path / "model")
    known = ("num_inference_steps", "guidance_scale")
    for name, reward in {"red": "redness", "bright": "brightness"}.items():
        settings = {
            "model": {"name": str(path / "model")},
            "sampling": {
                **{key: PIXART.call[key] for key in known},
                "extra": {key: value for key, value in PIXART.call.items() if key not in known},
            },
            "estimator": {"truncation": {"kind": "last", "steps": 1}},
            "rewards": {reward: 1.0},
            "prompts": {"train": ["a cat", "a dog"], "unseen": ["a fox", "an ox"]},
            "optimizer": {"learning_rate": 0.1},
            "training": {"steps": 2, "batch_size": 2},
            "evaluation": {"every": 2, "images_per_prompt": 1},
            "guard": None,
        }
        (path / "recipe.yaml").write_text(yaml.safe_dump(settings))
        succeeded("train", path / "recipe.yaml", "--output", path / name, "--no-probe")
    return path


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_not_the_adapter_that_peft_wrote_into_it(runs):
    run, adapter = runs / "red", runs / "red" / "adapter"
    assert {"adapter_config.json", PEFT_FILE} <= files(adapter)
    assert (holds_adapter(run), holds_adapter(adapter)) == (False, True)
    assert adapter_folder(run) == adapter_folder(adapter) == adapter
    assert (facts_of(run), facts_of(adapter)["pipeline"]) == ({}, "PixArtSigmaPipeline")
    for folder in (run, run / "checkpoints", runs):
        with pytest.raises(ValueError, match=f"holds no {DIFFUSERS_FILE} and no {PEFT_FILE}"):
            read_adapter(folder)


def test_such_a_run_is_sampled_and_evaluated_by_its_folder(runs, tmp_path):
    drawn = {}
    for name, folder in {"run": runs / "red", "adapter": runs / "red" / "adapter"}.items():
        succeeded("sample", "-p", "a fox", "--adapter", folder, "--output", tmp_path / f"{name}.png")
        drawn[name] = (tmp_path / f"{name}.png").read_bytes()
    assert drawn["run"] == drawn["adapter"]
    measured = json.loads(succeeded("evaluate", runs / "red", "--json"))["train"]
    base, tuned = (measured[label]["rewards"]["redness"]["mean"] for label in ("base", "adapter"))
    assert tuned > base + 0.01
    assert "best" in succeeded("evaluate", runs / "red", "--strengths", "0.5,1")


@pytest.mark.parametrize("second", ["bright", "bright/adapter"])
def test_such_runs_are_mixed(runs, tmp_path, second):
    succeeded("mix", runs / "red", runs / second, "--weights", "0.25,0.75", "--output", tmp_path / "m")
    assert files(tmp_path / "m") == {"README.md", "adapter_config.json", PEFT_FILE}
    stored = [read_adapter(runs / name / "adapter") for name in ("red", "bright")]
    expected = mix([Member("a", stored[0].updates, 0.25), Member("b", stored[1].updates, 0.75)]).updates
    found = read_adapter(tmp_path / "m").updates
    assert found.keys() == expected.keys() and all(name.startswith("denoiser.") for name in found)
    for name, update in expected.items():
        torch.testing.assert_close(found[name].delta, update.delta, rtol=0, atol=1e-6)


def test_a_mixture_by_denoising_steps_is_no_adapter_with_its_members_as_parts(runs, tmp_path):
    steps = ("--weights", "1,0", "--late-weights", "0,1")
    succeeded("mix", runs / "red", runs / "bright", *steps, "--output", tmp_path / "s")
    assert {f"member-{i}/{PEFT_FILE}" for i in (0, 1)} <= files(tmp_path / "s")
    assert not holds_adapter(tmp_path / "s") and adapter_folder(tmp_path / "s") == tmp_path / "s"
    with pytest.raises(ValueError, match=f"no {PEFT_FILE}: give an adapter's folder"):
        read_adapter(tmp_path / "s")


def saved(folder, seed):
    """An adapter of both denoisers of Wan 2.2, each in a folder of its own."""
    adapter = Adapter(WAN.build(torch.float32), Lora(rank=2), spec=TWO_FOLDERS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapter.save(folder, {"seed": seed})


def test_an_adapter_with_a_folder_for_each_denoiser_is_found_whole(tmp_path):
    for seed, run in enumerate("ab"):
        saved(tmp_path / run / "adapter", seed)
    first = tmp_path / "a" / "adapter"
    assert files(first) >= {f"transformer/{PEFT_FILE}", f"transformer_2/{PEFT_FILE}"}
    assert adapter_folder(tmp_path / "a") == adapter_folder(first) == first
    assert facts_of(first)["seed"] == 0
    stored = [read_adapter(adapter_folder(tmp_path / run)) for run in "ab"]
    assert {name.split(".")[0] for name in stored[0].updates} == {"transformer", "transformer_2"}
    assert {str(file.relative_to(first)) for file in stored[0].files} == files(first)
    save_mixture(mix([Member("a", stored[0].updates, 1.0), Member("b", stored[1].updates, 0.0)]), "peft", tmp_path, {})
    drawn = []
    for folder in (first, tmp_path, None):
        pipeline = WAN.build(torch.float32)
        if folder is not None:
            load_adapter(pipeline, folder, spec=TWO_FOLDERS)
        drawn.append(Sampler(pipeline, WAN.call, TWO_FOLDERS).sample(WAN.prompts, SEEDS))
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=2e-6)
    assert (drawn[0] - drawn[2]).abs().max() > 1e-3


def test_a_part_without_its_settings_is_told_and_not_left_out(tmp_path):
    saved(tmp_path, 0)
    (tmp_path / "transformer_2" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"transformer_2 holds no adapter_config\.json beside its adapter_model"):
        read_adapter(tmp_path)


def test_the_other_layouts_and_folders_of_several_adapters(runs, tmp_path):
    Full().attach(PIXART.build(torch.float32)).save(tmp_path / "full" / "adapter")
    assert adapter_folder(tmp_path / "full") == tmp_path / "full" / "adapter"
    assert (tmp_path / "full" / "adapter" / FACTS_FILE).is_file()
    (tmp_path / "plain" / "adapter").mkdir(parents=True)
    (tmp_path / "plain" / "adapter" / DIFFUSERS_FILE).touch()
    assert adapter_folder(tmp_path / "plain") == tmp_path / "plain" / "adapter"
    for name in ("red", "bright"):
        shutil.copytree(runs / name / "adapter", tmp_path / "several" / name)
    for folder in ("several", "nowhere"):
        with pytest.raises(ValueError, match=f"{folder}' holds no {DIFFUSERS_FILE}: give an adapter's folder"):
            adapter_folder(tmp_path / folder)


def test_denoisers_are_known_by_the_names_of_all_pipelines():
    assert set(DENOISER_NAMES) >= {"unet", "transformer", "transformer_2", "decoder"}
