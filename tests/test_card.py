"""The model card beside an adapter."""

import yaml
from PIL import Image

from alignprop.card import write_card
from alignprop.runfolder import RunFolder


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
    assert "4.00 → 6.00" in text and "pipe.load_lora_weights('adapter')" in text
    assert "judge, not trained, fell" in text  # a card that keeps quiet about this would be advertising
    with Image.open(folder.adapter / "comparison.png") as both:
        assert both.size == (40, 60)
        assert both.getpixel((5, 5)) == (0, 0, 255) and both.getpixel((5, 35)) == (255, 0, 0)
