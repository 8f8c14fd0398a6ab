"""A run folder as one page: `report.html`, a single offline file, made to be sent to a colleague.

Everything on it is read from the folder, so it can be written again at any time, also while the run goes on.
"""

from __future__ import annotations

import base64
import io
import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from PIL import Image

from alignprop import __version__
from alignprop.charts import MAX_CURVES, Curve, curves_chart, scatter_chart
from alignprop.runfolder import RunFolder, write_atomically

if TYPE_CHECKING:
    from jinja2 import Template

Record = Mapping[str, Any]
"""One line of `metrics.jsonl` or `evaluation.jsonl`."""

MAX_FALL = 0.05
"""A reward that is not trained may fall by this fraction of the base's before the page warns."""

MAX_STRIP = 16
"""At most so many evaluations are shown in the strip of pictures."""

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
_FIRST_SETS = ("unseen", "train")
_DIVERSITY = "diversity"


@dataclass(frozen=True)
class Change:
    """One reward on one set of prompts, at the first evaluation and at a later one.

    `before` and `after` hold `mean`, `std` over single images and `sem`, the standard error over prompts.
    """

    reward: str
    trained: bool
    prompts: str
    num_prompts: int
    before: Record
    after: Record

    @property
    def gain(self) -> float:
        """The change of the mean."""
        return float(self.after["mean"] - self.before["mean"])

    @property
    def deviations(self) -> float | None:
        """The gain in standard deviations of the base's images; None where these do not vary."""
        return self.gain / self.before["std"] if self.before["std"] > 0 else None

    @property
    def fraction(self) -> float | None:
        """What is left of the base's score; None where that is not positive."""
        return self.after["mean"] / self.before["mean"] if self.before["mean"] > 0 else None

    @property
    def fell(self) -> bool:
        """Whether a reward that is not trained lost more than `MAX_FALL` of the base's score."""
        return not self.trained and self.gain < -MAX_FALL * abs(self.before["mean"])


@dataclass(frozen=True)
class Summary:
    """The outcome of a run, finished or not: what the page's head and the command line say."""

    name: str
    lead: str
    others: tuple[str, ...]
    steps: int
    planned_steps: int
    images_scored: int
    seconds: float
    peak_memory_mb: float
    first_step: int | None
    kept_step: int | None
    compared_step: int | None
    changes: tuple[Change, ...]

    @property
    def headline(self) -> str:
        """The outcome in one sentence."""
        return "; ".join((self.lead, *self.others))

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each reward that is not trained and fell by more than `MAX_FALL`."""
        fallen = [change for change in self.changes if change.fell]
        return tuple(
            f"{fall.reward}, not trained, fell on the {_prompts(fall.prompts)}: {_arrow(fall)}{_of_base(fall)}."
            for fall in fallen
        )


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder, whatever there is of the run so far, and return its path.

    Raises:
        ImportError: The extra `report` (jinja2, matplotlib) is not installed.
    """
    require_pages()
    folder, summary = RunFolder(run_dir), summarise(run_dir)
    metrics, evaluations = folder.metrics.read(), folder.evaluations.read()
    config = _config(folder)
    page = page_template("report.html.j2").render(
        summary=summary,
        sets=_sets(evaluations),
        max_curves=MAX_CURVES,
        evaluations=evaluations,
        measures=_measures,
        charts=_charts(metrics, evaluations, summary.kept_step),
        pairs=_pairs(folder, summary),
        strip=_strip(folder, summary),
        settings=dict(_flatten(config)),
        model=config.get("model", {}).get("name"),
        call=_call(config),
        adapter=folder.adapter.as_posix() if folder.adapter.exists() else None,
        versions=versions(),
    )
    path = run_dir / "report.html"
    write_atomically(path, page)
    return path


def require_pages() -> None:
    """Check that pages can be written.

    Raises:
        ImportError: The extra `report` (jinja2, matplotlib) is not installed.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('The report needs jinja2 and matplotlib: pip install "alignprop[report]".') from error


def page_template(name: str) -> Template:
    """A template of the package, with the filters that pages share."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,  # prompts and settings are the user's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "signed": signed,
        "duration": duration,
        "memory": memory,
        "prompts": _prompts,
    }
    return environment.get_template(name)


def summarise(run_dir: Path) -> Summary:
    """Read the outcome of a run from its folder."""
    folder = RunFolder(run_dir)
    metrics, evaluations = folder.metrics.read(), folder.evaluations.read()
    steps = metrics[-1]["step"] if metrics else 0
    first = evaluations[0] if evaluations else None
    kept = next((record for record in reversed(evaluations) if record["kept"]), None)
    # Where nothing beat the base model, the latest evaluation is what there is to compare it with.
    compared = kept if kept and kept is not first else evaluations[-1] if evaluations else None
    changes = _changes(first, compared) if first and compared and compared is not first else ()
    lead, others = _headline(metrics, first, kept, changes)
    return Summary(
        name=run_dir.resolve().name,
        lead=lead,
        others=others,
        steps=steps,
        planned_steps=_planned_steps(_config(folder).get("training", {}), metrics),
        images_scored=metrics[-1]["images_scored"] if metrics else 0,
        seconds=sum(record["seconds"] for record in (*metrics, *evaluations)),
        peak_memory_mb=max((record["peak_memory_mb"] for record in metrics), default=0.0),
        first_step=first["step"] if first else None,
        kept_step=kept["step"] if kept else None,
        compared_step=compared["step"] if changes and compared else None,
        changes=changes,
    )


