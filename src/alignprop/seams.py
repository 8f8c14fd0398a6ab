"""Let gradient through an unmodified diffusers pipeline, at three seams.

The seams are instance attributes, put in place for one sampling and taken away afterwards whatever happens:

1. ``denoiser.forward``: gradient on in the live denoising steps and off in the others, activation checkpointing;
   before it ``text_encoder.forward``, if that is trained as well.
2. ``scheduler.step``: counts the denoising steps, and shows each to whoever wants to look or to change the latents.
3. ``decoder.decode``: keeps the pixels with their graph and hands the pipeline a detached copy.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from alignprop.spec import PipelineSpec
from alignprop.steps import (
    Call,
    OnCall,
    OnStep,
    Plan,
    Transition,
    held_step,
    named_arguments,
    scheduler_copy,
    with_latents,
)

Checkpointing = Literal["none", "step", "block", "nested"]
CHECKPOINTING_MODES: tuple[Checkpointing, ...] = get_args(Checkpointing)

_ABSENT = object()
_ORIGINAL = "_alignprop_original"
"""Attribute of what stands in a seam: what stood there before, on which a nested sampling builds."""
_INEXACT_SWITCHES = ("ChromaTransformer2DModel",)
"""Models that leave out the attention mask when they checkpoint their blocks, which changes what they compute."""
_LATENT_ARGUMENTS = ("sample", "hidden_states", "x", "latents")


class NoBlocksError(ValueError):
    """The model cannot checkpoint its blocks."""


@dataclass
class Trace:
    """What the seams saw during one sampling.

    Attributes:
        num_steps: scheduler steps of the run, or 0 until the denoiser is called for the first time.
        plan: what is done in each of them, decided once ``num_steps`` is known.
        checkpointing: the mode in force, decided once ``live_steps`` is known.
        step: scheduler steps done so far.
        calls: denoiser calls so far.
        live_calls: those of them that carried gradient.
        output: what the denoiser returned last, detached.
        latents: what the decoder received in each call, detached.
        decoded: what the decoder returned in each call, with its graph.
    """

    num_steps: int = 0
    plan: Plan = field(default_factory=lambda: Plan(live=()))
    checkpointing: Checkpointing = "none"
    step: int = 0
    calls: int = 0
    live_calls: int = 0
    output: Any = None
    latents: list[Tensor] = field(default_factory=list)
    decoded: list[Tensor] = field(default_factory=list)

    @property
    def is_live(self) -> bool:
        """Whether the current denoising step carries gradient."""
        return self.step in self.plan.live

    @property
    def is_held(self) -> bool:
        """Whether the current denoising step changes nothing."""
        return self.step in self.plan.held

    @property
    def is_recomputed(self) -> bool:
        """Whether the current step is dropped and recomputed in the backward pass.

        Never the last live one: its activations are the first that the backward pass needs, so dropping them costs a
        forward pass and saves nothing where the denoiser outweighs the decoder.
        """
        return self.checkpointing in ("step", "nested") and self.step < max(self.plan.live)

    @property
    def is_blockwise(self) -> bool:
        """Whether the model's own blocks are checkpointed."""
        return self.checkpointing in ("block", "nested")


@contextmanager
def swapped(target: object, name: str, value: object) -> Iterator[None]:
    """Set an instance attribute and put back what was there, or its absence, on leaving."""
    attributes = vars(target)  # not setattr: a pipeline writes what it is given into its config
    before = attributes.get(name, _ABSENT)
    attributes[name] = value
    try:
        yield
    finally:
        if before is _ABSENT:
            del attributes[name]
        else:
            attributes[name] = before


