"""Commands that train: train, check and report."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from alignprop.cli.options import RecipeName, Settings
from alignprop.drawing import DEFAULT_RECIPE
from alignprop.terminal import (
    FAILED,
    INTERRUPTED,
    conclude,
    console,
    describe,
    errors_told,
    loading,
    loading_code,
    status,
    tell,
    tell_findings,
)

if TYPE_CHECKING:
    from alignprop.config import Config
    from alignprop.progress import ProgressBar
    from alignprop.runfolder import RunFolder
    from alignprop.trainer import Trainer


def train(
    recipe: RecipeName = None,
    settings: Settings = [],  # noqa: B006  # typer copies it
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with a run that was stopped.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="The run's folder.")] = None,
    probe: Annotated[bool, typer.Option(help="Check pipeline and reward before the first step.")] = True,
) -> None:
    """Train an adapter on a reward.

    [bold]alignprop train[/]  the embedded model, the default recipe

    [bold]alignprop train emoji --set training.steps=80 --set adapter.rank=8[/]

    [bold]alignprop train mine.yaml --output runs/mine[/]

    [bold]alignprop train --resume runs/mine[/]

    [bold]accelerate launch -m alignprop.cli train mine.yaml[/]
    """
    with errors_told():
        from alignprop.config import Run, build, load_config, save

        if resume is not None and (recipe is not None or output is not None):
            raise typer.BadParameter("--resume takes everything from the run: leave RECIPE and --output out.")
        config = load_config(_config_of(resume) if resume else recipe or DEFAULT_RECIPE, settings)
        with loading():
            from alignprop import distributed
            from alignprop.progress import ProgressBar
            from alignprop.runfolder import RunFolder

            files = RunFolder(resume or _run_folder(config, recipe, output))
            bar = ProgressBar(console(), files)
            trainer = build(config, files.path, callbacks=[bar])
        if resume is not None:
            _load_latest(trainer, files.path)
        describe(config, trainer, files.path)
        if probe:
            _probe(trainer)
        if distributed.process().is_main_process:
            place = Run(name=files.path.name, folder=str(files.path.parent))
            save(config.model_copy(update={"run": place}), files.config)
        _run(trainer, bar, files.path)
        if distributed.process().is_main_process:
            _write_report(files.path)
            _write_card(config, files)
            conclude(config, files.path)


def check(recipe: RecipeName = None, settings: Settings = []) -> None:  # noqa: B006
    """Prove that a recipe can be trained: that gradient flows, and that pipeline and reward are usable.

    [bold]alignprop check emoji[/]

    [bold]alignprop check mine.yaml --set model.name=/path/to/model[/]
    """
    with errors_told():
        from alignprop.config import build, load_config

        config = load_config(recipe or DEFAULT_RECIPE, settings)
        with loading():
            trainer = build(config, Path(config.run.folder))
        _probe(trainer)


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]) -> None:
    """Write a run's report.html again.

    [bold]alignprop report runs/mine[/]
    """
    with errors_told():
        _config_of(run)
        _write_report(run)
        tell(escape(str(run / "report.html")))


def _config_of(run: Path) -> Path:
    """The configuration of a run.

    Raises:
        ValueError: the folder is no run.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is no run: it has no config.yaml.")
    return path


def _run_folder(config: Config, recipe: str | None, output: Path | None) -> Path:
    """Where a new run goes, the same on every process.

    Raises:
        ConfigError: something is there already.
    """
    from alignprop import distributed
    from alignprop.config import ConfigError
    from alignprop.runfolder import is_taken

    name = config.run.name or time.strftime(f"{Path(recipe or DEFAULT_RECIPE).stem}-%Y%m%d-%H%M%S")
    path: Path = distributed.gather([output or Path(config.run.folder) / name])[0]
    if any(distributed.gather([is_taken(path)])):
        remedy = f"go on with `alignprop train --resume {path}`, or give another folder: --output DIR."
        raise ConfigError([f"{path} is not empty: {remedy}"])
    return path


def _probe(trainer: Trainer) -> None:
    from alignprop.config import probe_trainer

    with status("Checking that gradient flows"):
        findings = probe_trainer(trainer)
    tell_findings(findings)
    if not all(finding.passed for finding in findings):
        raise typer.Exit(FAILED)


def _load_latest(trainer: Trainer, run: Path) -> None:
    """Go on from the last checkpoint; a run that was stopped before its first one begins again."""
    from alignprop.checkpointing import list_checkpoints, load_checkpoint
    from alignprop.runfolder import RunFolder

    checkpoints = list_checkpoints(RunFolder(run).checkpoints)
    if checkpoints:
        load_checkpoint(trainer, checkpoints[-1])


def _run(trainer: Trainer, bar: ProgressBar, folder: Path) -> None:
    """Train; whatever stops it, say how to go on."""
    from alignprop.trainer import TrainingStopped

    again = f"alignprop train --resume {folder}"
    try:
        with bar.shown():
            trainer.train()
    except KeyboardInterrupt:
        if trainer.finished:  # it came too late
            return
        tell(f"Stopped after step {trainer.step} of {trainer.steps}. Go on with:\n\n    {escape(again)}")
        raise typer.Exit(INTERRUPTED) from None
    except TrainingStopped as error:
        remedy = f"What there was before is kept; go on from the last checkpoint with other settings: {again} --set ..."
        raise ValueError(f"{error}\n{remedy}") from error


def _write_card(config: Config, files: RunFolder) -> None:
    from alignprop import __version__
    from alignprop.card import write_card

    if files.adapter.is_dir():
        write_card(files.path, textwrap.dedent(loading_code(config, files.adapter, Path("adapter"))), __version__)


def _write_report(folder: Path) -> None:
    from alignprop.report import write_report

    try:
        write_report(folder)
    except ImportError as error:  # the pages are an extra
        tell(f"[yellow]No report.html: {escape(str(error))}[/]")
