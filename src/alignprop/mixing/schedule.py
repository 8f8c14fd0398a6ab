"""Mixtures whose weights change with the denoising step: one adapter for the layout, say, another for the detail.

No single LoRA does that. It is a folder with the members' own files and `schedule.json`, which says when each has which
weight, and it is applied by diffusers' own means: all members are loaded, and the pipeline's callback after each
denoising step sets their weights for the next one.
"""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alignprop.adapter_files import load_adapter, reads_lora_files
from alignprop.mixing.files import StoredAdapter
from alignprop.runfolder import write_atomically
from alignprop.spec import PipelineSpec, spec_of

SCHEDULE_FILE = "schedule.json"
"""The file that makes a folder a mixture by denoising steps."""

_FORMAT: Final = "alignprop-step-weights-1"


@dataclass(frozen=True)
class StepWeights:
    """The members' weights in each denoising step: early ones, then late ones.

    Attributes:
        early: weights at the beginning of the chain, where the layout is made.
        late: weights at its end, where the detail is made.
        switch_at: share of the chain, in (0, 1), behind which the late weights hold.
        ramp: share of the chain, around ``switch_at``, over which the weights go from one to the other in a line; 0 for
            a switch.
    """

    early: tuple[float, ...]
    late: tuple[float, ...]
    switch_at: float
    ramp: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if not self.early or len(self.early) != len(self.late):
            raise ValueError(f"There are {len(self.early)} early weights and {len(self.late)} late ones: give as many.")
        if not 0 < self.switch_at < 1:
            raise ValueError(f"switch_at={self.switch_at} needs to be a share of the chain, in (0, 1).")
        room = 2 * min(self.switch_at, 1 - self.switch_at)
        if not 0 <= self.ramp <= room + 1e-12:
            raise ValueError(f"ramp={self.ramp} needs 0 <= ramp <= {room:g}, to fit around switch_at={self.switch_at}.")

    def at(self, step: int, num_steps: int) -> tuple[float, ...]:
        """The weights in a denoising step.

        Before step k of n, counted from 0, the share k / n of the chain is done: the first ``ceil(n * switch_at)``
        steps have the early weights.

        Args:
            step: from 0.
            num_steps: as the pipeline counts them, its scheduler's steps.
        """
        done = step / num_steps
        if self.ramp:
            late = min(1.0, max(0.0, (done - self.switch_at) / self.ramp + 0.5))
        else:
            late = float(done >= self.switch_at)
        return tuple(a + late * (b - a) for a, b in zip(self.early, self.late, strict=True))


_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _MemberEntry(_Strict):
    """One member: the name of its folder inside, never a path, and what a person calls it."""

    folder: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    name: str
    early: _Finite
    late: _Finite


class _Document(_Strict):
    """The content of `schedule.json`."""

    format: Literal["alignprop-step-weights-1"]
    switch_at: _Finite
    ramp: _Finite
    members: Annotated[list[_MemberEntry], Field(min_length=1)]

    @property
    def weights(self) -> StepWeights:
        early, late = (tuple(getattr(member, key) for member in self.members) for key in ("early", "late"))
        return StepWeights(early, late, self.switch_at, self.ramp)


def holds_schedule(folder: Path) -> bool:
    """Whether a folder is a mixture by denoising steps."""
    return (Path(folder) / SCHEDULE_FILE).is_file()


def save_schedule(weights: StepWeights, adapters: Mapping[str, StoredAdapter], folder: Path) -> Path:
    """Write a mixture by denoising steps: copies of the members' files, and when each has which weight.

    Args:
        weights: one for each member, in order.
        adapters: the members by name.
        folder: made if absent.

    Returns:
        The schedule's file.

    Raises:
        ValueError: a member adapts a text encoder, or there are not as many weights as members.
    """
    require_fit(weights, adapters)
    folder, entries = Path(folder), list[_MemberEntry]()
    for (name, source), early, late in zip(adapters.items(), weights.early, weights.late, strict=True):
        place = f"member-{len(entries)}"
        _copy(source, folder / place)
        entries.append(_MemberEntry(folder=place, name=name, early=early, late=late))
    document = _Document(format=_FORMAT, switch_at=weights.switch_at, ramp=weights.ramp, members=entries)
    write_atomically(folder / SCHEDULE_FILE, json.dumps(document.model_dump(), indent=1) + "\n")
    return folder / SCHEDULE_FILE


