"""The reward doctor: it finds what is broken on purpose, measures what is known, and passes what ships."""

import functools
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tiny
from alignprop.cli import app
from alignprop.pixels import from_pil, to_pil
from alignprop.rewards import REWARDS, arguments_of, explanation_of, load_reward
from alignprop.rewards.colour import brightness, redness
from alignprop.rewards.doctor import examine
from alignprop.rewards.doctor.gradients import HALF_BOUND, HALF_COSINE
from alignprop.rewards.doctor.scores import COMPANY_BOUND, COMPANY_GRADIENT_BOUND
from alignprop.rewards.preprocessing import Preprocessing, compared
from alignprop.rewards.specimens import drawn_specimens, folder_specimens
from alignprop.trainer import Trainer
from pictures import photograph, waves
from test_blip_and_llava_rewards import llava  # noqa: F401  # a fixture
from test_blip_and_llava_rewards import published as blip  # noqa: F401
from test_clip_rewards import arguments_of as clip_arguments
from test_clip_rewards import published as clips  # noqa: F401
from test_clip_rewards import tiny_vit_h_14  # noqa: F401
from test_vision_rewards import (
    classifier_folder,
    detectors,  # noqa: F401
)

PROMPTS = ["a cat", "a dog", "a hen"]
SHIPPED = [name for name, card in REWARDS.items() if not card.downloads and name not in ("command", "http")]
DIFFERENTIABLE = [name for name in SHIPPED if REWARDS[name].differentiable]


def run(*arguments, columns=200):
    return CliRunner().invoke(app, ["rewards", *map(str, arguments)], env={"COLUMNS": str(columns)})


def examined(reward, images=None):
    diagnosis = examine(reward, waves(24, 32, batch=3) if images is None else images, PROMPTS, "mine")
    return {finding.name: finding for finding in diagnosis.findings}, diagnosis


# What is broken is found, by name


class Centred(torch.nn.Module):
    """Standardises the scores of a batch: no picture has a score of its own."""

    def forward(self, images, prompts):
        scores = images.pow(2).mean((1, 2, 3))
        return (scores - scores.mean()) / scores.std(correction=0).clamp_min(1e-3)


