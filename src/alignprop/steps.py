"""What is done in the denoising steps of a sampling, and what is seen of them."""

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class EnoughError(Exception):
    """Raised by what looks at the denoising steps, to end a sampling whose picture nobody needs."""


@dataclass(frozen=True)
class Plan:
    """What is done in each denoising step of a sampling; steps are counted from 0.

    Attributes:
        live: the steps in which the denoiser carries gradient.
        held: steps that leave the latents as they are, without a call of the denoiser or a change of the scheduler.
        input_gradient: factor of the gradient that flows from a live denoiser back into the latents it received: with
            0 gradient flows around the later denoisers, through the scheduler alone, and not through them.
        stand_in: a denoiser output of an earlier sampling of the same shape, for held steps before the first call.
    """

    live: Collection[int]
    held: Collection[int] = ()
    input_gradient: float = 1.0
    stand_in: Any = None


@dataclass(frozen=True)
class Transition:
    """One call of ``scheduler.step``.

    Attributes:
        step: which denoising step it ends, from 0.
        num_steps: of the run.
        scheduler: a copy in the state before the call.
        arguments: of the call, by name: ``model_output``, ``timestep``, ``sample`` and what else was passed.
        latents: what it gave, the latents of the next denoising step, with their graph.
    """

    step: int
    num_steps: int
    scheduler: Any
    arguments: Mapping[str, Any]
    latents: Tensor

    @property
    def timestep(self) -> Tensor:
        """The scalar that the call was given, as it is or once for each picture."""
        return torch.as_tensor(self.arguments["timestep"]).flatten()[0]

    @property
    def is_last(self) -> bool:
        """Whether the latents are what the decoder will get."""
        return self.step == self.num_steps - 1


@dataclass(frozen=True)
class Call:
    """One call of a denoiser; held steps make none.

    Attributes:
        step: the denoising step that it is made in, from 0.
        is_live: whether it carries gradient.
        output: what the denoiser returned, with its graph.
    """

    step: int
    is_live: bool
    output: Any


OnCall = Callable[[Call], None]
"""Looks at each denoiser call."""

OnStep = Callable[[Transition], Tensor | None]
"""Looks at each denoising step; may return other latents to go on with, or raise :class:`EnoughError`."""


def scheduler_copy(scheduler: Any) -> Any:
    """A scheduler in the same state, with its own class's methods, whose steps leave the first one as it is.

    Not a deep copy: the history of multistep schedulers holds a graph, which cannot be copied and must not be.
    """
    twin = copy.copy(scheduler)
    for name, value in vars(twin).items():
        if isinstance(value, list):  # written in place by multistep schedulers
            setattr(twin, name, list(value))
    vars(twin).pop("step", None)  # the seam
    return twin


def named_arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, so that it can be made again with some of them changed."""
    signature = inspect.signature(function)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


def held_step(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A step that gives back the latents it was given, in the form of a real one, and moves on in the schedule."""
    twin = scheduler_copy(scheduler)
    sample = named_arguments(twin.step, args, kwargs)["sample"]
    with torch.no_grad():
        output = twin.step(*args, **kwargs)
    if hasattr(twin, "_step_index"):
        scheduler._step_index = twin._step_index
    return with_latents(output, sample)


def with_latents(output: Any, latents: Tensor) -> Any:
    """A scheduler's output with other latents, also where it has the clean estimate, which some pipelines decode."""

    def replaced(value: Any) -> Any:
        return latents if isinstance(value, Tensor) and value.shape == latents.shape else value

    if isinstance(output, tuple):
        return tuple(map(replaced, output))
    return type(output)(**{name: replaced(value) for name, value in output.items()})
