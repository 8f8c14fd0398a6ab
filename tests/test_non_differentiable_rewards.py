"""Rewards without gradient: files, a program, a server; watched by any run, refused where they would be trained."""

import base64
import http.server
import io
import json
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tiny
from alignprop.cli import app
from alignprop.config import ConfigError, load_config
from alignprop.estimators import AlignProp, Step
from alignprop.measures import evaluate
from alignprop.pixels import from_pil, to_pil
from alignprop.rewards import REWARDS, OnFrames, PerPrompt, WeightedSum, is_differentiable, load_reward
from alignprop.rewards.colour import brightness, redness
from alignprop.rollout import Sampler
from alignprop.runfolder import RunFolder
from alignprop.truncation import Last
from pictures import photograph, waves

PROMPTS = ["a cat", "a dog, \u00fcber"]


def pictures():
    return from_pil(to_pil(waves(20, 30)))


# Real files


@pytest.mark.parametrize("quality", [10, 95])
def test_jpeg_size_is_that_of_the_file(tmp_path, quality):
    photographs = [photograph(64, 96), photograph(64, 96).rotate(180)]
    scores = load_reward("jpeg-size", quality=quality)(from_pil(photographs), ["", ""])
    for place, picture in enumerate(photographs):
        Image.fromarray(np.asarray(picture)).save(tmp_path / f"{place}.jpg", quality=quality)
        assert scores[place].item() == pytest.approx(-(tmp_path / f"{place}.jpg").stat().st_size / 1000)
    assert not scores.requires_grad


def test_jpeg_size_and_its_estimate_agree():
    images = from_pil([photograph(64, 96)])
    real, estimate = (load_reward(name)(images, [""]).item() for name in ("jpeg-size", "jpeg-compressibility"))
    assert real == pytest.approx(estimate, rel=0.1)


def test_jpeg_size_refuses_a_quality_that_is_none():
    with pytest.raises(ValueError, match="needs 1 <= quality <= 100"):
        load_reward("jpeg-size", quality=0)


# A program


@pytest.fixture
def program(tmp_path):
    """Scores by the red of the middle pixel and the length of the prompt; leaves a note of what it was given."""
    path = tmp_path / "score.py"
    path.write_text(
        "import json, sys\nfrom PIL import Image\n"
        "asked = json.load(sys.stdin)\n"
        f"open({str(tmp_path / 'asked.json')!r}, 'w').write(json.dumps([asked, sys.argv[1:]]))\n"
        "red = [Image.open(path).getpixel((15, 10))[0] for path in asked['images']]\n"
        "print(json.dumps([r + len(p) / 100 for r, p in zip(red, asked['prompts'])]))\n"
    )
    return [sys.executable, str(path)]


def test_a_program_gets_pngs_and_prompts_and_answers_with_scores(program, tmp_path):
    images = pictures()
    scores = load_reward("command", command=[*program, "$HOME; echo 1"])(images, PROMPTS)
    red = (255 * images[:, 0, 10, 15]).round()
    torch.testing.assert_close(scores, red + torch.tensor([len(prompt) / 100 for prompt in PROMPTS]))
    asked, arguments = json.loads((tmp_path / "asked.json").read_text())
    assert asked["prompts"] == PROMPTS
    assert arguments == ["$HOME; echo 1"]  # no shell
    assert not any(Path(path).exists() for path in asked["images"])


def answering(text):
    return [sys.executable, "-c", f"print({text!r})"]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["no-such-program"], "cannot be started (No such file or directory); give a program that can"),
        ([sys.executable, "-c", "import sys; sys.exit('no such model')"], "failed with exit code 1: no such model"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "has not answered after timeout_s=0.5; raise it"),
        (answering("fine"), "answered 'fine\\n'; it must be a JSON list of 2 finite numbers"),
        (answering("[1]"), "it must be a JSON list of 2 finite numbers"),
        (answering("[1, NaN]"), "it must be a JSON list of 2 finite numbers"),
        (answering("[1, true]"), "it must be a JSON list of 2 finite numbers"),
        (answering('{"score": [1, 2]}'), "it must be a JSON list of 2 finite numbers"),
        (answering("[" + "1, " * 100), "1, 1,...'; it must be"),
    ],
)
def test_a_program_that_fails_is_one_sentence(command, told):
    timeout = 0.5 if "sleep" in str(command) else 30
    with pytest.raises(ValueError) as error:
        load_reward("command", command=command, timeout_s=timeout)(pictures(), PROMPTS)
    assert told in str(error.value) and str(error.value).startswith("command=")