def _planned_steps(training: Record, metrics: Sequence[Record]) -> int:
    """Steps of the whole run: those that there are, where its budget is spent."""
    steps = metrics[-1]["step"] if metrics else 0
    images = metrics[-1]["images_scored"] if metrics else 0
    budgets = ((training.get("max_images"), images), (training.get("max_seconds"), sum(m["seconds"] for m in metrics)))
    spent = any(budget is not None and used >= budget for budget, used in budgets)
    return int(steps if spent else training.get("steps", steps))


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, with a real minus: 0.291, 7.91, 12.3, 1,234."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.{digits}g}".rstrip(".")
    return text.replace("-", "−")


def signed(value: float) -> str:
    """A difference to one decimal: +2.4, −0.1."""
    return f"{value:+.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as a person says them: 41 s, 2 min 41 s, 3 h 12 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def memory(megabytes: float) -> str:
    """Megabytes as MB or GB."""
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"


def _config(folder: RunFolder) -> dict[str, Any]:
    return dict(yaml.safe_load(folder.config.read_text(encoding="utf-8")) if folder.config.exists() else {})


def _call(config: Record) -> Record:
    """What the pipeline's call was given, beside the prompt."""
    sampling = dict(config.get("sampling", {}))
    extra = sampling.pop("extra", {})
    return {name: value for name, value in {**sampling, **extra}.items() if value is not None}


def _flatten(settings: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as the dotted names that `--set` takes."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield (
                f"{prefix}{key}",
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str),
            )


def _prompts(name: str) -> str:
    """A set of prompts as a person calls it."""
    return "training prompts" if name == "train" else f"{name} prompts"


def _sets(evaluations: Sequence[Record]) -> list[str]:
    return _in_order(prompts for record in evaluations for prompts in record["sets"])


def _in_order(sets: Iterable[str]) -> list[str]:
    """The distinct names, unseen prompts first, training prompts second."""
    names = sorted(set(sets))
    return [
        *(name for name in _FIRST_SETS if name in names),
        *(name for name in names if name not in _FIRST_SETS),
    ]


def _scores(evaluation: Record, prompts: str) -> dict[str, Record]:
    """The scores of a set, trained ones first; their weighted sum leads where there are several."""
    measured, trained = evaluation["sets"][prompts], evaluation["trained"]
    total = {} if len(trained) == 1 else {_total(trained): measured["reward"]}
    return total | dict(sorted(measured["rewards"].items(), key=lambda item: item[0] not in trained))


def _total(trained: Sequence[str]) -> str:
    return f"weighted sum of {' and '.join(trained)}"


def _is_trained(reward: str, evaluation: Record) -> bool:
    return reward in (*evaluation["trained"], _total(evaluation["trained"]))


def _measures(evaluation: Record, prompts: str) -> dict[str, Record]:
    """The scores of a set and its diversity, which comes without an error."""
    diversity = {"mean": evaluation["sets"][prompts]["diversity"], "sem": 0}
    return {**_scores(evaluation, prompts), _DIVERSITY: diversity}


def _changes(first: Record, compared: Record) -> tuple[Change, ...]:
    return tuple(
        Change(
            reward=reward,
            trained=_is_trained(reward, first),
            prompts=prompts,
            num_prompts=first["sets"][prompts]["num_prompts"],
            before=before,
            after=_scores(compared, prompts)[reward],
        )
        for prompts in _sets([first])
        for reward, before in _scores(first, prompts).items()
    )


def _headline(
    metrics: Sequence[Record], first: Record | None, kept: Record | None, changes: Sequence[Change]
) -> tuple[str, tuple[str, ...]]:
    """What became of the trained reward, and of the others, on the first set of prompts."""
    if first is None:
        so_far = f": reward {number(metrics[-1]['reward'])} at step {metrics[-1]['step']}" if metrics else ""
        return f"No evaluation yet{so_far}", ()
    if not changes:
        prompts = _sets([first])[0]
        name, score = next(iter(_scores(first, prompts).items()))
        on = f"{first['sets'][prompts]['num_prompts']} {_prompts(prompts)}"
        return f"One evaluation so far, at step {first['step']}: {name} on {on}: {number(score['mean'])}", ()
    lead, *others = (change for change in changes if change.prompts == changes[0].prompts)
    start = "No evaluation beat the first one; the latest: " if kept is first else ""
    sentence = (
        f"{start}{lead.reward} on {lead.num_prompts} {_prompts(lead.prompts)}: {_arrow(lead)}{_in_deviations(lead)}"
    )
    return sentence, tuple(f"{other.reward} {_arrow(other)}{_of_base(other)}" for other in others if not other.trained)


