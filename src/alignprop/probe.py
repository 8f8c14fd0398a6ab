"""Prove, before step 1, that the pipeline and the reward can be trained with: the failures to fear are silent."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignprop.adapters import Trainable
from alignprop.rewards import WeightedSum, check_scores
from alignprop.rollout import Rollout, Sampler
from alignprop.seams import CHECKPOINTING_MODES, Checkpointing, swapped
from alignprop.surgery import left_over

NUM_STEPS = 2
"""Denoising steps of the probe's samplings."""

_CANCELLED = 1e-5
"""What rounding leaves of the length of gradients that cancel."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        name: what.
        passed: whether it is as it must be.
        detail: what was measured or, if it failed, one sentence with the remedy.
    """

    name: str
    passed: bool
    detail: str


class ProbeError(ValueError):
    """The pipeline or the reward cannot be trained with."""


def probe(
    sampler: Sampler,
    adapter: Trainable,
    reward: WeightedSum,
    prompts: Sequence[str],
    *,
    modes: Sequence[Checkpointing] = CHECKPOINTING_MODES,
    differentiable: bool = True,
    combination: str = "sum",
) -> list[Finding]:
    """Run two denoising steps of the real thing and check what training relies on.

    The adapter is given small random weights for the while: a fresh one has no effect, which hides what is broken.

    Args:
        sampler: the pipeline and the arguments of its call.
        adapter: the adapter that will be trained.
        reward: the reward that it will be trained on.
        prompts: prompts to try, one picture each.
        modes: checkpointing modes to compare with the first of them.
        differentiable: whether the reward's gradient will be used.
        combination: how the gradients of several rewards become one; see :mod:`alignprop.surgery`.
    """
    seeds = list(range(len(prompts)))
    with adapter.weights(_perturbed(adapter), as_reloaded=False):
        checks = [
            ("scheduler", lambda: _scheduler(sampler.pipeline)),
            ("same picture", lambda: _same_picture(sampler, prompts, seeds)),
            ("live gradient", lambda: _live_gradient(sampler, adapter, prompts, seeds, modes[0])),
            ("reward", lambda: _reward(sampler, reward, prompts, seeds, combination if differentiable else None)),
            ("checkpointing", lambda: _checkpointing(sampler, adapter, prompts, seeds, modes)),
        ]
        return [_finding(name, check) for name, check in checks]


def require(findings: Sequence[Finding]) -> None:
    """Refuse to train unless everything passed.

    Raises:
        ProbeError: with one sentence for each failure.
    """
    failures = [f"{finding.name}: {finding.detail}" for finding in findings if not finding.passed]
    if failures:
        raise ProbeError("\n".join(failures))


_OVERWRITTEN = (
    "the pipeline overwrites in place what the gradient is computed from: look for an operation that ends in _, "
    "or a copy_, in the denoiser, the scheduler or the reward, and make a new tensor instead."
)


def _finding(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except ValueError as error:
        return Finding(name, False, str(error))
    except (RuntimeError, TypeError, IndexError, KeyError, AttributeError) as error:  # the user's reward or pipeline
        if "modified by an inplace operation" in str(error):
            return Finding(name, False, _OVERWRITTEN)
        first_line = (str(error).strip().splitlines() or [""])[0]
        return Finding(name, False, f"it fails with {type(error).__name__}: {first_line}")


def _scheduler(pipeline: Any) -> str:
    config = pipeline.scheduler.config
    name = type(pipeline.scheduler).__name__
    for setting in ("clip_sample", "clip_denoised", "thresholding"):
        if config.get(setting):
            raise ValueError(
                f"{name} has {setting}=True, which zeroes the gradient where it clips: "
                f"use {name}.from_config(pipeline.scheduler.config, {setting}=False)."
            )
    return f"{name} clips nothing"


def _same_picture(sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int]) -> str:
    plain = sampler.sample(prompts, seeds, num_inference_steps=NUM_STEPS)
    pixels = sampler.rollout(prompts, seeds, num_inference_steps=NUM_STEPS).pixels.detach().float()
    if pixels.shape != plain.shape:
        raise ValueError(f"the rollout gives {tuple(pixels.shape)}, the plain pipeline {tuple(plain.shape)}.")
    error = (pixels - plain).abs().max().item()
    if not error <= _tolerance(sampler, 1e-5, 2e-2):
        raise ValueError(
            f"the rollout's picture differs from the plain pipeline's by up to {error:.1e}: "
            "the pipeline keeps state between calls, or draws noise that no generator controls."
        )
    return f"the rollout's picture is the plain pipeline's (largest difference {error:.0e})"