class BatchNorm(torch.nn.Module):
    """Forgotten in training mode, inside a function that `load_reward` cannot set to evaluation."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3).requires_grad_(False)

    def __call__(self, images, prompts):
        return self.norm(images).pow(2)[:, 0].mean((1, 2))


def in_place(images, prompts):
    images.mul_(0.5)
    return images.mean((1, 2, 3))


def leaky(images, prompts):
    """Beyond the bound of no score, and still company: only the gradient shows it."""
    return images.mean((1, 2, 3)) + 1e-6 * images.mean()


@pytest.mark.parametrize(
    ("reward", "name", "told"),
    [
        (lambda x, p: x.mean((2, 3)), "scores", "returned shape (3, 3); it must be (3,)"),
        (lambda x, p: x.mean(), "scores", "returned shape ()"),
        (lambda x, p: [1.0, 2.0, 3.0], "scores", "return a tensor"),
        (lambda x, p: (x.mean((1, 2, 3)) * 9).long(), "scores", "return floating point scores"),
        (lambda x, p: x.mean((1, 2, 3)) / 0, "scores", "not finite"),
        (lambda x, p: x.reshape(3, 5), "scores", "fails with RuntimeError"),
        (lambda x, p: x.nothing(), "scores", "fails with AttributeError"),
        (lambda x, p: 1 / x.mean((1, 2, 3)), "range", "not finite on black"),
        (lambda x, p: x.detach().mean((1, 2, 3)), "gradient", "gives no gradient to the pixels"),
        (lambda x, p: torch.from_numpy(x.detach().numpy().mean((1, 2, 3))), "gradient", "without detach"),
        (lambda x, p: (x * 255).round().mean((1, 2, 3)), "gradient", "exactly zero in every pixel value"),
        (lambda x, p: (x.mean((1, 2, 3)) > 0.5).float() + 0 * x.sum((1, 2, 3)), "gradient", "exactly zero in every"),
        (lambda x, p: x.clamp(2, 3).mean((1, 2, 3)), "gradient", "exactly zero in every"),
        (lambda x, p: (x - x.mean((1, 2, 3), True)).square().sum((1, 2, 3)).sqrt(), "gradient", "not finite on black"),
        (in_place, "input", "writes into the pictures"),
        (Centred(), "batch size", "mean over the batch"),
        (BatchNorm(), "batch size", "batch norm"),
        (leaky, "batch size", "gradient to its neighbours"),
    ],
)
def test_what_is_broken_is_found(reward, name, told):
    findings, diagnosis = examined(reward)
    assert diagnosis.broken
    assert findings[name].verdict == "broken"
    assert told in findings[name].detail
    others = {finding.name for finding in findings.values() if finding.verdict == "broken"} - {name}
    # Centred scores have no sum to climb, and what is infinite somewhere has no gradient there.
    assert others <= ({"gradient"} if name in ("batch size", "range") else set())


@pytest.mark.parametrize(
    ("reward", "name", "told"),
    [
        (
            lambda x, p: 0.5 + 1e-9 * x.mean((1, 2, 3)),
            "range",
            "all pictures score the same",
        ),
        (lambda x, p: x.var((2, 3)).mean(1), "range", "likes noise better"),
        (lambda x, p: x[:, :, :4, :4].mean((1, 2, 3)), "gradient", "look for a crop"),
        (lambda x, p: torch.nn.functional.dropout(x, 0.5).mean((1, 2, 3)), "repetition", "call eval()"),
        (lambda x, p: torch.sin(4000 * x.mean((1, 2, 3))), "ascent", "too sharp"),
    ],
)
def test_what_is_doubtful_is_a_warning(reward, name, told):
    findings, diagnosis = examined(reward)
    assert not diagnosis.broken, [f for f in findings.values() if f.verdict == "broken"]
    assert findings[name].verdict == "doubtful"
    assert told in findings[name].detail


def test_rounding_with_a_gradient_passed_through_promises_what_it_does_not_keep():
    def rounded(images, prompts):
        return (images.detach().mul(8).round() / 8 + images - images.detach()).mean((1, 2, 3))

    pictures = torch.full((3, 3, 24, 32), 0.5) + 0.02 * torch.arange(3).view(3, 1, 1, 1)
    findings, diagnosis = examined(rounded, pictures)
    assert not diagnosis.broken
    assert findings["ascent"].verdict == "doubtful"
    assert diagnosis.figures["kept_promise"] == pytest.approx(0, abs=1e-3)


def test_one_pixel_that_decides_all_is_a_warning():
    def fooled(images, prompts):
        return images.mean((1, 2, 3)) + 10 * (images[:, 0, ::1] < 0.01).any(2).any(1)

    findings, diagnosis = examined(fooled)
    assert findings["sensitivity"].verdict == "doubtful"
    assert "augment" in findings["sensitivity"].detail
    assert diagnosis.figures["one_pixel"] > 9


def test_company_is_found_without_a_gradient_too():
    class Ranks:
        differentiable = False

        def __call__(self, images, prompts):
            return images.mean((1, 2, 3)).argsort().argsort().float()

    findings, diagnosis = examined(Ranks())
    assert diagnosis.broken and "alone, pictures score differently by" in findings["batch size"].detail
    assert findings["gradient"].verdict == "idle"


def test_weights_that_get_a_gradient_are_told():
    layer = torch.nn.Conv2d(3, 2, 3)
    findings, diagnosis = examined(lambda images, prompts: layer(images).mean((1, 2, 3)))
    assert (findings["weights"].verdict, diagnosis.figures["weights_with_gradient"]) == ("doubtful", 56)
    assert layer.weight.grad is None  # the examination leaves nothing behind


# What is measured is what is known of simple rewards


def test_figures_of_brightness_are_those_of_its_formula():
    images = waves(24, 32, batch=3)
    diagnosis = examine(brightness, images, PROMPTS)
    assert not diagnosis.broken
    figures = diagnosis.figures
    number = 24 * 32
    luma = torch.tensor([0.299, 0.587, 0.114])
    scores = (images.mean((2, 3)) * luma).sum(1)
    assert figures["mean"] == pytest.approx(scores.mean().item(), abs=1e-6)
    assert figures["spread"] == pytest.approx(scores.std(correction=0).item(), rel=1e-4)
    assert (figures["black"], figures["grey"]) == (0, pytest.approx(0.5))
    assert figures["white"] == pytest.approx(1)
    assert figures["noise"] == pytest.approx(0.5, abs=0.02)
    assert figures["gradient_norm"] == pytest.approx((number * (luma / number).square().sum()).sqrt().item(), rel=1e-4)
    assert figures["zero_share"] == 0
    assert figures["kept_promise"] == pytest.approx(1, abs=0.01)
    assert 0.5 / number < figures["one_pixel"] <= 1.0001 / number
    assert figures["company"] <= 1e-6 and figures["company_gradient"] <= 1e-6
    assert figures["half"] < 0.01


def test_the_share_of_exact_zeros_is_that_of_the_pixels_left_out():
    _, diagnosis = examined(lambda images, prompts: images[:, :, :6].mean((1, 2, 3)))
    assert diagnosis.figures["zero_share"] == pytest.approx(0.75)


def test_memory_is_what_the_graph_holds_without_the_weights():
    module = torch.nn.Linear(96, 96).requires_grad_(False)

    class Reward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, images, prompts):
            return self.module(images.flatten(2)[:, :, :96]).exp().mean((1, 2))

    _, diagnosis = examined(Reward())
    kept = diagnosis.figures["kept_mb"] * 2**20
    assert kept == pytest.approx(3 * 96 * 4)  # what exp gave, 3 channels of 96 numbers a picture; not the 36 kB weights
    assert diagnosis.figures["weights"] == 96 * 96 + 96


# Preprocessing


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_is_compared_with_the_image_processor_that_it_was_read_from(interpolation):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    number = {"bilinear": 2, "bicubic": 3}[interpolation]
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}, resample=number
    )
    preprocess = Preprocessing.of(processor, "test")

    class Reward:
        def __call__(self, images, prompts):
            return preprocess(images).mean((1, 2, 3))

        def reference_pixels(self, images):
            return compared(preprocess, images)

    images = torch.cat([waves(50, 40, batch=2), from_pil([photograph(50, 40)])])
    findings, diagnosis = examined(Reward(), images)
    assert findings["preprocessing"].verdict == "sound", findings["preprocessing"].detail
    assert 0 < diagnosis.figures["preprocessing"] <= 0.02


def test_preprocessing_that_differs_is_told():
    class Blurred:
        def __call__(self, images, prompts):
            return images.mean((1, 2, 3))

        def reference_pixels(self, images):
            return images, images + 0.05

    class Cropped(Blurred):
        def reference_pixels(self, images):
            return images, images[:, :, 1:]

    assert examined(Blurred())[0]["preprocessing"].verdict == "doubtful"
    findings, diagnosis = examined(Cropped())
    assert diagnosis.broken and "another picture than it was made for" in findings["preprocessing"].detail
    assert examined(redness)[0]["preprocessing"].verdict == "idle"


# What ships is sound


@functools.cache
def examined_as_shipped(name):
    reward, drawings = load_reward(name), drawn()
    return reward, examine(reward, drawings.images, drawings.prompts, name)


@functools.cache
def drawn():
    return drawn_specimens()


@pytest.mark.parametrize("name", SHIPPED)
def test_rewards_that_ship_are_sound(name):
    reward, diagnosis = examined_as_shipped(name)
    if isinstance(reward, torch.nn.Module):
        assert all(not parameter.requires_grad for parameter in reward.parameters())
    assert not diagnosis.broken, diagnosis.findings
    doubtful = {finding.name for finding in diagnosis.findings if finding.verdict == "doubtful"}
    assert doubtful <= {"range"}  # some like noise, by what they measure
    if isinstance(reward, torch.nn.Module):
        assert all(parameter.grad is None for parameter in reward.parameters())
        told = float(re.match(r"[\d.]+", REWARDS[name].weights).group())
        assert told == pytest.approx(diagnosis.figures["weights"] / 1e6, rel=0.1)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_scores_and_gradients_agree_between_batch_sizes_and_precisions(name):
    figures = examined_as_shipped(name)[1].figures
    assert figures["company"] <= COMPANY_BOUND
    assert figures["company_gradient"] <= COMPANY_GRADIENT_BOUND
    assert figures["half"] <= HALF_BOUND
    assert figures["half_cosine"] >= HALF_COSINE


@pytest.fixture
def tiny_checkpoint(request, tmp_path):
    """Arguments that load a reward from a tiny checkpoint in the published layout."""

    def arguments(name):
        if name == "image-classifier":
            return {"model": classifier_folder(tmp_path)[0], "label": 1}
        if name == "objects":
            return {"model": request.getfixturevalue("detectors")["owlv2"][0]}
        if name == "vlm-question":
            return {"model": request.getfixturevalue("llava")[0]}
        if name == "image-reward":
            folder = str(request.getfixturevalue("blip")[0])
            return {"model": folder, "tokenizer": folder}
        return clip_arguments(name, request.getfixturevalue("clips")[0])

    return arguments


@pytest.mark.parametrize("name", [name for name, card in REWARDS.items() if card.downloads])
def test_learned_rewards_are_sound_on_tiny_checkpoints(name, tiny_checkpoint):
    """Weights are random, so scores mean nothing: what the code does is what is examined."""
    reward = load_reward(name, **tiny_checkpoint(name))
    photographs = from_pil([photograph(61, 97), photograph(61, 97).rotate(180), photograph(122, 194).resize((97, 61))])
    findings, diagnosis = examined(reward, photographs)
    assert not diagnosis.broken, [finding for finding in findings.values() if finding.verdict == "broken"]
    for finding in ("input", "repetition", "batch size", "weights"):
        assert findings[finding].verdict == "sound", findings[finding].detail
    has_processor = name not in ("hpsv2", "hpsv2.1", "image-reward")
    assert findings["preprocessing"].verdict == ("sound" if has_processor else "idle"), findings["preprocessing"].detail


def test_training_gives_frozen_weights_no_gradient_and_no_optimizer_state(sd):
    reward = load_reward("emoji-aesthetic")
    before = {name: value.clone() for name, value in reward.state_dict().items()}
    trainer = Trainer(sd, reward, ["a cat"], call=tiny.CALL, steps=1, batch_size=1)
    trainer.train()
    own = {id(parameter) for parameter in reward.parameters()}
    held = {id(parameter) for group in trainer.adamw.param_groups for parameter in group["params"]}
    assert own and held and not own & held
    assert not own & {id(parameter) for parameter in trainer.adamw.state}
    assert all(parameter.grad is None for parameter in reward.parameters())
    assert all(torch.equal(value, before[name]) for name, value in reward.state_dict().items())


def test_videos_are_not_for_the_doctor():
    class Film:
        modality = "video"

        def __call__(self, frames, prompts):
            return frames.mean((1, 2, 3, 4))

    with pytest.raises(ValueError, match=r"scores video, .*`alignprop check`"):
        examine(Film(), waves(8, 8), PROMPTS[:2])


# Pictures


def test_pictures_of_a_folder_have_their_names_for_prompts(tmp_path):
    for number, name in enumerate(("b_red-car.jpg", "a_cat.png", "notes.txt")):
        if name.endswith("txt"):
            (tmp_path / name).write_text("no picture")
        else:
            to_pil(waves(20, 30 + number, batch=1))[0].save(tmp_path / name)
    specimens = folder_specimens(tmp_path)
    assert specimens.prompts == ("a cat", "b red car")
    assert specimens.images.shape == (2, 3, 20, 20)  # squares, as the sizes differ
    (tmp_path / "b_red-car.jpg").unlink()
    specimens = folder_specimens(tmp_path, "a fox")
    assert specimens.prompts == ("a fox",)
    torch.testing.assert_close(specimens.images, waves(20, 31, batch=1), atol=0.5 / 255 + 1e-6, rtol=0)


@pytest.mark.parametrize("content", [None, "nothing", "broken"])
def test_a_folder_without_pictures_is_one_sentence(tmp_path, content):
    if content == "broken":
        (tmp_path / "a.png").write_bytes(b"no PNG")
    folder = tmp_path if content else tmp_path / "nowhere"
    with pytest.raises(ValueError, match=r"--images .*; (give|remove)"):
        folder_specimens(folder)


# The command line


def test_the_doctor_tells_and_exits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def redness(images, prompts, gain=1.0):\n"
        "    return gain * (images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3)))\n"
        "def rounded(images, prompts):\n    return redness((images * 255).round(), prompts)\n"
    )
    sound = run("check", "mine:redness", "--set", "gain=2")
    assert sound.exit_code == 0, sound.output
    assert "mine:redness, on 4 pictures of 64 x 64 px that the embedded model draws" in sound.output
    assert "Sound." in sound.output and "✗" not in sound.output
    broken = run("check", "mine:rounded")
    assert broken.exit_code == 1
    assert re.search(r"✗ gradient +exactly zero in every pixel value", broken.output)
    assert "Broken: mend what is marked ✗" in broken.output
    to_pil(waves(20, 30, batch=1))[0].save(tmp_path / "a_cat.png")
    one = run("check", "mine:redness", "--images", tmp_path)
    assert one.exit_code == 0 and "on 1 pictures of" in one.output
    assert re.search(r"· batch size +needs two pictures", one.output)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["check", "rednes"], 1, "did you mean 'redness'?"),
        (["check", "jpeg-size", "--set", "qualty=3"], 1, "takes no qualty; its arguments"),
        (["check", "jpeg-size", "--set", "quality"], 2, "--set quality needs the form"),
        (["check", "clip-score", "--set", "model=/nowhere"], 1, "model='/nowhere' does not exist"),
        (["check", "redness", "--images", "nowhere"], 1, "is no folder"),
        (["show", "rednes"], 1, "did you mean 'redness'?"),
    ],
)
def test_a_mistake_is_one_message(arguments, code, told):
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert told in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output


def test_the_list_fits_80_columns_and_has_everything():
    lines = run(columns=80).output.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["reward", "range", "weights", "download", "licence", "grad"]
    assert not any("…" in line for line in lines)
    text = run(columns=200).output
    for name, card in REWARDS.items():
        assert re.search(rf"^{re.escape(name)} ", text, re.MULTILINE)
        assert card.summary in text
        assert ", ".join(arguments_of(name)) in text
        assert card.license
    rows = {line.split()[0]: line for line in text.splitlines() if line[:1].strip()}
    assert rows["jpeg-size"].rstrip().endswith("no") and rows["redness"].rstrip().endswith("yes")
    assert "986 M" in rows["pickscore"] and "3.9 GB" in rows["pickscore"]


@pytest.mark.parametrize("name", REWARDS)
def test_one_is_shown_in_full(name):
    text = run("show", name).output
    card = REWARDS[name]
    for fact in (card.summary, card.value_range, card.license, card.weights or "none", card.downloads or "none"):
        assert fact in text
    for argument in arguments_of(name):
        assert f"--set {argument}=..." in text
    assert explanation_of(name).splitlines()[0][:60] in text


def test_the_users_own_is_shown_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shown.py").write_text('def score(images, prompts, gain=2.0):\n    """How [b]loud[/b] it is."""\n')
    text = run("show", "shown:score").output
    assert "--set gain=..." in text and "default 2.0" in text and "How [b]loud[/b] it is." in text


# The page that documents it


PAGE = Path(__file__).parent.parent / "docs" / "rewards.md"


def test_the_page_lists_every_reward_as_its_card_has_it():
    text = PAGE.read_text(encoding="utf-8")
    for name, card in REWARDS.items():
        arguments = ", ".join(f"`{argument}`" for argument in arguments_of(name)) or "none"
        gradient = "yes" if card.differentiable else "no"
        facts = (card.summary, card.value_range, gradient, arguments, card.weights or "none", card.downloads or "none")
        assert f"| `{name}` | {' | '.join(facts)} | {card.license} |" in text


def test_the_examples_of_the_page_do_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        name = re.match(r"# (\w+\.py)\n", code).group(1)
        Path(name).write_text(code)
    to_pil(waves(64, 64, batch=1))[0].save("a_cat.png")
    for arguments, code, told in (
        (["my_rewards:redness"], 0, "Sound."),
        (["my_rewards:broken_redness"], 1, "exactly zero in every pixel value"),
        (["command", "--set", "command=[python, score.py]"], 0, "none, and it says so"),
        (["scorers:NumColours"], 0, "none, and it says so"),
    ):
        result = run("check", *arguments, "--images", tmp_path)
        assert result.exit_code == code, result.output
        assert told in result.output