def _arrow(change: Change) -> str:
    return f"{number(change.before['mean'])} → {number(change.after['mean'])}"


def _in_deviations(change: Change) -> str:
    if change.deviations is None:
        return ""
    return f" ({signed(change.deviations)} standard deviations of the base model's images)"


def _of_base(change: Change) -> str:
    return "" if change.fraction is None else f" ({100 * change.fraction:.0f} % of the base)"


@dataclass(frozen=True)
class _Panel:
    title: str
    note: str
    svg: str


def _charts(metrics: Sequence[Record], evaluations: Sequence[Record], kept_step: int | None) -> list[list[_Panel]]:
    """Two groups: rewards and diversity; small ones of how the training went."""
    steps = [record["step"] for record in metrics]

    def of_steps(key: str, title: str, note: str, height: float) -> list[_Panel]:
        values = [math.nan if record[key] is None else record[key] for record in metrics]
        return [_Panel(title, note, scatter_chart(steps, values, kept_step, height))] if metrics else []

    rewards = list(_evaluation_charts(evaluations, kept_step))
    rewards[1:1] = of_steps("reward", "training batches", "trained reward, moving mean", 2.1)
    norm = of_steps("grad_norm", "gradient norm", "before clipping", 1.3)
    live = of_steps("live_steps", "live denoising steps", "mean of a step", 1.3)
    return [rewards, norm + live]


def _evaluation_charts(evaluations: Sequence[Record], kept_step: int | None) -> Iterator[_Panel]:
    """Every reward and the diversity, a curve for each set of prompts."""
    sets = _sets(evaluations)
    for name in _measures(evaluations[0], sets[0]) if evaluations else ():
        not_trained = "of the pictures of one prompt" if name == _DIVERSITY else "not trained"
        note = "trained" if _is_trained(name, evaluations[0]) else not_trained
        curves = [_curve(evaluations, prompts, name) for prompts in sets]
        yield _Panel(name, note, curves_chart(curves, kept_step))


def _curve(evaluations: Sequence[Record], prompts: str, name: str) -> Curve:
    records = [record for record in evaluations if prompts in record["sets"]]
    scores = [_measures(record, prompts)[name] for record in records]
    return Curve([r["step"] for r in records], [s["mean"] for s in scores], [s["sem"] for s in scores])


@dataclass(frozen=True)
class _Picture:
    step: int
    uri: str


def _pairs(folder: RunFolder, summary: Summary) -> dict[str, list[_Picture]]:
    """By set of prompts: the pictures of the first evaluation and of the one that it is compared with."""
    steps = [step for step in (summary.first_step, summary.compared_step) if step is not None]
    grids = {prompts: _grids(folder, prompts) for prompts in _sampled_sets(folder)}
    return {
        prompts: [_picture(paths[step], step, max_width=2000) for step in steps if step in paths]
        for prompts, paths in grids.items()
    }


def _strip(folder: RunFolder, summary: Summary) -> list[_Picture]:
    """The first set's pictures by step: at most `MAX_STRIP` evenly spaced ones and the kept one."""
    paths = next((_grids(folder, prompts) for prompts in _sampled_sets(folder)), {})
    steps = np.array(list(paths), dtype=int)
    shown = steps[np.linspace(0, len(steps) - 1, min(len(steps), MAX_STRIP)).round().astype(int)]
    return [
        _picture(path, step, max_width=900)
        for step, path in paths.items()
        if step in shown or step == summary.kept_step
    ]


def _sampled_sets(folder: RunFolder) -> list[str]:
    return _in_order(path.stem for path in folder.path.glob("samples/step-*/*.png"))


def _grids(folder: RunFolder, prompts: str) -> dict[int, Path]:
    """The sample grids of a set of prompts by step."""
    paths = sorted(folder.path.glob(f"samples/step-*/{prompts}.png"))
    return {int(path.parent.name.removeprefix("step-")): path for path in paths}


def _picture(path: Path, step: int, max_width: int) -> _Picture:
    return _Picture(step, data_uri(path, max_width))


def data_uri(path: Path, max_width: int) -> str:
    """A picture as a data URI, the file itself unless it is wider than `max_width` pixels."""
    data, kind = path.read_bytes(), "png"
    with Image.open(path) as image:
        if image.width > max_width:
            stream, kind = io.BytesIO(), "webp"
            image.thumbnail((max_width, image.height), Image.Resampling.LANCZOS)
            image.convert("RGB").save(stream, kind, quality=88)
            data = stream.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    packages = {package: version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), "alignprop": __version__, **packages}
