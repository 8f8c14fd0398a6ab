"""The page of a run: its numbers come from the files, its text is escaped, it loads nothing."""

import base64
import io
import json
import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from alignprop.charts import Curve, curves_chart, moving_mean
from alignprop.report import MAX_STRIP, duration, memory, number, summarise, write_report

EVALUATED = {0: 4.83, 20: 5.9, 40: 7.02, 60: 7.91, 80: 7.7}
KEPT = 60
HOSTILE = '<script>alert("prompt")</script>'


def score(mean, std=1.28):
    return {"mean": mean, "std": std, "sem": std / 8}


def evaluation(step, aesthetic, clip):
    def measured(aesthetic, num_prompts, num_images):
        rewards = {"emoji-clip": score(clip, 0.03), "emoji-aesthetic": score(aesthetic)}
        return {
            "num_prompts": num_prompts,
            "num_images": num_images,
            "reward": score(aesthetic),
            "rewards": rewards,
            "diversity": 0.41 - step / 1000,
        }

    return {
        "step": step,
        "images_scored": 8 * step,
        "seconds": 3.5,
        "kept": step <= KEPT,
        "trained": ["emoji-aesthetic"],
        "sets": {"train": measured(aesthetic + 0.12, 8, 32), "unseen": measured(aesthetic, 8, 32)},
    }


def training_step(step):
    reward = 4.9 + 3 * (1 - math.exp(-step / 30)) + 0.4 * math.sin(7.3 * step)
    return {
        "step": step,
        "reward": reward,
        "reward_std": 1.1,
        "rewards": {"emoji-aesthetic": reward},
        "loss": -reward,
        "grad_norm": 0.5 + 0.3 * math.cos(5.1 * step),
        "lr": 1e-3,
        "live_steps": 1 + step % 4,
        "images_scored": 8 * step,
        "seconds": 1.7,
        "peak_memory_mb": 900.0 + step,
    }


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def draw_grid(path, step, rows=8):
    prompts = ["panda", "elephant", "giraffe", "penguin", "koala", "owl", "octopus", "hippopotamus"]
    grid = Image.new("RGB", (4 * 68 + 4, rows * 86), "white")
    pen = ImageDraw.Draw(grid)
    for row, prompt in enumerate(prompts[:rows]):
        pen.text((6, row * 86 + 2), f"a {prompt}", fill="#444")
        for seed in range(4):
            left, top = 4 + 68 * seed, 18 + 86 * row
            shade = (60 + 2 * step, (35 * row + 20 * seed) % 255, 200 - 20 * seed)
            pen.ellipse((left + 6, top + 6, left + 58, top + 58), fill=shade)
    path.parent.mkdir(parents=True)
    grid.save(path)
    grid.save(path.with_name("train.png"))


