"""What the command line shows: messages, tables, and errors without a traceback."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Column, Table

from alignprop.config import ConfigError

if TYPE_CHECKING:
    from alignprop.config import Config, EstimatorDescription, EstimatorSettings, Model
    from alignprop.probe import Finding
    from alignprop.rewards import RewardCard
    from alignprop.rewards.doctor import Diagnosis
    from alignprop.trainer import Trainer

FAILED, UNUSABLE_SETTINGS, INTERRUPTED = 1, 2, 130
"""Exit codes."""

_RANK = int(os.environ.get("RANK", "0"))


def console() -> Console:
    """Where the main process prints, and others do not."""
    return Console(quiet=_RANK != 0, highlight=False)


def tell(text: str = "") -> None:
    """Print a line; markup is read."""
    console().print(text)


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show what is being waited for."""
    shown = Console(stderr=True, quiet=_RANK != 0)
    with shown.status(f"{text} ..."):
        yield


@contextmanager
def errors_told() -> Iterator[None]:
    """Turn what the user can mend into a message and an exit code; ``ALIGNPROP_TRACEBACK=1`` shows where it arose."""
    _quieten()
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("ALIGNPROP_TRACEBACK"):
            raise
        if _RANK == 0 or not isinstance(error, ConfigError):  # which every process finds
            where = f"rank {_RANK}: " if _RANK else ""
            _tell_error(f"{where}{error}" if str(error) else repr(error), several=_num_problems(error))
        raise typer.Exit(UNUSABLE_SETTINGS if isinstance(error, ConfigError) else FAILED) from None