@pytest.mark.parametrize("command", ["score.py --fast", [], [1, 2]])
def test_a_command_that_is_no_list_of_texts_is_refused(command):
    with pytest.raises(ValueError, match="needs a list of texts"):
        load_reward("command", command=command)


@pytest.mark.parametrize(
    "arguments", [{"name": "command", "command": ["a"]}, {"name": "http", "url": "http://localhost/"}]
)
def test_a_timeout_is_a_time(arguments):
    with pytest.raises(ValueError, match="timeout_s=0 needs 0 < timeout_s"):
        load_reward(**arguments, timeout_s=0)


# A server


class Scorer(http.server.BaseHTTPRequestHandler):
    """Answers with the red of the middle pixels; other paths misbehave."""

    asked: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Scorer.asked.append((self.headers["Content-Type"], body["prompts"]))
        if self.path == "/slow":
            time.sleep(2)
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "/")
            self.end_headers()
            return
        self.send_response(500 if self.path == "/error" else 200)
        self.end_headers()
        files = [Image.open(io.BytesIO(base64.b64decode(text))) for text in body["images"]]
        scores = [file.getpixel((15, 10))[0] for file in files]
        answers = {"/text": "fine", "/named": json.dumps({"scores": scores}), "/few": "[1]"}
        self.wfile.write(answers.get(self.path, json.dumps(scores)).encode())

    def do_GET(self):
        Scorer.asked.append(("GET", self.path))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"[1, 2]")

    def log_message(self, *arguments): ...


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Scorer.asked = []
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scorer)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize("path", ["/", "/named"])
def test_a_server_gets_pngs_and_prompts_and_answers_with_scores(server, path):
    images = pictures()
    scores = load_reward("http", url=server + path)(images, PROMPTS)
    torch.testing.assert_close(scores, (255 * images[:, 0, 10, 15]).round())
    assert Scorer.asked == [("application/json", PROMPTS)]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/error", "refused the pictures with HTTP status 500"),
        ("/away", "refused the pictures with HTTP status 302"),
        ("/slow", "has not answered after timeout_s=0.5"),
        ("/text", "answered 'fine'; it must be a JSON list of 2 finite numbers"),
        ("/few", "answered '[1]'"),
    ],
)
def test_a_server_that_fails_is_one_sentence(server, path, told):
    with pytest.raises(ValueError) as error:
        load_reward("http", url=server + path, timeout_s=0.5)(pictures(), PROMPTS)
    assert told in str(error.value) and str(error.value).startswith(f"url={server}{path}")
    assert ("GET", "/") not in Scorer.asked  # what a redirect would make of it


def test_no_server_is_one_sentence():
    with pytest.raises(ValueError, match=r"cannot be reached \(.*refused\); start the server"):
        load_reward("http", url="http://127.0.0.1:9/")(pictures(), PROMPTS)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "localhost:8000", "http:///x", "", 5])
def test_only_http_addresses_are_taken(url):
    with pytest.raises(ValueError, match="needs the form http://host"):
        load_reward("http", url=url)


# Marked so


def test_they_say_that_they_have_no_gradient(program):
    arguments = {"command": {"command": program}, "http": {"url": "http://localhost/"}}
    for name, card in REWARDS.items():
        if not card.downloads:
            assert is_differentiable(load_reward(name, **arguments.get(name, {}))) == card.differentiable
    blind = load_reward("jpeg-size")
    assert not is_differentiable(OnFrames(blind)) and is_differentiable(OnFrames(redness))
    assert not is_differentiable(PerPrompt({"a": redness, "b": blind}))
    assert is_differentiable(PerPrompt({"a": redness}, default=brightness))


def test_frames_of_videos_are_scored():
    videos = torch.stack([pictures(), pictures()])  # of two frames
    scores = OnFrames(load_reward("jpeg-size"))(videos, ["a", "b"])
    frames = load_reward("jpeg-size")(pictures(), ["", ""])
    torch.testing.assert_close(scores, frames.mean().expand(2))


# Watched


def test_a_judge_measures_the_files_of_the_pictures_that_are_sampled(sd, program):
    sampler = Sampler(sd, tiny.CALL)
    judges = {"jpeg-size": load_reward("jpeg-size"), "mine": load_reward("command", command=program)}
    result = evaluate(sampler, ["a cat", "a dog"], {"redness": redness, "jpeg-size": judges["jpeg-size"]})
    for images, scores in zip(result.images, result.scores["jpeg-size"], strict=True):
        for picture, score in zip(to_pil(images), scores, strict=True):
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=95)
            assert score.item() == pytest.approx(-buffer.tell() / 1000)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.stable_diffusion().save_pretrained(tmp_path / "model")
    return [
        "model.name=model",
        "sampling={num_inference_steps: 2}",
        "estimator={truncation: {kind: last, steps: 1}}",
        "rewards={redness: 1}",
        "prompts={train: [a cat, a dog], unseen: [a fox]}",
        "training={steps: 1, batch_size: 1}",
        "evaluation={images_per_prompt: 1, num_train_prompts: 1}",
    ]


