"""`alignprop compare`: parse, call, print."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignprop.terminal import INTERRUPTED, console, errors_told, loading, tell

if TYPE_CHECKING:
    from alignprop.comparison.budget import Budget
    from alignprop.comparison.declaration import Declaration
    from alignprop.comparison.jobs import Job
    from alignprop.comparison.running import Ended
    from alignprop.trainer import Trainer

DEFAULT_RECIPE = "emoji"


def compare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name or a YAML file.")] = DEFAULT_RECIPE,
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="Estimators, or keys of --methods-file, separated by commas.")
    ] = "",
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each method, with the seeds 0 to N-1.")] = 5,
    budget: Annotated[str, typer.Option(metavar="UNIT=X", help="Of each run: images=640 or seconds=300.")] = "",
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Without, comparisons/RECIPE.")] = None,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe for every method.")
    ] = [],  # noqa: B006  # typer copies it
    methods_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML with settings of each method, and trials to choose from.")
    ] = None,
    reach: Annotated[
        float | None,
        typer.Option(metavar="X", help="Trained reward whose cost is told; without, half of the best gain."),
    ] = None,
    evaluations: Annotated[int, typer.Option(metavar="N", help="Of each run, beside the base model's.")] = 12,
    report_only: Annotated[bool, typer.Option("--report-only", help="Train nothing; write the page again.")] = False,
) -> None:
    """Compare methods at equal budget, over seeds: one page with curves, intervals and pictures.

    Go on with a comparison that was stopped by the same command; a second process may help on the same folder.

    [bold]alignprop compare emoji --methods alignprop,ddpo --budget images=640[/]

    [bold]alignprop compare mine.yaml --methods full,ddpo --methods-file methods.yaml --seeds 3 --budget seconds=300[/]

    [bold]alignprop compare emoji --output comparisons/emoji --report-only --reach 7.5[/]

    A methods file (search and budgets, for methods that go on after the others end, may be left out):

    [bold]methods: {full: {estimator.name: alignprop, estimator.truncation: {kind: all}}}[/]

    [bold]search: {budget: images=320, seed: 100, trials: {full: [{optimizer.learning_rate: 1.0e-3}]}}[/]

    [bold]budgets: {ddpo: images=6400}[/]
    """
    with errors_told():
        from alignprop.comparison.declaration import read_declaration

        folder = output or Path("comparisons") / Path(recipe).stem
        if report_only:
            read_declaration(folder)
        else:
            names = [name.strip() for name in methods.split(",") if name.strip()]
            asked = _asked(recipe, names, seeds, budget, settings, methods_file, reach, evaluations)
            _train(_declared(folder, asked, methods_file), folder)
        _conclude(folder, reach, partly=report_only)


def _asked(
    recipe: str,
    names: list[str],
    seeds: int,
    budget: str,
    settings: list[str],
    methods_file: Path | None,
    reach: float | None,
    evaluations: int,
) -> Declaration:
    """What the command line asks for.

    Raises:
        ConfigError: with all that is wrong with it by itself.
    """
    from alignprop.comparison.budget import Budget, read_budget
    from alignprop.comparison.declaration import Declaration
    from alignprop.comparison.methods import choose, read_methods, reserved, trials_of, uncommon
    from alignprop.config import ConfigError, recipe_path

    problems = [
        f"--{name}={value} needs a whole number, at least 1."
        for name, value in (("seeds", seeds), ("evaluations", evaluations))
        if value < 1
    ]
    spent = Budget("images", 1)
    try:
        spent = read_budget("--budget", budget)
    except ValueError as error:
        problems.append(str(error))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("compare trains on one process: call it by itself, as often as there are devices.")
    file = read_methods(methods_file)
    problems += reserved({override.partition("=")[0].strip(): None for override in settings}, "--set ")
    try:
        chosen, search = choose(names, file), trials_of(file.search, names, seeds)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    for name, own in chosen.items():
        problems += [*reserved(own, f"methods.{name}: "), *uncommon(own, f"methods.{name}: ")]
        for trial in search.trials[name] if search else ():
            where = f"search.trials.{name}: "
            problems += [*reserved(trial, where), *uncommon(trial, where)]
    problems += _unfit_budgets(file.budgets, spent)
    if problems:
        raise ConfigError(problems)
    return Declaration(
        recipe=recipe,
        recipe_settings=_content(recipe_path(recipe)),
        settings=tuple(settings),
        methods=chosen,
        seeds=seeds,
        budget=spent,
        budgets={name: budget for name, budget in file.budgets.items() if name in chosen},
        evaluations=evaluations,
        search=search,
        reach=reach,
    )


def _unfit_budgets(budgets: Mapping[str, Budget], common: Budget) -> list[str]:
    """A sentence for each budget of a method that the budget of all is no part of."""
    return [
        f"budgets.{name}={budget} needs at least --budget {common}, at which the methods are compared."
        for name, budget in budgets.items()
        if budget.unit != common.unit or budget.amount < common.amount
    ]


def _content(path: Path) -> Mapping[str, Any]:
    """What a recipe's file says; nothing where it is broken, which checking the settings tells."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return data if isinstance(data, dict) else {}


def _declared(folder: Path, asked: Declaration, methods_file: Path | None) -> Declaration:
    """Check the settings of every method, and hold the folder to the comparison."""
    from alignprop.comparison.declaration import declare
    from alignprop.comparison.jobs import check

    measured = replace(asked, rewards=check(asked, folder))
    return declare(folder, replace(measured, command=_command(folder, asked, methods_file)))


