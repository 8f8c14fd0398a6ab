"""The folder of a run: where its files are, and its JSON lines."""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class JsonLines:
    """A file with one JSON object a line, each with the ``step`` that it tells of."""

    path: Path

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; none if there is no file."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a line

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line and flush it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(line)) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``: a resumed run writes them again."""
        kept = [line for line in self.read() if line["step"] <= step]
        if self.path.exists():
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))


@dataclass(frozen=True)
class RunFolder:
    """The files of a run.

    Attributes:
        path: the run's folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """Everything that made the run, resolved."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> JsonLines:
        """One line a step."""
        return JsonLines(self.path / "metrics.jsonl")

    @property
    def evaluations(self) -> JsonLines:
        """One line an evaluation."""
        return JsonLines(self.path / "evaluation.jsonl")

    @property
    def adapter(self) -> Path:
        """The best adapter."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """What resume needs, a folder a step."""
        return self.path / "checkpoints"

    def samples(self, step: int) -> Path:
        """The picture grids of an evaluation."""
        return self.path / "samples" / f"step-{step:06d}"


def measured_alike(evaluations: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The evaluations since a resume last changed what is measured: the base model's, which is measured anew, first."""
    return evaluations[max((place for place, line in enumerate(evaluations) if line.get("base")), default=0) :]


def is_taken(path: Path) -> bool:
    """Whether something is at ``path`` that a new folder there would mix with: a file, or a folder with content."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader finds the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # its own, where several processes write
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
