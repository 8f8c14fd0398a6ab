"""Restartable training loops: everything that changes is saved every two minutes and read back at the start."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

INTERVAL_S = 120


class Stateful(Protocol):
    """What a checkpoint holds: a module, an optimizer, a schedule."""

    def state_dict(self) -> Mapping[str, Any]:
        """All that changes in training."""

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Put it back."""


class Checkpoint:
    """Counts the steps of one training, saves it and takes it up where it was cut.

    Args:
        path: File of the checkpoint, written atomically.
        parts: What is saved, by name.
        generator: The source of all randomness of the loop.
        interval_s: Seconds between two savings.
    """

    def __init__(
        self, path: Path, parts: Mapping[str, Stateful], generator: torch.Generator, interval_s: float = INTERVAL_S
    ) -> None:
        self._path, self._parts, self._generator = path, parts, generator
        self._interval_s = interval_s
        self._losses: list[float] = []
        self._start_s = time.monotonic()

    def steps(self, total: int) -> Iterator[int]:
        """Yield the numbers of the steps that are still to be done; save on the way and at the end."""
        first = self._restore()
        saved_s = time.monotonic()
        for step in range(first, total):
            yield step
            if time.monotonic() - saved_s > self._interval_s or step + 1 == total:
                self._save(step + 1)
                saved_s = time.monotonic()

    def log(self, step: int, loss: torch.Tensor, every: int = 50) -> None:
        """Print the mean loss of the last steps."""
        self._losses.append(loss.item())
        if len(self._losses) == every:
            seconds = time.monotonic() - self._start_s
            print(f"step {step + 1} loss {sum(self._losses) / every:.4f} at {seconds:.0f} s", flush=True)
            self._losses.clear()

    def _restore(self) -> int:
        if not self._path.exists():
            return 0
        state = torch.load(self._path)
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self._generator.set_state(state["generator"])
        return state["step"]

    def _save(self, step: int) -> None:
        state = {name: part.state_dict() for name, part in self._parts.items()}
        partial = self._path.with_suffix(".partial")
        torch.save(state | {"generator": self._generator.get_state(), "step": step}, partial)
        os.replace(partial, self._path)