@contextmanager
def gradient_seams(
    pipeline: Any,
    spec: PipelineSpec,
    plan: Callable[[int], Plan],
    checkpointing: Callable[[int], Checkpointing],
    on_step: OnStep | None = None,
    on_call: OnCall | None = None,
) -> Iterator[Trace]:
    """Patch ``pipeline`` so that its next call carries gradient in some of its denoising steps.

    Args:
        pipeline: a diffusers pipeline.
        spec: its parts.
        plan: from the number of denoising steps to what is done in each of them.
        checkpointing: from the number of live steps to the checkpointing mode.
        on_step: is shown each denoising step, and may change where it leads.
        on_call: is shown each denoiser call.

    Yields:
        The trace that the call fills in.
    """
    trace = Trace()
    # A copy for each sampling: multistep schedulers keep the last model outputs, and with them their graph.
    # Within another sampling it is one of the user's scheduler, not of the copy in use.
    original = vars(pipeline.scheduler).get(_ORIGINAL, pipeline.scheduler)
    scheduler = copy.deepcopy(original)
    setattr(scheduler, _ORIGINAL, original)

    def begin() -> None:
        trace.num_steps = getattr(pipeline, "_num_timesteps", None) or len(scheduler.timesteps)
        trace.plan = plan(trace.num_steps)
        trace.checkpointing = checkpointing(len(trace.plan.live))
        trace.output = trace.plan.stand_in

    with ExitStack() as stack:
        stack.enter_context(swapped(pipeline, "_num_timesteps", None))  # forget the previous call's
        stack.enter_context(swapped(pipeline, "scheduler", scheduler))
        stack.enter_context(_seam(scheduler, "step", _counted_step(scheduler, trace, spec.decoder is None, on_step)))
        for denoiser in spec.denoisers_of(pipeline):
            stack.enter_context(_seam(denoiser, "forward", _gated_forward(denoiser, trace, begin, on_call)))
        for encoder in spec.text_encoders_of(pipeline).values():
            if any(parameter.requires_grad for parameter in encoder.parameters()):
                stack.enter_context(_seam(encoder, "forward", _live_forward(encoder)))
        if (decoder := spec.decoder_of(pipeline)) is not None:
            stack.enter_context(_seam(decoder, "decode", _kept_decode(decoder, trace)))
            stack.enter_context(encoding_in_own_dtype(decoder))
        yield trace


