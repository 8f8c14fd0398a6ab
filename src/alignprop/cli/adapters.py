"""Commands that use an adapter: sample, evaluate and export."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from rich.markup import escape

from alignprop.cli.strengths import Asked, evaluate_strengths
from alignprop.drawing import (
    adapted,
    adapter_folder,
    base_sampler,
    how_to_measure,
    measures,
    pictures,
    settings_of,
    write_pictures,
)
from alignprop.terminal import comparison, console, errors_told, loading, status, tell

ModelName: TypeAlias = Annotated[
    str | None, typer.Option("--model", help="emoji, a folder, a .safetensors file or a model on the hub.")
]
AdapterFolder: TypeAlias = Annotated[
    Path | None, typer.Option("--adapter", help="An adapter's folder, or a run, whose settings are used then.")
]
Steps: TypeAlias = Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps.")]
Guidance: TypeAlias = Annotated[float | None, typer.Option("--guidance", help="Classifier-free guidance.")]


class ExportFormat(StrEnum):
    """What `export` writes."""

    KOHYA = "kohya"
    MERGED = "merged"


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
            changed = []
            if folder is not None:
                sampler = adapted(sampler, folder)
                mark = " (adapter)" if compare else ""
                changed = [(text + mark, pictures(sampler, text, num, seed)) for text in prompt]
            pairs = (
                [column for pair in zip(base, changed, strict=True) for column in pair] if compare else base + changed
            )
            write_pictures(pairs, output)
        tell(f"Wrote {escape(str(output))}")


def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run's folder.")] = None,
    model: ModelName = None,
    adapter: AdapterFolder = None,
    prompts: Annotated[str | None, typer.Option(help="A list's name, a file, or module:function.")] = None,
    reward: Annotated[list[str], typer.Option("--reward", help="A reward; may be given several times.")] = [],  # noqa: B006
    images_per_prompt: Annotated[
        int | None, typer.Option(min=1, help="Pictures of each prompt; else as in the run.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the noise; else as in the run.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    strengths: Annotated[
        str | None,
        typer.Option(metavar="S,S,...", help="Of the adapter: 0 is the base model, 1 the adapter; finds the best."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page of the strengths; else strengths.html in the run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure rewards, of the base model and with the adapter, at the same seeds.

    What is not given is as in the run's own evaluations, so that the numbers are theirs.

    [bold]alignprop evaluate runs/mine[/]

    [bold]alignprop evaluate --adapter runs/mine/adapter --prompts animals --reward emoji-clip --json[/]

    [bold]alignprop evaluate runs/mine --strengths 0.25,0.5,0.75,1,1.25[/]
    """
    with errors_told():
        from alignprop.measures import evaluate as measure

        adapter = adapter or run
        if strengths is not None:
            if adapter is None:
                raise typer.BadParameter("--strengths needs a run or --adapter.")
            asked = Asked(
                adapter, strengths, model, prompts, reward, images_per_prompt, seed, steps, guidance, output, as_json
            )
            return evaluate_strengths(asked)
        with loading():
            sampler, folder = base_sampler(model, adapter, steps, guidance)
            config = settings_of(adapter)
            rewards, sets = measures(config, reward, prompts, sampler.pipeline.device)
            how = how_to_measure(config, images_per_prompt, seed)
        results: dict[str, Any] = {}
        for label in ("base", "adapter") if folder else ("base",):
            if label == "adapter" and folder is not None:
                sampler = adapted(sampler, folder)
            for name, chosen in sets.items():
                with status(f"Measuring: {label}, {name} prompts"):
                    result = measure(sampler, chosen, rewards, **how)
                summary = result.summary(dict.fromkeys(rewards, 1.0))
                del summary["reward"]  # a sum of rewards, which nobody asked for
                results.setdefault(name, {})[label] = summary
        if as_json:
            typer.echo(json.dumps(results, indent=2))
        else:
            for name, by_label in results.items():
                console().print(comparison(name, by_label))


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
