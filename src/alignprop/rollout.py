"""One differentiable sampling: the pipeline's own call, run through the seams."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from alignprop import pixels
from alignprop.seams import Checkpointing, Trace, decoding_in_own_dtype, gradient_seams, swapped
from alignprop.spec import PipelineSpec, spec_of
from alignprop.steps import EnoughError, OnCall, OnStep, Plan, Transition

LiveSteps = int | Callable[[int], int] | None
Planner = Callable[[int], Plan]
"""From the number of denoising steps to what is done in each of them."""


@dataclass(frozen=True)
class Rollout:
    """What one sampling gave.

    Attributes:
        pixels: with gradient, in float32 or wider: pictures (B, 3, H, W) or frames (B, F, 3, H, W) in [0, 1], or
            waveforms (B, C, N). Pixels are clamped straight through: values outside the decoder's range are cut off,
            their gradient is passed on.
        latents: what the decoder received, detached.
        num_steps: denoising steps run, counted in scheduler steps.
        live_steps: how many of them carry gradient: the last ones, unless there was a plan.
        calls: denoiser calls.
        live_calls: denoiser calls that carried gradient.
        checkpointing: the mode that was used.
        stand_in: what the denoiser returned last, detached: see :attr:`alignprop.steps.Plan.stand_in`.
        output: what the pipeline itself returned.
        penalty: (B,), what is taken off the reward of each picture, with its graph; None for nothing.
    """

    pixels: Tensor
    latents: Tensor
    num_steps: int
    live_steps: int
    calls: int
    live_calls: int
    checkpointing: Checkpointing
    stand_in: Any
    output: Any
    penalty: Tensor | None = None


def rollout(
    pipeline: Any,
    /,
    *args: Any,
    live_steps: LiveSteps = None,
    plan: Planner | None = None,
    on_step: OnStep | None = None,
    on_call: OnCall | None = None,
    checkpointing: Checkpointing | Callable[[int], Checkpointing] = "none",
    spec: PipelineSpec | None = None,
    **kwargs: Any,
) -> Rollout:
    """Sample with an unmodified diffusers pipeline and keep the graph of its last denoising steps.

    Args:
        pipeline: any diffusers pipeline with a denoiser, a scheduler and a decoder.
        *args: positional arguments of the pipeline's own call.
        live_steps: how many of the last denoising steps carry gradient: a number, a function of the number of steps
            (for a draw), or None for all.
        plan: what is done in each denoising step, for methods that need more than a window; takes the place of
            ``live_steps``.
        on_step: is shown each denoising step, and may change where it leads.
        on_call: is shown each denoiser call.
        checkpointing: activation checkpointing of the live steps, or a function from their number to a mode.
        spec: the pipeline's parts, where :func:`alignprop.spec.spec_of` cannot know them.
        **kwargs: keyword arguments of the pipeline's own call.

    Returns:
        The pixels with gradient and what the seams counted.

    Raises:
        ValueError: ``live_steps`` does not fit the number of denoising steps, or the call decoded nothing.
    """
    spec = spec or spec_of(pipeline)
    with (
        torch.enable_grad(),  # what the seams switch on must not outlive the call
        _quiet(pipeline),
        gradient_seams(pipeline, spec, plan or _window(live_steps), _mode(checkpointing), on_step, on_call) as trace,
    ):
        output = pipeline(*args, **kwargs)
        if not trace.decoded:
            raise ValueError(
                f"{type(pipeline).__name__} decoded no picture: leave output_type at 'pt', 'np' or 'pil', not 'latent'."
            )
        images = _for_rewards(_whole(trace.decoded, output), spec, output, _first_sample(pipeline, kwargs))
        latents = _whole(trace.latents, output)
        trace.decoded.clear()  # the graph belongs to the caller alone
    return Rollout(
        pixels=images,
        latents=latents,
        num_steps=trace.num_steps,
        live_steps=len(trace.plan.live),
        calls=trace.calls,
        live_calls=trace.live_calls,
        checkpointing=trace.checkpointing,
        stand_in=trace.output,
        output=output,
    )


def _quiet(pipeline: Any) -> AbstractContextManager[None]:
    """Without the progress bar of each call."""
    config = {**getattr(pipeline, "_progress_bar_config", {}), "disable": True}
    return swapped(pipeline, "_progress_bar_config", config)


def _whole(calls: list[Tensor], output: Any) -> Tensor:
    """What went into the decoder or came out of it for this output: the last call, unless it took a part of a video.

    Some pipelines decode videos as pictures, a few frames a call (AnimateDiff).
    """
    if calls[-1].ndim != 4 or _gives_pictures(output):
        return calls[-1]
    num_videos, num_frames = len(output[0]), len(output[0][0])
    frames = torch.cat(calls)[-num_videos * num_frames :]
    return frames.reshape(num_videos, num_frames, *frames.shape[1:]).transpose(1, 2)


def _first_sample(pipeline: Any, arguments: Mapping[str, Any]) -> int:
    """Where the sound that is returned begins in the one that is decoded."""
    start = arguments.get("audio_start_in_s")
    return int(start * pipeline.vae.config.sampling_rate) if start else 0


def _for_rewards(decoded: Tensor, spec: PipelineSpec, output: Any, first_sample: int) -> Tensor:
    """What the decoder gave, as rewards and evaluation see it, whatever the decoder's dtype."""
    decoded = decoded.to(torch.promote_types(decoded.dtype, torch.float32))
    if decoded.ndim == 3:  # a waveform, of which the pipeline returns what was asked for
        return decoded[..., first_sample : first_sample + output[0].shape[-1]]
    if decoded.ndim == 5:
        decoded = decoded.transpose(1, 2)
        if _gives_pictures(output):
            decoded = decoded[:, 0]
    return pixels.clamp_straight_through(pixels.to_unit(decoded, spec.value_range))