@contextmanager
def decoding_in_own_dtype(decoder: nn.Module | None) -> Iterator[None]:
    """Let a decoder in fp32 follow a denoiser in fp16, which pipelines do not expect, nor of its encoder."""
    if decoder is None:
        yield
        return
    decode: Callable[..., Any] = _unpatched(decoder.decode)

    @functools.wraps(decode)
    def cast(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        return decode(latents.to(_dtype_of(decoder)), *args, **kwargs)

    with _seam(decoder, "decode", cast), encoding_in_own_dtype(decoder):
        yield


@contextmanager
def encoding_in_own_dtype(decoder: nn.Module) -> Iterator[None]:
    """Let the encoder of a pipeline that starts from a picture take it in the denoiser's dtype and answer in it."""
    encode = _unpatched(getattr(decoder, "encode", None))
    if encode is None:
        yield
        return

    @functools.wraps(encode)
    def cast(images: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = encode(images.to(_dtype_of(decoder)), *args, **kwargs)
        posterior = output[0]
        if images.dtype == _dtype_of(decoder) or not hasattr(posterior, "parameters"):
            return output
        return _with_first(output, type(posterior)(posterior.parameters.to(images.dtype)))

    with _seam(decoder, "encode", cast):
        yield


@contextmanager
def _seam(target: object, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Swap a method, remembering the one that was there."""
    setattr(replacement, _ORIGINAL, _unpatched(getattr(target, name)))
    with swapped(target, name, replacement):
        yield


def _unpatched(method: Any) -> Callable[..., Any]:
    unpatched: Callable[..., Any] = getattr(method, _ORIGINAL, method)
    return unpatched


def _dtype_of(decoder: nn.Module) -> torch.dtype:
    return next(decoder.parameters()).dtype


def _counted_step(scheduler: Any, trace: Trace, gives_pixels: bool, on_step: OnStep | None) -> Callable[..., Any]:
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at the signature to decide whether to pass eta and generator
    def counted(*args: Any, **kwargs: Any) -> Any:
        before = scheduler_copy(scheduler) if on_step is not None else None
        output = held_step(scheduler, args, kwargs) if trace.is_held else step(*args, **kwargs)
        if on_step is not None:
            arguments = named_arguments(step, args, kwargs)
            other = on_step(Transition(trace.step, trace.num_steps, before, arguments, output[0]))
            output = output if other is None else with_latents(output, other)
        trace.step += 1
        if gives_pixels and trace.step == trace.num_steps:
            return _kept(output, output[0].detach(), trace)
        return output

    return counted


def _live_forward(encoder: nn.Module) -> Callable[..., Any]:
    """Gradient on from a text encoder that is trained to the denoiser, through what the pipeline does in between."""
    forward = _unpatched(encoder.forward)

    @functools.wraps(forward)
    def live(*args: Any, **kwargs: Any) -> Any:
        torch.set_grad_enabled(True)
        return forward(*args, **kwargs)

    return live


def _gated_forward(
    denoiser: nn.Module, trace: Trace, begin: Callable[[], None], on_call: OnCall | None
) -> Callable[..., Any]:
    forward = _unpatched(denoiser.forward)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any], blockwise: bool) -> Any:
        # Entered again when the step is recomputed in the backward pass, where the seams are gone. It holds nothing
        # of the trace, whose pixels hold the graph, which holds this.
        with block_checkpointing(denoiser, enabled=blockwise):
            return forward(*args, **kwargs)

    @functools.wraps(forward)
    def gated(*args: Any, **kwargs: Any) -> Any:
        if not trace.num_steps:
            begin()
        if trace.is_held:
            assert trace.output is not None, "a plan that begins with held steps needs a stand_in"
            return _mapped(torch.clone, trace.output)
        trace.calls += 1
        output = live(args, kwargs) if trace.is_live else dead(args, kwargs)
        trace.output = _mapped(torch.detach, output)
        if on_call is not None:
            on_call(Call(trace.step, trace.is_live, output))
        return output

    def dead(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return forward(*args, **kwargs)

    def live(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trace.live_calls += 1
        torch.set_grad_enabled(True)  # the pipeline's own no_grad, or rollout, puts it back on leaving
        args, kwargs = _with_own_latents(args, kwargs, trace.plan.input_gradient)
        if trace.is_recomputed:
            # All of it positional: only there does checkpoint look for the devices whose generators it must replay.
            return checkpoint(run, args, kwargs, trace.is_blockwise, use_reentrant=False)
        return run(args, kwargs, trace.is_blockwise)

    return gated


def _mapped(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """A denoiser's output (tensors in tuples, lists or a diffusers BaseOutput) with its tensors mapped."""
    if isinstance(output, Mapping):
        return type(output)(**{name: _mapped(function, value) for name, value in output.items()})
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, output)


def _with_own_latents(
    args: tuple[Any, ...], kwargs: dict[str, Any], gradient: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Clone the latents, which some pipelines write in place after the denoiser has kept them for its backward.

    Args:
        args: of the denoiser's call.
        kwargs: of the denoiser's call.
        gradient: factor of the gradient that flows back into the latents from this call.
    """

    def own(latents: Tensor) -> Tensor:
        if gradient == 1:
            return latents.clone()
        kept = latents.detach()  # the same numbers, to the last bit, whatever part of the gradient is kept
        return kept + gradient * (latents - kept) if gradient else kept.clone()

    def clone(value: Any) -> Any:
        return _mapped(own, value)

    if args:
        return (clone(args[0]), *args[1:]), kwargs
    return args, {name: clone(value) if name in _LATENT_ARGUMENTS else value for name, value in kwargs.items()}


def _kept_decode(decoder: nn.Module, trace: Trace) -> Callable[..., Any]:
    decode = _unpatched(decoder.decode)

    @functools.wraps(decode)
    def kept(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        with block_checkpointing(decoder, enabled=trace.is_blockwise and bool(_switches(decoder))):
            # The decoder may be kept in fp32 beside an fp16 denoiser.
            output = decode(latents.to(_dtype_of(decoder)), *args, **kwargs)
        return _kept(output, latents.detach(), trace)

    return kept


def _kept(output: Any, latents: Tensor, trace: Trace) -> Any:
    """Keep the pixels, the first entry of the output, and hand on a detached copy.

    Detached, since pipelines turn pictures into numpy or PIL, which a graph forbids; a copy, since some write into it
    (a safety checker blanks what it flags).
    """
    trace.latents.append(latents)
    trace.decoded.append(output[0])
    return _with_first(output, output[0].detach().clone())


def _with_first(output: Any, value: Any) -> Any:
    """A decoder's output (a tuple or a diffusers BaseOutput) with its first entry replaced."""
    if isinstance(output, tuple):
        return (value, *output[1:])
    first = next(iter(output))
    return type(output)(**{**output, first: value})


@contextmanager
def block_checkpointing(model: nn.Module, *, enabled: bool = True) -> Iterator[None]:
    """Checkpoint the blocks of a diffusers model inside the context, and leave its own settings untouched after."""
    if not enabled:
        yield
        return
    switches = _switches(model)
    if not switches:
        raise NoBlocksError(
            f"checkpointing='block' needs a model with gradient checkpointing, and {type(model).__name__} has none: "
            "use checkpointing='step'."
        )
    with ExitStack() as stack:
        for module in switches:
            if type(module).__name__ in _INEXACT_SWITCHES:
                for block in _listed_blocks(module):
                    forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
                    stack.enter_context(swapped(block, "forward", forward))
                continue
            stack.enter_context(swapped(module, "gradient_checkpointing", True))
            stack.enter_context(swapped(module, "_gradient_checkpointing_func", _checkpointed_call))
        yield


def _switches(model: nn.Module) -> list[nn.Module]:
    """The modules that can checkpoint their blocks. Some decoders have none."""
    return [module for module in model.modules() if "gradient_checkpointing" in vars(module)]


def _listed_blocks(module: nn.Module) -> list[nn.Module]:
    """The members of its lists of modules."""
    return [block for child in module.children() if isinstance(child, nn.ModuleList) for block in child]


def _checkpointed_call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        # Entered again when the block is recomputed, where the switches of the blocks within it are back as they were.
        with block_checkpointing(block, enabled=bool(_switches(block))):
            return block(*args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, **kwargs)
