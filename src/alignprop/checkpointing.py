"""Checkpoints of a run: everything that resuming needs, written atomically, read without running code."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop import distributed
from alignprop.runfolder import RunFolder
from alignprop.trainer import Callback, Metrics, Trainer

_FORMAT = "alignprop-checkpoint-1"
_TENSOR = "__tensor__"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names its folder and the reason."""


@dataclass
class Checkpoints(Callback):
    """Saves a checkpoint at intervals, at the end and when the run is interrupted.

    Attributes:
        folder: of the run.
        every: steps between checkpoints.
        keep: how many of the newest stay.
    """

    folder: RunFolder
    every: int = 50
    keep: int = 2

    def start(self, trainer: Trainer) -> None:
        """Remember where the run stands, so that an unchanged state is not written again."""
        self._saved, self._best = trainer.step, trainer.best

    def step(self, trainer: Trainer, metrics: Metrics) -> None:
        """Save when it is time."""
        if trainer.step % self.every == 0:
            self._save(trainer)

    def end(self, trainer: Trainer) -> None:
        """Save the last state, and again where the last evaluation has found it better than all before."""
        if trainer.step != self._saved or trainer.best is not self._best:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        distributed.check_identical(list(trainer.parameters.values()))
        if distributed.process().is_main_process:
            save_checkpoint(trainer, self.folder.checkpoints)
            for stale in list_checkpoints(self.folder.checkpoints)[: -self.keep]:
                shutil.rmtree(stale)
        self._saved, self._best = trainer.step, trainer.best
        distributed.process().wait_for_everyone()


def save_checkpoint(trainer: Trainer, folder: Path) -> Path:
    """Write ``step-N`` under ``folder``; it appears whole or not at all."""
    target = folder / f"step-{trainer.step:06d}"
    partial = folder / f".{target.name}.partial"
    for leftover in (partial, target):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    skeleton = _take_tensors(trainer.state(), "", tensors)
    save_file(tensors, partial / "state.safetensors")
    document = {"format": _FORMAT, "parameters": _shapes(trainer), "state": skeleton}
    (partial / "state.json").write_text(json.dumps(document), encoding="utf-8")
    os.replace(partial, target)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints under a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def load_checkpoint(trainer: Trainer, path: Path) -> None:
    """Put a trainer into the state that a checkpoint holds.

    Raises:
        CheckpointError: the checkpoint is missing, truncated, or of another adapter.
    """
    document = _read_document(path)
    if document.get("parameters") != _shapes(trainer):
        raise CheckpointError(
            f"{path} is of another adapter (model, rank or targets differ): resume with the settings of its own run."
        )
    try:
        tensors = load_file(path / "state.safetensors")
        state = _put_tensors(document["state"], tensors)
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): remove it and resume from an earlier one.") from error
    trainer.load_state(state)


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable checkpoint ({error}).") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this library's format {_FORMAT!r}.")
    return document


def _shapes(trainer: Trainer) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in trainer.parameters.items()}


def _take_tensors(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of nested containers into ``tensors``, leaving their names; keys keep their type."""
    if isinstance(value, Tensor):
        tensors[prefix] = value.detach().cpu().contiguous()
        return {_TENSOR: prefix}
    if isinstance(value, Mapping):
        return {"keys": list(value), "values": [_take_tensors(v, f"{prefix}/{k}", tensors) for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_take_tensors(item, f"{prefix}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict) and _TENSOR in value:
        return tensors[value[_TENSOR]]
    if isinstance(value, dict):
        return dict(zip(value["keys"], (_put_tensors(v, tensors) for v in value["values"]), strict=True))
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    return value