def train(*settings):
    options = [part for setting in settings for part in ("--set", setting)]
    return CliRunner().invoke(app, ["train", "emoji", "--output", "a", *options], env={"COLUMNS": "200"})


def test_a_run_watches_them(settings, program, tmp_path):
    (tmp_path / "count.py").write_text(
        "import json, sys; print(json.dumps([7 for _ in json.load(sys.stdin)['images']]))"
    )
    command = [sys.executable, "count.py"]
    result = train(*settings, "judges=[jpeg-size]", f"judges.command.arguments.command={json.dumps(command)}")
    assert result.exit_code == 0, result.output
    rewards = RunFolder(tmp_path / "a").evaluations.read()[-1]["sets"]["unseen"]["rewards"]
    assert rewards["command"]["mean"] == 7
    assert -2 < rewards["jpeg-size"]["mean"] < -0.6
    assert "watched: jpeg-size, command" in result.output


# Refused


@pytest.mark.parametrize("name", [name for name, card in REWARDS.items() if not card.differentiable])
def test_training_on_them_is_refused_before_anything_is_loaded(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("alignprop.config.building.load_pipeline", None)
    result = train(f"rewards={{redness: 1, {name}: 1}}")
    assert result.exit_code == 2
    assert f"rewards.{name} has no gradient, which estimator.name=alignprop needs: " in result.stderr.replace("\n", " ")
    assert not (tmp_path / "a").exists()


def test_under_a_name_of_its_own_it_is_refused_too():
    with pytest.raises(ConfigError, match=r"^rewards\.small has no gradient"):
        load_config("emoji", ["rewards={small: {target: jpeg-size}}"])


def test_a_prompt_that_chooses_one_is_refused_with_its_line(tmp_path):
    lines = [{"prompt": "a cat"}, {"prompt": "a dog", "reward": "jpeg-size"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = [
        "rewards={redness: {per_prompt: true}}",
        f"prompts.train={tmp_path / 'p.jsonl'}",
        "prompts.unseen=[a fox]",
    ]
    with pytest.raises(ConfigError, match=r"p\.jsonl.*line 2.*: the reward has no gradient"):
        load_config("emoji", changes)


def test_the_users_own_is_refused_before_the_pipeline_loads(settings, tmp_path, monkeypatch):
    (tmp_path / "counted.py").write_text(
        "class Count:\n    differentiable = False\n"
        "    def __call__(self, images, prompts): return images.detach().mean((1, 2, 3))\n"
    )
    monkeypatch.setattr("alignprop.config.building.load_pipeline", None)
    result = train(*settings[:3], *settings[4:], "rewards={counted:Count: 1}")
    assert result.exit_code == 2
    assert "rewards.counted:Count has no gradient" in result.stderr
    assert train(*settings[:3], *settings[4:], "rewards={redness: 1}", "judges=[counted:Count]").exit_code != 2


def test_the_sentence_names_the_estimators_that_can_use_them():
    with pytest.raises(ConfigError) as error:
        load_config("emoji", ["rewards={jpeg-size: 1}"])
    assert str(error.value) == (
        "rewards.jpeg-size has no gradient, which estimator.name=alignprop needs: train on it with ddpo or rwr, "
        "or watch it as a judge."
    )
    load_config("emoji", ["rewards={jpeg-size: 1}", "estimator.name=ddpo"])


def test_the_estimator_refuses_before_it_samples():
    reward = WeightedSum({"size": load_reward("jpeg-size"), "red": redness}, {"size": 1.0, "red": 1.0})
    told = (
        r"^reward 'size' has no gradient, which AlignProp needs: train on it with DDPO or RWR, or watch it as a judge"
    )
    with pytest.raises(ValueError, match=told):
        next(AlignProp(Last(1)).updates(Step(None, reward, each=None, num_batches=1, weight=None)))


def test_pictures_leave_with_their_rounding_only():
    images = torch.rand(1, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    from alignprop.rewards.external import png_files

    (content,) = png_files(images)
    read = np.asarray(Image.open(io.BytesIO(content)))
    assert (read == (images[0] * 255).round().permute(1, 2, 0).numpy()).all()