def _gives_pictures(output: Any) -> bool:
    """Whether a pipeline returns pictures though its decoder makes videos, of one frame then."""
    first = output[0][0]
    return not isinstance(first, list) and getattr(first, "ndim", 3) == 3  # a PIL picture has no such attribute


def walk(
    pipeline: Any,
    /,
    *args: Any,
    plan: Planner,
    on_step: OnStep,
    on_call: OnCall | None = None,
    checkpointing: Checkpointing = "none",
    spec: PipelineSpec | None = None,
    **kwargs: Any,
) -> Trace:
    """Run the denoising steps of a pipeline for the sake of ``on_step``, and decode nothing.

    Arguments and errors are those of :func:`rollout`; whatever graph there is, ``on_step`` has to use. As it does so
    step by step, only the checkpointing of blocks saves anything: that of steps is left out.
    """
    blockwise: Checkpointing = "block" if checkpointing in ("block", "nested") else "none"
    spec = spec or spec_of(pipeline)

    def look(transition: Transition) -> Tensor | None:
        other = on_step(transition)
        if transition.is_last:
            raise EnoughError
        return other

    with (
        torch.enable_grad(),
        _quiet(pipeline),
        gradient_seams(pipeline, spec, plan, _mode(blockwise), look, on_call) as trace,
        suppress(EnoughError),
    ):
        pipeline(*args, **kwargs)
    return trace


def _window(live_steps: LiveSteps) -> Planner:
    """The last steps are live."""

    def plan(num_steps: int) -> Plan:
        wanted = live_steps(num_steps) if callable(live_steps) else live_steps
        if wanted is None:
            return Plan(live=range(num_steps))
        if not 1 <= wanted <= num_steps:
            raise ValueError(
                f"live_steps={wanted} needs 1 <= live_steps <= {num_steps}, the number of denoising steps."
            )
        return Plan(live=range(num_steps - wanted, num_steps))

    return plan


def _mode(checkpointing: Checkpointing | Callable[[int], Checkpointing]) -> Callable[[int], Checkpointing]:
    return checkpointing if callable(checkpointing) else lambda live_steps: checkpointing


class Regulariser(Protocol):
    """Takes part in the rollouts of a sampler; see :mod:`alignprop.regularisation`."""

    def rollout(self, sampler: "Sampler", prompts: Sequence[str], seeds: Sequence[int], **settings: Any) -> Rollout:
        """What :meth:`Sampler.rollout` gives for the same arguments, with a penalty."""
        ...


@dataclass(frozen=True)
class Sampler:
    """A pipeline bound to the arguments of its call: from prompts and seeds to pictures.

    Attributes:
        pipeline: the user's diffusers pipeline.
        call: keyword arguments of every call (``num_inference_steps``, ``guidance_scale``, ...).
        spec: the pipeline's parts, where they cannot be known.
        regulariser: takes part in the rollouts; None for none.
    """

    pipeline: Any
    call: Mapping[str, Any] = field(default_factory=dict)
    spec: PipelineSpec | None = None
    regulariser: Regulariser | None = None

    def rollout(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        live_steps: LiveSteps = None,
        checkpointing: Checkpointing | Callable[[int], Checkpointing] = "none",
        **changes: Any,
    ) -> Rollout:
        """Sample one picture for each prompt and seed, with gradient; ``changes`` are arguments of :func:`rollout`."""
        settings = {"live_steps": live_steps, "checkpointing": checkpointing, **changes}
        if self.regulariser is not None:
            return self.regulariser.rollout(replace(self, regulariser=None), prompts, seeds, **settings)
        return rollout(self.pipeline, spec=self.spec, **{**self._arguments(prompts, seeds), **settings})

    def walk(
        self, prompts: Sequence[str], seeds: Sequence[int], plan: Planner, on_step: OnStep, **changes: Any
    ) -> Trace:
        """Go through the denoising steps of these prompts and seeds without decoding; see :func:`walk`."""
        arguments = {**self._arguments(prompts, seeds), **changes}
        return walk(self.pipeline, plan=plan, on_step=on_step, spec=self.spec, **arguments)

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: Sequence[int], **changes: Any) -> Tensor:
        """Sample with the plain pipeline, without gradient; shaped as :attr:`Rollout.pixels`, in float32."""
        decoder = self._spec.decoder_of(self.pipeline)
        with _quiet(self.pipeline), decoding_in_own_dtype(decoder):
            output = self.pipeline(**{**self._arguments(prompts, seeds), **changes})
        return pixels.from_output(output[0])

    @property
    def half_precision(self) -> bool:
        """Whether a denoiser computes in less than fp32, in which the LoRA in it is kept all the same."""
        denoisers = self._spec.denoisers_of(self.pipeline)
        return any(parameter.dtype.itemsize < 4 for denoiser in denoisers for parameter in denoiser.parameters())

    @property
    def _spec(self) -> PipelineSpec:
        return self.spec or spec_of(self.pipeline)

    def _arguments(self, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        negative = self.call.get("negative_prompt")
        # One generator a picture: the same seed gives the same picture whatever else is in the batch.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        conditions = self._spec.conditions(self.pipeline, prompts)
        arguments = {**self.call, **conditions, "generator": generators, "output_type": self._spec.output_type}
        if negative is not None:  # a list of its own: Z-Image writes into the one it is given
            arguments["negative_prompt"] = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        return arguments
