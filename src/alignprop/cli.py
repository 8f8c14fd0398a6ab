"""The command line: parse, call, print."""

from __future__ import annotations

import json
import textwrap
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Column, Table

from alignprop.comparison.command import compare
from alignprop.drawing import (
    DEFAULT_RECIPE,
    adapter_folder,
    base_sampler,
    measures,
    pictures,
    settings_of,
    write_pictures,
)
from alignprop.terminal import (
    FAILED,
    INTERRUPTED,
    comparison,
    conclude,
    console,
    describe,
    errors_told,
    is_terminal,
    loading,
    loading_code,
    reward_list,
    status,
    tell,
    tell_diagnosis,
    tell_estimators,
    tell_findings,
    tell_reward,
)

if TYPE_CHECKING:
    from alignprop.config import Config
    from alignprop.progress import ProgressBar
    from alignprop.runfolder import RunFolder
    from alignprop.trainer import Trainer

app = typer.Typer(
    name="alignprop",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Align diffusion models by backpropagating a reward through their own sampler.",
    epilog="Start with [bold]alignprop train[/]: it needs no download and takes some minutes.",
)

Settings: TypeAlias = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe; the value is YAML.")
]
RecipeName: TypeAlias = Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name or a YAML file.")]
ModelName: TypeAlias = Annotated[
    str | None, typer.Option("--model", help="emoji, a folder, a .safetensors file or a model on the hub.")
]
AdapterFolder: TypeAlias = Annotated[
    Path | None, typer.Option("--adapter", help="An adapter's folder, or a run, whose settings are used then.")
]
Steps: TypeAlias = Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps.")]
RewardName: TypeAlias = Annotated[str, typer.Argument(metavar="NAME", help="A reward's name, or module:attribute.")]
Guidance: TypeAlias = Annotated[float | None, typer.Option("--guidance", help="Classifier-free guidance.")]


class ExportFormat(StrEnum):
    """What `export` writes."""

    KOHYA = "kohya"
    MERGED = "merged"


def main() -> None:
    """Run the command line."""
    app()


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    """Options of every command."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"alignprop {installed('alignprop')}")
        raise typer.Exit


@app.command()
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


@app.command()
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


@app.command()
def sample(
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; may be given several times.")],
    model: ModelName = None,
    adapter: AdapterFolder = None,
    compare: Annotated[bool, typer.Option("--compare", help="Without and with the adapter, side by side.")] = False,
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Pictures of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture; the next has the next.")] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="A PNG; several pictures become a grid.")] = Path(
        "sample.png"
    ),
) -> None:
    """Draw pictures.

    [bold]alignprop sample -p "a fox" -n 4[/]

    [bold]alignprop sample -p "a panda" --adapter runs/mine --compare[/]
    """
    with errors_told():
        if compare and adapter is None:
            raise typer.BadParameter("--compare needs --adapter, to compare the model with.")
        with loading():
            sampler, folder = base_sampler(model, adapter, steps, guidance)
        with status("Drawing"):
            base = [(text, pictures(sampler, text, num, seed)) for text in prompt] if compare or not folder else []
            adapted = []
            if folder is not None:
                from alignprop.adapter_files import load_adapter

                load_adapter(sampler.pipeline, folder)
                mark = " (adapter)" if compare else ""
                adapted = [(text + mark, pictures(sampler, text, num, seed)) for text in prompt]
            pairs = (
                [column for pair in zip(base, adapted, strict=True) for column in pair] if compare else base + adapted
            )
            write_pictures(pairs, output)
        tell(f"Wrote {escape(str(output))}")


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run's folder.")] = None,
    model: ModelName = None,
    adapter: AdapterFolder = None,
    prompts: Annotated[str | None, typer.Option(help="A list's name, a file, or module:function.")] = None,
    reward: Annotated[list[str], typer.Option("--reward", help="A reward; may be given several times.")] = [],  # noqa: B006
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 4,
    steps: Steps = None,
    guidance: Guidance = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure rewards, of the base model and with the adapter, at the same seeds.

    [bold]alignprop evaluate runs/mine[/]

    [bold]alignprop evaluate --adapter runs/mine/adapter --prompts animals --reward emoji-clip --json[/]
    """
    with errors_told():
        from alignprop.adapter_files import load_adapter
        from alignprop.evaluation import evaluate as measure

        adapter = adapter or run
        with loading():
            sampler, folder = base_sampler(model, adapter, steps, guidance)
            rewards, sets = measures(settings_of(adapter), reward, prompts, sampler.pipeline.device)
        results: dict[str, Any] = {}
        for label in ("base", "adapter") if folder else ("base",):
            if label == "adapter" and folder is not None:
                load_adapter(sampler.pipeline, folder)
            for name, chosen in sets.items():
                with status(f"Measuring: {label}, {name} prompts"):
                    result = measure(sampler, chosen, rewards, images_per_prompt=images_per_prompt)
                summary = result.summary(dict.fromkeys(rewards, 1.0))
                del summary["reward"]  # a sum of rewards, which nobody asked for
                results.setdefault(name, {})[label] = summary
        if as_json:
            typer.echo(json.dumps(results, indent=2))
        else:
            for name, by_label in results.items():
                console().print(comparison(name, by_label))


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or an adapter's.")],
    output: Annotated[Path | None, typer.Option(metavar="PATH", help="The file, or for merged the folder.")] = None,
    format: Annotated[ExportFormat, typer.Option("--format", help="What to write.")] = ExportFormat.KOHYA,
    pipeline: Annotated[
        str | None, typer.Option(help="Class of the pipeline, for an adapter from elsewhere: FluxPipeline.")
    ] = None,
    model: ModelName = None,
) -> None:
    """Write an adapter for other programs: as kohya, A1111 and ComfyUI name it, or merged into the full model.

    [bold]alignprop export runs/mine[/]

    [bold]alignprop export runs/mine --format merged --output my-model[/]
    """
    with errors_told():
        from alignprop.export import save_kohya, save_merged

        folder = adapter_folder(adapter)
        if format is ExportFormat.KOHYA:
            written = save_kohya(folder, output or folder / "kohya.safetensors", pipeline)
        else:
            with loading():
                sampler, _ = base_sampler(model, adapter, None, None)
            written = save_merged(sampler.pipeline, folder, output or folder.parent / "merged")
        tell(f"Wrote {escape(str(written))}")


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this one.")] = None) -> None:
    """List the recipes, or print one.

    [bold]alignprop recipes[/]

    [bold]alignprop recipes emoji > mine.yaml[/]
    """
    with errors_told():
        from alignprop.config import recipe_path
        from alignprop.config import recipes as known

        if name is not None:
            text = recipe_path(name).read_text(encoding="utf-8")
            console().print(Syntax(text, "yaml")) if is_terminal() else typer.echo(text, nl=False)
            return
        table = Table(Column("recipe", no_wrap=True), "what it does", box=None)
        for recipe, row in known().items():
            table.add_row(f"[bold]{recipe}[/]", row.description)
        console().print(table)