@pytest.fixture
def run_dir(tmp_path):
    """A run as training leaves it, with hostile text wherever a user's text comes from."""
    run = tmp_path / "emoji-demo"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "pytorch_lora_weights.safetensors").touch()
    config = {
        "model": {"name": "emoji"},
        "training": {"steps": 80, "batch_size": 8},
        "sampling": {"guidance_scale": 3.0, "eta": None, "extra": {"clip_skip": 1}},
        "prompts": [HOSTILE, "a panda"],
        "reward": {"emoji-aesthetic": 1.0},
        "optimizer": {"lr": 1e-3, "betas": [0.9, 0.999]},
        "truncation": {"name": "uniform"},
        "seed": 0,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_lines(run / "metrics.jsonl", map(training_step, range(1, 81)))
    clips = [0.291, 0.293, 0.290, 0.288, 0.284]
    records = [evaluation(step, mean, clip) for (step, mean), clip in zip(EVALUATED.items(), clips, strict=True)]
    write_lines(run / "evaluation.jsonl", records)
    for step in EVALUATED:
        draw_grid(run / "samples" / f"step-{step:06d}" / "unseen.png", step)
    return run


class Page(HTMLParser):
    """What a browser makes of the page: its text, its table rows and all that it would load."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.tags, self.rows, self.text = [], set(), [], ""
        self.feed(path.read_text(encoding="utf-8"))
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def row(self, start):
        return next(row for row in self.rows if row[0].startswith(start))


def rewrite(path, change):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [change(record) for record in records])


def test_summary_compares_the_kept_step_with_the_base(run_dir):
    summary = summarise(run_dir)
    assert summary.headline == (
        "emoji-aesthetic on 8 unseen prompts: 4.83 → 7.91 (+2.4 standard deviations of the base model's images); "
        "emoji-clip 0.291 → 0.288 (99 % of the base)"
    )
    lead = summary.changes[0]
    assert lead.deviations == pytest.approx((7.91 - 4.83) / 1.28)
    assert (summary.first_step, summary.kept_step, summary.compared_step) == (0, KEPT, KEPT)
    assert (summary.steps, summary.images_scored, summary.peak_memory_mb) == (80, 640, 980.0)
    assert summary.seconds == pytest.approx(80 * 1.7 + 5 * 3.5)
    assert summary.warnings == ()


def test_numbers_of_the_page_are_those_of_the_files(run_dir):
    page = Page(write_report(run_dir))
    assert summarise(run_dir).lead in page.text
    assert page.row("emoji-aesthetic") == ["emoji-aesthetic trained", "4.83 ± 0.16", "7.91 ± 0.16", "+2.4", "164 %"]
    assert page.row("emoji-clip")[1:] == ["0.291 ± 0.0037", "0.288 ± 0.0037", "−0.1", "99 %"]
    assert page.row("40") == ["40", "7.02 ± 0.16", "0.290 ± 0.0037", "0.370"]
    assert page.row("60 kept")[1] == "7.91 ± 0.16"
    assert page.row("optimizer.lr") == ["optimizer.lr", "0.001"]
    assert "not finished" not in page.text
    assert "2 min 34 s" in page.text
    assert 'emoji-demo/adapter")\nimage = pipe("a panda", guidance_scale=3.0, clip_skip=1)' in page.text


def test_curves_go_through_the_evaluated_means(run_dir):
    """The drawn line is an affine image of the means: its heights have their proportions."""
    svg = str(curves_chart([Curve(list(EVALUATED), list(EVALUATED.values()), [0.1] * 5)], KEPT))
    line = re.search(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--curve-0\)', svg).group(1)
    points = [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", line)]
    means = list(EVALUATED.values())
    expected = [(mean - means[0]) / (means[3] - means[0]) for mean in means]
    heights = [(y - points[0][1]) / (points[3][1] - points[0][1]) for _, y in points]
    assert heights == pytest.approx(expected, abs=1e-4)


def test_moving_mean_of_a_ramp_is_the_ramp():
    ramp = np.arange(100.0)
    assert moving_mean(ramp)[5:-5] == pytest.approx(ramp[5:-5])
    assert moving_mean(ramp)[0] == pytest.approx(2.5)  # the mean of 0 to 5


def test_text_of_the_user_is_escaped(run_dir):
    rewrite(
        run_dir / "evaluation.jsonl", lambda record: json.loads(json.dumps(record).replace("emoji-clip", "<b>clip"))
    )
    page = Page(write_report(run_dir))
    assert "script" not in page.tags and HOSTILE in json.loads(page.row("prompts")[1])
    assert "<b>clip 0.291" in page.text


def test_page_loads_nothing_from_outside(run_dir):
    page = Page(write_report(run_dir))
    assert {value.split(":")[0] if value[0] != "#" else "#" for value in page.loads} == {"data", "#"}
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "@import" not in html and set(re.findall(r"url\(.", html)) <= {"url(#"}
    assert "default-src 'none'" in html


def test_pictures_are_those_of_the_base_and_of_the_kept_step(run_dir):
    page = Page(write_report(run_dir))
    pictures = [base64.b64decode(uri.partition("base64,")[2]) for uri in page.loads if uri.startswith("data:image")]
    files = {step: (run_dir / "samples" / f"step-{step:06d}" / "unseen.png").read_bytes() for step in EVALUATED}
    assert pictures[:2] == [files[0], files[KEPT]]
    assert pictures[4:] == list(files.values())  # after the pair of the training prompts: the strip


def test_strip_is_thinned_but_shows_first_kept_and_last(run_dir):
    for step in range(100, 3000, 50):
        draw_grid(run_dir / "samples" / f"step-{step:06d}" / "unseen.png", step % 100)
    steps = [int(step) for step in re.findall(r"unseen prompts, step (\d+)", write_report(run_dir).read_text())][2:]
    assert {0, KEPT, 2950} <= set(steps) and MAX_STRIP <= len(steps) <= MAX_STRIP + 1


def test_wide_pictures_are_shrunk(run_dir):
    Image.new("RGB", (4000, 1000), "red").save(run_dir / "samples" / "step-000000" / "unseen.png")
    first = next(uri for uri in Page(write_report(run_dir)).loads if uri.startswith("data:image"))
    with Image.open(io.BytesIO(base64.b64decode(first.partition("base64,")[2]))) as image:
        assert image.size == (2000, 500)


@pytest.mark.parametrize(("left", "warned"), [(0.96, False), (0.94, True)])
def test_a_fall_of_a_reward_that_is_not_trained_is_seen(run_dir, left, warned):
    def fall(record):
        if record["step"] == KEPT:
            record["sets"]["unseen"]["rewards"]["emoji-clip"]["mean"] = 0.291 * left
        return record

    rewrite(run_dir / "evaluation.jsonl", fall)
    warning = "emoji-clip, not trained, fell on the unseen prompts: 0.291 → 0.274 (94 % of the base)."
    assert summarise(run_dir).warnings == ((warning,) if warned else ())
    assert (warning in Page(write_report(run_dir)).text) is warned


@pytest.mark.parametrize(("after", "warned"), [(-0.5 - 0.0299, False), (-0.5 - 0.0301, True)])
def test_a_judge_of_logarithms_falls_by_more_than_a_deviation(run_dir, after, warned):
    def logarithm(record):
        for measured in record["sets"].values():
            measured["rewards"]["emoji-clip"]["mean"] = after if record["step"] == KEPT else -0.5
        return record

    rewrite(run_dir / "evaluation.jsonl", logarithm)
    warnings = summarise(run_dir).warnings
    assert [warning.split(": ")[0] for warning in warnings] == warned * [
        "emoji-clip, not trained, fell on the unseen prompts",
        "emoji-clip, not trained, fell on the training prompts",
    ]


def test_several_trained_rewards_are_summed_up_by_their_weighted_sum(run_dir):
    def both(record):
        record["trained"] = ["emoji-aesthetic", "emoji-clip"]
        record["sets"]["unseen"]["reward"]["mean"] += 1
        return record

    rewrite(run_dir / "evaluation.jsonl", both)
    headline = summarise(run_dir).headline
    assert headline.startswith("weighted sum of emoji-aesthetic and emoji-clip on 8 unseen prompts: 5.83 → 8.91 (+2.4")
    assert ";" not in headline


def test_a_run_that_never_beat_its_base_says_so(run_dir):
    sets = json.loads((run_dir / "evaluation.jsonl").read_text().splitlines()[0])["sets"]
    rewrite(run_dir / "evaluation.jsonl", lambda record: {**record, "kept": record["step"] == 0, "sets": sets})
    summary = summarise(run_dir)
    assert summary.lead.startswith(
        "No evaluation beat the first one; the latest: emoji-aesthetic on 8 unseen prompts: 4.83 → 4.83"
    )
    assert summary.guard_notes == ()
    assert (summary.kept_step, summary.compared_step) == (0, 80)


def test_a_run_of_which_the_guard_kept_the_base_says_so(run_dir):
    rewrite(run_dir / "evaluation.jsonl", lambda record: {**record, "kept": record["step"] == 0, "alarms": []})
    summary = summarise(run_dir)
    assert summary.lead.startswith(
        "The guard kept the base model; the latest: emoji-aesthetic on 8 unseen prompts: 4.83 → 7.70"
    )
    (note,) = summary.guard_notes
    assert note.startswith("The guard keeps the base model, and not step 60 (reward 7.91 in place of 4.83): its judges")
    rewrite(run_dir / "evaluation.jsonl", lambda record: {**record, "alarms": ["emoji-clip fell"]})
    assert summarise(run_dir).guard_notes[0].endswith("(reward 7.91 in place of 4.83): emoji-clip fell.")


@pytest.mark.parametrize(
    ("steps", "evaluations", "lead"),
    [
        (0, 0, "No evaluation yet"),
        (1, 0, "No evaluation yet: reward 5.34 at step 1"),
        (0, 1, "One evaluation so far, at step 0: emoji-aesthetic on 8 unseen prompts: 4.83"),
        (1, 1, "One evaluation so far, at step 0: emoji-aesthetic on 8 unseen prompts: 4.83"),
    ],
)
def test_unfinished_runs_have_a_page(run_dir, steps, evaluations, lead):
    for name, lines in (("metrics.jsonl", steps), ("evaluation.jsonl", evaluations)):
        kept = (run_dir / name).read_text().splitlines(keepends=True)[:lines]
        (run_dir / name).write_text("".join(kept) + '{"step": 99, "rew')  # killed while it wrote
    page = Page(write_report(run_dir))
    assert lead in page.text and f"not finished: step {steps} of 80" in page.text
    assert summarise(run_dir).steps == steps


def test_an_empty_folder_has_a_page(tmp_path):
    page = Page(write_report(tmp_path))
    assert "No evaluation yet" in page.text and "No adapter has been kept yet." in page.text


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(run_dir, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=re.escape('pip install "alignprop[report]"')):
        write_report(run_dir)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.2914, "0.291"),
        (4.8, "4.80"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (-0.5, "−0.500"),
        (0.0, "0.00"),
        (None, "–"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_units():
    assert [duration(seconds) for seconds in (0.4, 161, 11520)] == ["0 s", "2 min 41 s", "3 h 12 min"]
    assert [memory(megabytes) for megabytes in (812.4, 14541)] == ["812 MB", "14.2 GB"]