def _command(folder: Path, asked: Declaration, methods_file: Path | None) -> str:
    """The command that makes this comparison, and goes on with it."""
    words = ["alignprop", "compare", asked.recipe, "--methods", ",".join(asked.methods), "--seeds", str(asked.seeds)]
    words += ["--budget", str(asked.budget), "--evaluations", str(asked.evaluations), "--output", str(folder)]
    words += ["--methods-file", str(methods_file)] if methods_file else []
    words += [word for override in asked.settings for word in ("--set", override)]
    words += ["--reach", f"{asked.reach:g}"] if asked.reach is not None else []
    return shlex.join(words)


def _train(declaration: Declaration, folder: Path) -> None:
    """Train what is open; Ctrl-C says how to go on."""
    with loading():
        from alignprop.comparison.running import train_all

    budget = declaration.budget

    def told(job: Job, trainer: Trainer) -> str:
        done = trainer.images_scored if job.budget.unit == "images" else trainer.train_seconds
        return f"{job.method}, {job.part}: {done:.0f} of {job.budget.amount:g} {job.budget.unit}"

    def awaited(jobs: list[Job]) -> str:
        return f"Waiting for another process, which trains {', '.join(f'{job.method}, {job.part}' for job in jobs)}"

    tell(
        f"[bold]{escape(', '.join(declaration.methods))}[/], {declaration.seeds} seeds of {budget.amount:g} "
        f"{budget.unit} each, into {escape(str(folder))}"
    )
    try:
        with Console(stderr=True).status("Loading ...") as shown:
            training = train_all(
                declaration,
                folder,
                progress=lambda job, trainer: shown.update(escape(told(job, trainer))),
                waiting=lambda jobs: shown.update(escape(awaited(jobs))),
            )
            for ended in training:
                tell(_line(ended))
    except KeyboardInterrupt:
        tell("Stopped; what was trained is kept. Go on with:\n")
        Console(highlight=False, soft_wrap=True).print(f"    {escape(declaration.command)}")
        raise typer.Exit(INTERRUPTED) from None


def _line(ended: Ended) -> str:
    """A run that has ended, in a line."""
    from alignprop.report import duration, number

    job = ended.job
    start = f"[{ended.place}/{ended.total}]"
    head = f"{escape(start)} [bold]{escape(job.method)}[/] {job.part}, {duration(ended.seconds)}"
    if (failure := job.failure) is not None:
        again = f"to try it again, delete {job.folder}"
        return f"{head}: [yellow]failed[/]: {escape(failure)}\n    ({escape(again)})"
    first, last = job.evaluations[0], job.evaluations[-1]
    name = next(iter(last["sets"]))
    before, after = first["sets"][name]["reward"]["mean"], last["sets"][name]["reward"]["mean"]
    return f"{head}: {escape(' + '.join(last['trained']))} {number(before)} → {number(after)} on {name} prompts"


def _conclude(folder: Path, reach: float | None, *, partly: bool) -> None:
    """Write what there is, unless other processes are still at it, and sum it up.

    Args:
        folder: of the comparison.
        reach: the value to tell the cost of, where another is asked for than the declared one.
        partly: whether to write also while runs are open.
    """
    from alignprop.comparison.declaration import read_declaration
    from alignprop.comparison.results import results
    from alignprop.report import versions
    from alignprop.runfolder import write_atomically

    declaration = read_declaration(folder)  # another process may have added methods
    if reach is not None:
        declaration = replace(declaration, reach=reach)
    found = {**results(declaration, folder), "versions": versions()}
    if not found["complete"] and not partly:
        open_runs = ", ".join(
            run["folder"]
            for method in found["methods"].values()
            for run in method["seeds"].values()
            if not run["finished"] and not run["failure"]
        )
        tell(f"Other processes are training what is left ({escape(open_runs)}); the last one writes the report.")
        return
    written = [folder / "compare.json"]
    write_atomically(written[0], json.dumps(found, indent=1) + "\n")
    try:
        from alignprop.comparison.page import write_page

        written.append(write_page(folder, found))
    except ImportError as error:  # the pages are an extra
        tell(f"[yellow]No compare.html: {escape(str(error))}[/]")
    _sum_up(found)
    for path in written:
        tell(escape(str(path)))


def _sum_up(results: Mapping[str, Any]) -> None:
    """The outcome in words, and a row for each method."""
    from alignprop.comparison import outcome

    axis = outcome.lead_axis(results)
    costs = (results["reach"] or {}).get("methods", {})
    titles = ["method", "unseen prompts", "training prompts", f"{outcome.AXES[axis]} to reach it", "reached by"]
    table = Table(*titles, box=None)
    for name, method in results["methods"].items():
        final, cost = method["final"] or {}, costs.get(name)
        reached = f"{cost['reached']} of {cost['of']} seeds" if cost else "–"
        needed = outcome.with_half_width(cost[axis]["interval"]) if cost else "–"
        ends = [outcome.with_half_width(final[key]["reward"] if key in final else None) for key in ("unseen", "train")]
        table.add_row(escape(name), *ends, needed, reached)
    tell(f"\n[bold]{escape(outcome.headline(results))}[/]\n")
    console().print(table)
    tell()