@app.command()
def estimators(name: Annotated[str | None, typer.Argument(help="Show this one in full.")] = None) -> None:
    """List the ways to turn a reward into gradients, or show one with its formula and its settings.

    [bold]alignprop estimators[/]

    [bold]alignprop estimators ddpo[/]

    [bold]alignprop train --set estimator.name=draft-k --set 'estimator.arguments={steps: 2}'[/]
    """
    with errors_told():
        from alignprop.config import describe_estimators

        tell_estimators(describe_estimators(name), in_full=name is not None)


app.command()(compare)

rewards_app = typer.Typer(rich_markup_mode="rich", add_completion=False)
app.add_typer(rewards_app, name="rewards")


@rewards_app.callback(invoke_without_command=True)
def rewards(context: typer.Context) -> None:
    """List the rewards that have a name, show one in full, or examine one.

    Your own is any function (images, prompts) -> scores, named as [bold]module:attribute[/].

    [bold]alignprop rewards[/]

    [bold]alignprop rewards show clip-score[/]

    [bold]alignprop rewards check my_rewards:redness[/]
    """
    if context.invoked_subcommand is None:
        from alignprop.rewards import REWARDS, arguments_of

        console().print(reward_list(REWARDS, {name: arguments_of(name) for name in REWARDS}))


@rewards_app.command("show")
def show_reward(name: RewardName) -> None:
    """Show one reward in full, with its arguments.

    [bold]alignprop rewards show clip-score[/]
    """
    with errors_told():
        from alignprop.rewards import REWARDS, arguments_of, explanation_of

        tell_reward(name, REWARDS.get(name), arguments_of(name), explanation_of(name))


@rewards_app.command("check")
def check_reward(
    name: RewardName,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pictures to examine it on; without, the embedded model draws.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Of all pictures; without, their names: a_cat.png.")] = None,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="An argument of the reward; the value is YAML.")
    ] = [],  # noqa: B006
) -> None:
    """Examine a reward: scores, gradient, batch size, precision, cost. Exits with 1 if it is broken.

    [bold]alignprop rewards check emoji-aesthetic[/]

    [bold]alignprop rewards check my_rewards:redness --images photos[/]

    [bold]alignprop rewards check clip-score --set model=/path/to/clip[/]
    """
    with errors_told():
        from alignprop.config import JudgeTerm, Model, device_of, load_terms, read_overrides

        arguments = read_overrides(settings)
        with loading():
            from alignprop.rewards.doctor import examine
            from alignprop.rewards.specimens import drawn_specimens, folder_specimens

            specimens = folder_specimens(images, prompt) if images is not None else drawn_specimens(prompt)
            device = device_of(Model())
            reward = load_terms({name: JudgeTerm(arguments=arguments)}, device)[name]
        tell(f"[bold]{escape(name)}[/], on {escape(specimens.origin)}:\n")
        with status("Examining the reward"):
            diagnosis = examine(reward, specimens.images.to(device), specimens.prompts, name)
        tell_diagnosis(diagnosis)
        if diagnosis.broken:
            raise typer.Exit(FAILED)


@app.command()
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

    name = config.run.name or time.strftime(f"{Path(recipe or DEFAULT_RECIPE).stem}-%Y%m%d-%H%M%S")
    path: Path = distributed.gather([output or Path(config.run.folder) / name])[0]
    taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if any(distributed.gather([taken])):
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


if __name__ == "__main__":
    main()