def _live_gradient(
    sampler: Sampler, adapter: Trainable, prompts: Sequence[str], seeds: Sequence[int], mode: Checkpointing
) -> str:
    calls: list[Tensor] = []
    with ExitStack() as stack:
        for denoiser in adapter.spec.denoisers_of(sampler.pipeline):
            stack.enter_context(swapped(denoiser, "forward", _spied(denoiser, calls)))
        # The calls of a step that is recomputed are not in the graph that the backward pass starts from.
        mode = "block" if mode in ("block", "nested") else "none"
        rollout = sampler.rollout(prompts, seeds, checkpointing=mode, num_inference_steps=NUM_STEPS)
    attached = [output for output in calls if output.requires_grad]
    gradients = _gradients(rollout, [*attached, *adapter.parameters.values()])
    passing = {id(output) for output, gradient in zip(attached, gradients, strict=False) if not _is_zero(gradient)}
    dead = [i for i, output in enumerate(calls) if id(output) not in passing]
    if dead or len(calls) != rollout.calls:
        raise ValueError(
            f"of {rollout.calls} denoiser calls in {rollout.num_steps} steps, calls {dead} pass no gradient on: "
            "look for a detach, a no_grad or an output that the pipeline does not use."
        )
    used = sum(not _is_zero(gradient) for gradient in gradients[len(attached) :])
    if not used:
        raise ValueError("no gradient reaches the adapter: its modules are not called by the denoiser.")
    return f"all {rollout.calls} denoiser calls carry gradient, to {used} of {len(adapter.parameters)} adapter tensors"


def _spied(denoiser: nn.Module, calls: list[Tensor]) -> Callable[..., Any]:
    forward = denoiser.forward

    def spied(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        first = output[0]
        calls.extend(first if isinstance(first, list) else [first])
        return output

    return spied


def _reward(
    sampler: Sampler, reward: WeightedSum, prompts: Sequence[str], seeds: Sequence[int], combination: str | None
) -> str:
    images = sampler.sample(prompts, seeds, num_inference_steps=NUM_STEPS).requires_grad_(combination is not None)
    components = reward.components(images, prompts)
    for name, scores in components.items():
        check_scores(scores, images, name, prompts)
    reaches = "" if combination is None else _reaching(reward, components, images, combination)
    told = ", ".join(f"{name} {scores.mean().item():.3g}" for name, scores in components.items())
    return f"finite scores of shape ({len(prompts)},){reaches} ({told})"


def _reaching(reward: WeightedSum, components: Mapping[str, Tensor], images: Tensor, combination: str) -> str:
    """That each reward's gradient reaches the pixels, and that something of them is left when they are combined."""
    terms = list[Tensor]()
    for name, scores in components.items():
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        if not gradient.isfinite().all() or _is_zero(gradient):
            raise ValueError(f"reward {name!r} has a gradient with respect to the pixels that is zero or not finite.")
        alone = scores.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(reward.term(name, alone).sum(), alone)
        terms.append(torch.cat([slope * part.flatten() for slope, part in zip(slopes, gradient, strict=True)]).float())
    if len(terms) == 1:
        return " whose gradient reaches the pixels"
    left = left_over(combination, torch.stack(terms))
    if left < _CANCELLED:
        weigh_them = "weigh them differently, " if combination == "sum" else ""
        raise ValueError(
            f"{' and '.join(components)} pull in opposite directions, and combination={combination} leaves no gradient "
            f"of them: {weigh_them}leave one out, give them targets that they can all reach (clamp_above), or train an "
            "adapter for each and mix them."
        )
    return f" whose gradients reach the pixels, where {left:.0%} of their length is left together"


def _checkpointing(
    sampler: Sampler,
    adapter: Trainable,
    prompts: Sequence[str],
    seeds: Sequence[int],
    modes: Sequence[Checkpointing],
) -> str:
    def gradient(mode: Checkpointing) -> Tensor:
        rollout = sampler.rollout(prompts, seeds, checkpointing=mode, num_inference_steps=NUM_STEPS)
        values = list(adapter.parameters.values())
        parts = zip(_gradients(rollout, values), values, strict=True)
        return torch.cat([(torch.zeros_like(value) if part is None else part).flatten() for part, value in parts])

    reference = gradient(modes[0])
    for mode in modes[1:]:
        error = ((gradient(mode) - reference).norm() / reference.norm()).item()
        if not error <= _tolerance(sampler, 1e-4, 5e-2):
            raise ValueError(
                f"checkpointing={mode!r} changes the gradient by {error:.1e}: the denoiser keeps state between calls; "
                "use checkpointing='none'."
            )
    return f"the same gradient with {', '.join(modes)}"


def _gradients(rollout: Rollout, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Gradients of a scalar that depends on every pixel, unevenly: a mean can be blind to a normalising layer."""
    if not rollout.pixels.requires_grad:
        return [None] * len(inputs)
    weights = torch.linspace(-1, 1, rollout.pixels[0].numel(), device=rollout.pixels.device)
    contrast = (rollout.pixels.flatten(1).float() * weights).sum()
    return torch.autograd.grad(contrast, inputs, allow_unused=True)


def _tolerance(sampler: Sampler, single: float, half: float) -> float:
    return half if sampler.half_precision else single


def _is_zero(gradient: Tensor | None) -> bool:
    return gradient is None or not gradient.any()


def _perturbed(adapter: Trainable) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: parameter.detach() + 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
        for name, parameter in adapter.parameters.items()
    }
