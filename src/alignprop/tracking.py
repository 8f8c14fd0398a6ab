"""Where metrics go: the run folder's JSON lines, and the trackers that accelerate knows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignprop import distributed
from alignprop.runfolder import JsonLines, RunFolder
from alignprop.trainer import Callback, Metrics, Trainer


@dataclass
class MetricsFile(Callback):
    """Writes ``metrics.jsonl``, one line a step; a resumed run goes on where it stopped."""

    folder: RunFolder

    def start(self, trainer: Trainer) -> None:
        """Drop the lines of steps that will be done again."""
        if distributed.process().is_main_process:
            self.folder.metrics.rewind(trainer.step)

    def step(self, trainer: Trainer, metrics: Metrics) -> None:
        """Write the step's line."""
        if distributed.process().is_main_process:
            self.folder.metrics.append(metrics)


@dataclass
class Trackers(Callback):
    """Sends metrics and evaluations to TensorBoard, Weights & Biases or trackio, through accelerate.

    Attributes:
        names: as accelerate spells them: ``tensorboard``, ``wandb``, ``trackio``.
        project: the name under which the tracker keeps the run.
        folder: of the run.
        config: settings to keep with it.
    """

    names: Sequence[str]
    project: str
    folder: RunFolder
    config: Mapping[str, Any] = field(default_factory=dict)

    def start(self, trainer: Trainer) -> None:
        """Open the trackers."""
        from accelerate import Accelerator

        self._evaluations_sent = len(self.folder.evaluations.read()) if trainer.step else 0
        self._accelerator = Accelerator(log_with=list(self.names), project_dir=str(self.folder.path))
        self._accelerator.init_trackers(self.project, config=_flat(self.config))
        self._send_evaluations(self.folder.evaluations)  # the base model's, before a later step is sent

    def step(self, trainer: Trainer, metrics: Metrics) -> None:
        """Send the step's numbers, and those of an evaluation that came with it."""
        self._accelerator.log(_flat(metrics), step=trainer.step)
        self._send_evaluations(self.folder.evaluations)

    def end(self, trainer: Trainer) -> None:
        """Send what is left and close the trackers."""
        self._send_evaluations(self.folder.evaluations)
        for tracker in self._accelerator.trackers:  # not end_training, which ends the process group too
            tracker.finish()

    def _send_evaluations(self, evaluations: JsonLines) -> None:
        if distributed.process().is_main_process:
            lines = evaluations.read()
            for line in lines[self._evaluations_sent :]:
                if not line.get("base"):  # trackers do not go back to an earlier step
                    self._accelerator.log(_flat(line["sets"], "evaluation/"), step=line["step"])
            self._evaluations_sent = len(lines)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with slashes in the names; only what a tracker can draw or keep."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}/"))
        elif isinstance(value, (int, float, str, bool)):
            flat[prefix + name] = value
    return flat
