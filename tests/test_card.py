"""The model card beside an adapter."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from alignprop.adapter_files import DIFFUSERS_FILE, PEFT_FILE, SECOND_FILE
from alignprop.card import licence_of, write_card
from alignprop.config import Config
from alignprop.runfolder import RunFolder
from alignprop.terminal import loading_code


def run_folder(path):
    folder = RunFolder(path / "mine")
    folder.adapter.mkdir(parents=True)
    folder.config.write_text(yaml.safe_dump({"model": {"name": "emoji"}, "training": {"steps": 2}, "sampling": {}}))
    for step, score, judged in ((0, 4.0, 0.30), (2, 6.0, 0.20)):
        statistics = {
            "mine": {"mean": score, "std": 1.0, "sem": 0.1},
            "judge": {"mean": judged, "std": 0.1, "sem": 0.01},
        }
        unseen = {
            "num_prompts": 8,
            "num_images": 8,
            "reward": statistics["mine"],
            "rewards": statistics,
            "diversity": 0.1,
        }
        line = {"step": step, "images_scored": 8 * step, "seconds": 1.0, "kept": True, "trained": ["mine"]}
        folder.evaluations.append({**line, "sets": {"unseen": unseen}})
        folder.samples(step).mkdir(parents=True)
        Image.new("RGB", (40, 30), "red" if step else "blue").save(folder.samples(step) / "unseen.png")
    return folder


def test_the_card_tells_the_outcome_the_base_and_how_to_load(tmp_path):
    folder = run_folder(tmp_path)
    text = write_card(folder.path, "pipe.load_lora_weights('adapter')", "9.9").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "emoji" and header["library_name"] == "diffusers"
    assert header["license"] == "apache-2.0"
    assert "4.00 → 6.00" in text and "pipe.load_lora_weights('adapter')" in text
    assert "judge, not trained, fell" in text  # a card that keeps quiet about this would be advertising
    with Image.open(folder.adapter / "comparison.png") as both:
        assert both.size == (40, 60)
        assert both.getpixel((5, 5)) == (0, 0, 255) and both.getpixel((5, 35)) == (255, 0, 0)


def test_the_licence_is_the_one_that_the_base_models_card_states(tmp_path):
    card = "---\nlicense: other\nlicense_name: flux-1-dev\ntags: [a]\n---\n\n# A model\n"
    (tmp_path / "README.md").write_text(card)
    assert licence_of(str(tmp_path)) == {"license": "other", "license_name": "flux-1-dev"}


@pytest.mark.parametrize("text", ["no header", "---\n: [\n---\n", "---\n- a list\n---\n", "---\nlicense:\n---\n"])
def test_a_licence_that_is_not_stated_is_left_out(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert licence_of(str(tmp_path)) == {}


@pytest.mark.parametrize("base", ["owner/not-in-the-cache", "no name: at all", "/absent/folder"])
def test_the_licence_of_a_model_that_is_not_here_is_left_out(base):
    assert licence_of(base) == {}


def test_the_lines_of_python_fit_what_is_in_the_folder(tmp_path):
    config = Config(model={"name": "owner/model", "dtype": "bf16"})
    (tmp_path / PEFT_FILE).touch()
    assert "load_adapter(pipe, 'adapter')" in loading_code(config, tmp_path, Path("adapter"))
    (tmp_path / DIFFUSERS_FILE).touch()
    code = loading_code(config, tmp_path, Path("adapter"))
    assert "pipe.load_lora_weights('adapter')" in code
    assert "import torch" in code and "torch_dtype=torch.bfloat16" in code
    (tmp_path / SECOND_FILE).touch()
    assert "load_adapter(pipe, 'adapter')" in loading_code(config, tmp_path, Path("adapter"))