def _quieten() -> None:
    """Keep what the libraries say to their developers off the terminal; it counts once they are imported."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextmanager
def loading() -> Iterator[None]:
    """Show that a model is loaded, without a bar for each of its parts."""
    with status("Loading the model"):
        import diffusers.utils.logging
        import transformers.utils.logging

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        yield


def _num_problems(error: Exception) -> int:
    return len(error.problems) if isinstance(error, ConfigError) else 1


def _tell_error(text: str, *, several: int) -> None:
    shown = Console(stderr=True, highlight=False, soft_wrap=True)
    if several == 1:
        shown.print(f"[bold red]Error:[/] {escape(text)}")
        return
    shown.print(f"[bold red]Error:[/] {several} settings cannot be used:")
    for line in text.splitlines():
        shown.print(f"  [red]•[/] {escape(line)}")


def describe(config: Config, trainer: Trainer, folder: Path) -> None:
    """Say what a training will do."""
    scheduler = type(trainer.pipeline.scheduler).__name__
    sampling = ", ".join(f"{name} {value}" for name, value in config.sampling.call().items())
    rewards = " + ".join(f"{term.weight:g} × {name}" for name, term in config.rewards.items())
    judged = [name for name in config.judges if name not in config.rewards]
    watched = f"; watched: {', '.join(judged)}" if judged else ""
    rows = {
        "model": f"{config.model.name} ({config.model.dtype}, {trainer.pipeline.device}), {scheduler}, {sampling}",
        "reward": rewards + watched,
        "prompts": f"{_source(config.prompts.train)}: {len(trainer.prompts)} to train on",
        "gradient": _gradient(config.estimator),
        "adapter": f"LoRA rank {config.adapter.rank}, {sum(p.numel() for p in trainer.parameters.values()):,} weights",
        "training": _length(trainer),
        "guard": _guard(config, len(judged)),
        "run": str(folder),
    }
    table = Table(box=None, show_header=False, padding=(0, 1))
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", escape(value))
    console().print(table)


def _guard(config: Config, num_judges: int) -> str:
    """What notices that the reward is being fooled."""
    if config.guard is None or config.evaluation is None:
        return "none: the adapter of the highest reward is kept, whatever it cost"
    if not num_judges:
        return "watches the pictures' diversity alone: name rewards that are not trained as judges"
    judges = f"{num_judges} judge{'s' if num_judges > 1 else ''}"
    return judges if config.guard.window is None else f"{judges}; ends the run if they fall while the reward rises"


def _length(trainer: Trainer) -> str:
    """How long it trains."""
    bounds = [f"{trainer.steps:,} steps of {trainer.images_a_step} images"]
    bounds += [f"{trainer.max_images:,} images scored"] if trainer.max_images is not None else []
    bounds += [f"{trainer.max_seconds:g} s of steps"] if trainer.max_seconds is not None else []
    return bounds[0] if len(bounds) == 1 else f"at most {', '.join(bounds)}"


def _gradient(settings: EstimatorSettings) -> str:
    """The estimator and what chooses its live steps."""
    if settings.name != "alignprop":
        return ", ".join([settings.name, *(f"{name} {value}" for name, value in settings.arguments.items())])
    kind = settings.truncation.model_dump()
    window = ", ".join(f"{name} {'all' if value is None else value}" for name, value in kind.items() if name != "kind")
    return f"{settings.name}, live denoising steps: {kind['kind']}{window and f' ({window})'}"


def _source(source: str | Sequence[str] | None) -> str:
    return source if isinstance(source, str) else "own list"


def tell_findings(findings: Sequence[Finding]) -> None:
    """One line for each thing that the probe checked."""
    for finding in findings:
        mark = "[green]✓[/]" if finding.passed else "[bold red]✗[/]"
        tell(f"{mark} {finding.name}: {escape(finding.detail)}")


_MARKS = {"sound": "[green]✓[/]", "doubtful": "[yellow]![/]", "broken": "[bold red]✗[/]", "idle": "[dim]·[/]"}


def tell_diagnosis(diagnosis: Diagnosis) -> None:
    """One line for each thing that the reward doctor examined, and a conclusion."""
    table = Table(
        Column(no_wrap=True), Column(no_wrap=True), Column(), box=None, show_header=False, padding=(0, 1, 0, 0)
    )
    for finding in diagnosis.findings:
        table.add_row(_MARKS[finding.verdict], finding.name, escape(finding.detail))
    console().print(table)
    doubtful = sum(finding.verdict == "doubtful" for finding in diagnosis.findings)
    if diagnosis.broken:
        tell("\n[bold red]Broken:[/] mend what is marked ✗ before you use it.")
    elif doubtful:
        tell(f"\n[yellow]Usable[/], with {doubtful} {'warning' if doubtful == 1 else 'warnings'}.")
    else:
        tell("\n[green]Sound.[/]")


def reward_list(cards: Mapping[str, RewardCard], arguments: Mapping[str, Iterable[str]]) -> Table:
    """A table of the rewards that fits 80 columns.

    Args:
        cards: by name.
        arguments: their arguments' names, by the reward's name.
    """
    widths = {"range": 16, "weights": 7, "download": 9, "licence": 11, "grad": 4}
    facts_of = [Column(header, width=width, overflow="fold") for header, width in widths.items()]
    table = Table("reward", *facts_of, box=None, padding=(0, 1, 0, 0))
    for name, card in cards.items():
        named = ", ".join(arguments[name])
        lines = [f"[bold]{name}[/]", card.summary, f"[dim]takes {named}[/]" if named else ""]
        gradient = "yes" if card.differentiable else "[yellow]no[/]"
        facts = (card.value_range, card.weights or "none", card.downloads or "none", card.license)
        table.add_row("\n".join(filter(None, lines)), *map(escape, facts), gradient)
        table.add_row()
    return table


def tell_estimators(descriptions: Sequence[EstimatorDescription], in_full: bool) -> None:
    """The estimators: a table of them or, in full, their formulas and the defaults of their settings.

    Args:
        descriptions: what to tell of.
        in_full: whether to tell everything.
    """
    if in_full:
        for each in descriptions:
            tell(f"[bold]{escape(each.name)}[/]\n")
            for indent, paragraph in _paragraphs(f"{each.formula}\n\n{each.explanation}"):
                console().print(Padding(escape(paragraph), (0, 0, 0, indent)))
            tell()
            for name, default in each.arguments.items():
                tell(f"  estimator.arguments.{escape(name)} = {escape(default)}")
        return
    table = Table("estimator", "what it does", Column("reward", no_wrap=True), box=None, padding=(0, 1, 0, 0))
    for each in descriptions:
        named = ", ".join(each.arguments)
        lines = [escape(each.formula.splitlines()[0]), f"[dim]takes {escape(named)}[/]" if named else ""]
        reward = "with gradient" if each.needs_gradient else "any"
        table.add_row(f"[bold]{each.name}[/]", "\n".join(filter(None, lines)), reward)
    console().print(table)


def tell_reward(name: str, card: RewardCard | None, arguments: Mapping[str, Parameter], explanation: str) -> None:
    """Everything about one reward.

    Args:
        name: of `REWARDS`, or the user's own.
        card: None for the user's own.
        arguments: that it takes, by name.
        explanation: its docstrings.
    """
    tell(f"[bold]{escape(name)}[/]")
    facts = {}
    if card is not None:
        facts = {
            "measures": card.summary,
            "range": card.value_range,
            "gradient": "yes" if card.differentiable else "no: for judges, and for estimators that need none",
            "weights": card.weights or "none",
            "download": card.downloads or "none",
            "licence": card.license,
        }
    for argument, parameter in arguments.items():
        facts[f"--set {argument}=..."] = _declared(parameter)
    table = Table(Column(no_wrap=True), Column(), box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in facts.items():
        table.add_row(escape(key), escape(value))
    console().print(table)
    tell()
    for indent, paragraph in _paragraphs(explanation):
        console().print(Padding(escape(paragraph), (0, 0, 0, indent)))


def _paragraphs(docstring: str) -> Iterator[tuple[int, str]]:
    """The paragraphs of a docstring, each with its indent; one begins after a blank line, a heading or an argument."""
    paragraph, indent = "", 0
    for line in [*docstring.splitlines(), ""]:
        begins = re.match(r"(Args|Returns|Raises|Attributes):$| {4}\w+: ", line)
        if paragraph and (not line or begins or paragraph.endswith(":")):
            yield indent, paragraph
            paragraph = ""
        if not line:
            yield 0, ""
        elif paragraph:
            paragraph += " " + line.strip()
        else:
            paragraph, indent = line.strip(), len(line) - len(line.lstrip())


def _declared(parameter: Parameter) -> str:
    kind = parameter.annotation if isinstance(parameter.annotation, str) else ""
    default = "needed" if parameter.default is parameter.empty else f"default {parameter.default!r}"
    return f"{kind}, {default}" if kind else default


def conclude(config: Config, folder: Path) -> None:
    """Say what came out of a run, and how to use it."""
    from alignprop.report import summarise

    summary = summarise(folder)
    tell(f"\n[bold]{escape(summary.headline)}[/]")
    for warning in summary.warnings:
        tell(f"[yellow]{escape(warning)}[/]")
    if (folder / "report.html").exists():
        tell(f"Report:  {escape(str(folder / 'report.html'))}")
    tell(f"Adapter: {escape(str(folder / 'adapter'))}\n\nUse it:")
    Console(quiet=_RANK != 0, highlight=False, soft_wrap=True).print(escape(loading_code(config, folder / "adapter")))


def loading_code(config: Config, adapter: Path, shown: Path | None = None) -> str:
    """The lines of Python that draw with an adapter.

    Args:
        config: of its run.
        adapter: its folder.
        shown: how the lines name the folder; None for as it is.
    """
    from alignprop.adapter_files import DIFFUSERS_FILE, SECOND_FILE

    folder = repr(str(shown or adapter))
    if (adapter / DIFFUSERS_FILE).is_file() and not (adapter / SECOND_FILE).is_file():
        use = [f"pipe.load_lora_weights({folder})"]
    else:
        use = ["from alignprop import load_adapter", f"load_adapter(pipe, {folder})"]
    call = "".join(f", {name}={value!r}" for name, value in config.sampling.call().items())
    lines = [*_model_code(config.model), *use, f'pipe("a fox"{call}).images[0].save("fox.png")']
    return "\n".join(f"    {line}" for line in lines)


def _model_code(model: Model) -> list[str]:
    if model.name == "emoji":
        return ["from alignprop import emoji", "pipe = emoji.pipeline()"]
    is_file = Path(model.name).is_file()
    cls = model.pipeline or ("StableDiffusionPipeline" if is_file else "DiffusionPipeline")
    how = "from_single_file" if is_file else "from_pretrained"
    dtype = {"fp32": "", "bf16": ", torch_dtype=torch.bfloat16", "fp16": ", torch_dtype=torch.float16"}[model.dtype]
    imports = [*(["import torch"] if dtype else []), f"from diffusers import {cls}"]
    return [*imports, f"pipe = {cls}.{how}({model.name!r}{dtype})"]


def comparison(name: str, results: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table of the rewards on one set of prompts, of the base model and, where there is one, with the adapter."""
    base = results["base"]
    table = set_table(name, base, "reward", *results, *(["change"] if "adapter" in results else []))
    for reward in base["rewards"]:
        scores = [result["rewards"][reward] for result in results.values()]
        table.add_row(
            reward, *(f"{s['mean']:.4g} ± {s['sem']:.2g}" for s in scores), *_change(s["mean"] for s in scores)
        )
    diversities = [result["diversity"] for result in results.values()]
    table.add_row("diversity", *(f"{value:.3g}" for value in diversities), *_change(diversities))
    return table


def set_table(name: str, measured: Mapping[str, Any], *columns: str) -> Table:
    """An empty table of what was measured on one set of prompts."""
    title = (
        f"{name} prompts: {measured['num_prompts']} prompts, {measured['num_images']} images (mean ± standard error)"
    )
    table = Table(*columns, title=title, box=None)
    table.title_justify = "left"
    return table


def _change(values: Iterator[float] | Sequence[float]) -> list[str]:
    first, *others = values
    return [f"{value - first:+.3g}" for value in others]


def is_terminal() -> bool:
    """Whether a person is likely to be looking."""
    return sys.stdout.isatty()
