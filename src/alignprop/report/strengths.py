"""An adapter at several strengths as one page: curves, a table, and pictures at the same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignprop.guard import Line, measured
from alignprop.report.pages import data_uri, page_template, require_pages
from alignprop.report.records import measures_of, prompt_sets
from alignprop.report.watch import watch_of
from alignprop.report.wording import number
from alignprop.runfolder import write_atomically


def write_strengths(
    path: Path,
    name: str,
    lines: Sequence[Line],
    best: float,
    max_fall: float | None,
    pictures: Mapping[float, Path],
    facts: Mapping[str, Any],
) -> Path:
    """Write the page and return its path.

    Args:
        path: of the page.
        name: of the adapter, for the title.
        lines: an evaluation of each strength, in rising order, 0 among them; ``step`` holds the strength.
        best: the strength that is recommended.
        max_fall: the guard's.
        pictures: a grid of pictures by strength.
        facts: what else made the figures, for the foot of the page.

    Raises:
        ImportError: the extra `report` is not installed.
    """
    require_pages()
    base_first = sorted(lines, key=lambda line: float(line["step"]) != 0)
    watch = watch_of(base_first, best, max_fall)
    assert watch is not None, "at least the base model and one strength"
    page = page_template("strengths.html.j2").render(
        name=name,
        headline=headline(lines, best),
        watch=watch,
        best=best,
        sets=prompt_sets(lines),
        lines=lines,
        measures=measures_of,
        pictures={strength: data_uri(file, max_width=1600) for strength, file in pictures.items()},
        facts=facts,
    )
    write_atomically(path, page)
    return path


def headline(lines: Sequence[Line], best: float) -> str:
    """The outcome in a sentence."""
    first = next(line for line in lines if line["step"] == 0)
    chosen = next(line for line in lines if line["step"] == best)
    rewards = " + ".join(first["trained"])
    before, after = (measured(line)["reward"]["mean"] for line in (first, chosen))
    if chosen is first:
        return f"No strength beats the base model by the guard's criterion ({rewards} {number(before)})"
    return f"Best at strength {best:g}: {rewards} {number(before)} → {number(after)}"
