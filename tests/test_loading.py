"""Loading of models: folders, files and names on the hub, and what is said when there is none."""

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import tiny
from alignprop.config import ConfigError
from alignprop.config.building import load_pipeline
from alignprop.config.settings import Model


@pytest.fixture
def asked(monkeypatch):
    """Loads a tiny pipeline and notes what was asked for."""
    calls = []

    def note(method):
        def load(cls, name, **arguments):
            calls.append((cls.__name__, method, name, arguments))
            return tiny.stable_diffusion()

        return classmethod(load)

    for method in ("from_pretrained", "from_single_file"):
        for cls in (
            diffusers.DiffusionPipeline,
            diffusers.StableDiffusionPipeline,
            diffusers.StableDiffusionXLPipeline,
        ):
            monkeypatch.setattr(cls, method, note(method), raising=False)
    return calls


def test_a_name_on_the_hub_is_asked_for_with_revision_and_variant(asked):
    load_pipeline(Model(name="owner/model", revision="abc", variant="fp16", dtype="bf16"))
    expected = {"torch_dtype": torch.bfloat16, "revision": "abc", "variant": "fp16"}
    assert asked == [("DiffusionPipeline", "from_pretrained", "owner/model", expected)]


def test_a_file_is_read_as_the_pipeline_that_was_named(asked, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(1)}, file)
    load_pipeline(Model(name=str(file)))
    load_pipeline(Model(name=str(file), pipeline="StableDiffusionXLPipeline", config=str(tmp_path)))
    assert [(name, method) for name, method, *_ in asked] == [
        ("StableDiffusionPipeline", "from_single_file"),
        ("StableDiffusionXLPipeline", "from_single_file"),
    ]
    assert "config" not in asked[0][-1]
    assert asked[1][-1]["config"] == str(tmp_path)


def test_a_file_of_a_pipeline_that_reads_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="DiTPipeline reads no single file"):
        load_pipeline(Model(name=_foreign_file(tmp_path), pipeline="DiTPipeline"))


def test_a_folder_is_loaded_whole(tmp_path):
    tiny.stable_diffusion().save_pretrained(tmp_path)
    assert isinstance(load_pipeline(Model(name=str(tmp_path))), diffusers.StableDiffusionPipeline)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda folder: "owner/nothing-like-this", "--set model.name=/path/to/model"),
        (lambda folder: str(folder / "absent"), "--set model.name=/path/to/model"),
        (lambda folder: str(folder), "give a folder with a model_index.json"),
        (lambda folder: _foreign_file(folder), "model.config"),
    ],
    ids=["hub", "absent folder", "empty folder", "foreign file"],
)
def test_without_a_model_the_error_says_what_was_looked_for_and_the_remedy(make, remedy, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = make(tmp_path)
    with pytest.raises(ConfigError) as raised:
        load_pipeline(Model(name=name))
    message = str(raised.value)
    assert name in message
    assert remedy in message
    assert "\n" not in message.strip()


def _foreign_file(folder):
    save_file({"weight": torch.zeros(1)}, folder / "foreign.safetensors")
    return str(folder / "foreign.safetensors")