def require_fit(weights: StepWeights, adapters: Mapping[str, StoredAdapter]) -> None:
    """Check that adapters can be mixed by denoising step.

    Raises:
        ValueError: a member adapts a text encoder, or there are not as many weights as members.
    """
    if len(weights.early) != len(adapters):
        raise ValueError(f"There are {len(weights.early)} weights for {len(adapters)} adapters: give one for each.")
    for name, adapter in adapters.items():
        if any(layer.startswith("text_encoder") for layer in adapter.updates):
            raise ValueError(
                f"{name} adapts a text encoder, which reads the prompt once, before the first denoising step: its "
                "weight cannot change with the step. Leave --late-weights out."
            )


def _copy(source: StoredAdapter, target: Path) -> None:
    for file in source.files:
        copied = target / file.relative_to(source.folder)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copied)


def read_schedule(folder: Path) -> tuple[StepWeights, dict[str, Path]]:
    """The weights of a mixture by denoising steps, and its members' folders by name.

    Raises:
        ValueError: the file is not one of ours, whole and sound.
    """
    file = Path(folder) / SCHEDULE_FILE
    try:
        document = _Document.model_validate_json(file.read_text(encoding="utf-8"))
        weights = document.weights
    except (ValidationError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be used: {_first_problem(error)}") from error
    except ValueError as error:
        raise ValueError(f"{file} cannot be used: {error}") from error
    names = {key: {getattr(member, key) for member in document.members} for key in ("name", "folder")}
    if any(len(found) < len(document.members) for found in names.values()):
        raise ValueError(f"{file} cannot be used: two members share a name or a folder.")
    return weights, {member.name: file.parent / member.folder for member in document.members}


def _first_problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    detail = error.errors()[0]
    return f"{'.'.join(map(str, detail['loc'])) or 'the file'}: {detail['msg']}"


@dataclass(frozen=True)
class StepSwitch:
    """The callback after a denoising step, which sets the members' weights for the next one.

    After the last step it sets those of the first one again, for the next call. A call that was interrupted leaves the
    weights of its step; :meth:`start` mends that.

    Attributes:
        weights: by denoising step.
        names: of the adapters in the pipeline.
        spec: the pipeline's parts.
    """

    weights: StepWeights
    names: tuple[str, ...]
    spec: PipelineSpec

    def __call__(self, pipeline: Any, step: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """As diffusers calls it."""
        num_steps = pipeline.num_timesteps
        weigh(pipeline, self.names, self.weights.at((step + 1) % num_steps, num_steps), self.spec)
        return arguments

    def start(self, pipeline: Any) -> None:
        """Set the weights of the first step."""
        weigh(pipeline, self.names, self.weights.early, self.spec)


def weigh(pipeline: Any, names: Sequence[str], weights: Sequence[float], spec: PipelineSpec) -> None:
    """Give adapters that are in a pipeline their weights, and switch all others off; 0 is the base model."""
    if reads_lora_files(pipeline, spec):
        pipeline.set_adapters(list(names), list(weights))
        return
    from diffusers.utils import set_weights_and_activate_adapters

    for denoiser in spec.denoisers_of(pipeline):
        set_weights_and_activate_adapters(denoiser, list(names), list(weights))


def load_mixture(pipeline: Any, folder: Path, *, spec: PipelineSpec | None = None) -> dict[str, Any]:
    """Load a mixture, or any adapter, into a pipeline without one.

    Args:
        pipeline: of the kind that the members were trained in.
        folder: of the mixture.
        spec: the pipeline's parts, where they cannot be known.

    Returns:
        Arguments for the pipeline's call: the callback of a mixture by denoising steps, and none for others.

    Raises:
        ValueError: the folder holds no adapter for this pipeline, or its call takes no callback.
    """
    spec = spec or spec_of(pipeline)
    if not holds_schedule(folder):
        load_adapter(pipeline, folder, spec=spec)
        return {}
    weights, adapters = read_schedule(folder)
    if "callback_on_step_end" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(
            f"{type(pipeline).__name__} takes no callback_on_step_end, which {folder} needs to change the weights by "
            "denoising step: mix with --weights alone."
        )
    switch = StepSwitch(weights, load_members(pipeline, list(adapters.values()), spec), spec)
    switch.start(pipeline)
    return {"callback_on_step_end": switch}


def load_members(pipeline: Any, folders: Sequence[Path], spec: PipelineSpec) -> tuple[str, ...]:
    """Load adapters side by side into a pipeline, under names that :func:`weigh` takes."""
    names = tuple(f"member_{place}" for place in range(len(folders)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # the members before
        for name, folder in zip(names, folders, strict=True):
            load_adapter(pipeline, folder, spec=spec, adapter_name=name)
    return names
