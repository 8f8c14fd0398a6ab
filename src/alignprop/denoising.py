"""What one denoising step means, asked of the scheduler itself: noise levels, clean estimates, probabilities.

``x_t = alpha_t x_0 + sigma_t epsilon`` in the units of the scheduler's own latents: ``alpha_t`` is 1 for those that
scale the noise alone (Euler and its kin), and ``1 - sigma_t`` for flow matching. Everything is computed in float32 or
wider: near the end of the chain, ``sigma_t`` of a half-precision schedule would be rounded to nothing.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from alignprop.steps import Transition, scheduler_copy


def noise_level(seen: Transition, step: int) -> tuple[Tensor, Tensor]:
    """The factors of picture and noise, (alpha_t, sigma_t), both scalars.

    Args:
        seen: any transition of the run.
        step: a denoising step of the run, from 0.

    Raises:
        ValueError: the scheduler does not say, or takes two calls a step.
    """
    scheduler, (x_t, _) = seen.scheduler, _state(seen)
    noised = getattr(scheduler, "scale_noise", None) or getattr(scheduler, "add_noise", None)
    if noised is None or getattr(scheduler, "order", 1) > 1 or scheduler.config.get("invert_sigmas"):
        raise _no_estimate(scheduler)
    twin, place = scheduler_copy(scheduler), _place(seen, step)
    twin._step_index = twin._begin_index = place  # some schedules have the same timestep twice
    time = scheduler.timesteps[place].reshape(1)
    one, zero = torch.ones(1, 1, dtype=x_t.dtype, device=x_t.device), torch.zeros(1, 1).to(x_t)
    if hasattr(twin, "scale_noise"):
        return twin.scale_noise(one, time, zero).squeeze(), twin.scale_noise(zero, time, one).squeeze()
    return twin.add_noise(one, zero, time).squeeze(), twin.add_noise(zero, one, time).squeeze()


def _place(seen: Transition, step: int) -> int:
    """Where a denoising step is in the schedule, of which the run may take the last part."""
    times = seen.scheduler.timesteps
    offset = len(times) - seen.num_steps
    known = offset + seen.step >= 0 and times[offset + seen.step] == seen.timestep
    if not known or not 0 <= step < seen.num_steps:
        raise ValueError(f"{type(seen.scheduler).__name__} is not stepped through its schedule one by one.")
    return offset + step


def prediction_type(scheduler: Any) -> str:
    """What the denoiser predicts: ``epsilon``, ``v_prediction``, ``sample`` or ``flow_prediction``.

    Raises:
        ValueError: none of them.
    """
    if hasattr(scheduler, "scale_noise"):
        return "flow_prediction"
    known = ("epsilon", "v_prediction", "sample", "flow_prediction")
    name: str | None = scheduler.config.get("prediction_type")
    if name not in known or hasattr(scheduler, "precondition_outputs"):
        raise _no_estimate(scheduler)
    return name


def _no_estimate(scheduler: Any) -> ValueError:
    return ValueError(
        f"{type(scheduler).__name__} does not say how a clean picture follows from one denoising step, which this "
        "estimator needs: use DDIMScheduler or, for flow matching, FlowMatchEulerDiscreteScheduler."
    )


def clean_estimate(seen: Transition) -> Tensor:
    """The clean latents that one denoiser output stands for, with its gradient, in the latents' dtype.

    epsilon: ``(x_t - sigma_t e) / alpha_t``; v: ``alpha_t x_t - sigma_t v`` for ``alpha_t^2 + sigma_t^2 = 1``
    (arXiv 2202.00512, appendix D); flow: ``x_t - sigma_t v`` (arXiv 2210.02747).

    Raises:
        ValueError: the scheduler has no such estimate.
    """
    return _clean(seen).to(seen.arguments["sample"].dtype)


def _clean(seen: Transition) -> Tensor:
    x_t, output = _state(seen)
    kind = prediction_type(seen.scheduler)
    alpha, sigma = noise_level(seen, seen.step)
    if kind == "sample":
        return output
    if kind == "flow_prediction":
        return x_t - sigma * output
    if kind == "epsilon":
        return (x_t - sigma * output) / alpha
    scale = torch.hypot(alpha, sigma)  # which brings latents of unbounded variance to unit variance
    return (alpha * x_t / scale - sigma * output) / scale


def target(seen: Transition, x_0: Tensor) -> Tensor:
    """What the denoiser should have said of its latents, had they been ``x_0`` with noise; in float32 or wider."""
    x_t, _ = _state(seen)
    x_0 = _wide(x_0)
    kind = prediction_type(seen.scheduler)
    if kind == "sample":
        return x_0
    alpha, sigma = noise_level(seen, seen.step)
    noise = (x_t - alpha * x_0) / sigma
    if kind == "epsilon":
        return noise
    if kind == "flow_prediction":
        return noise - x_0
    return (alpha * noise - sigma * x_0) / torch.hypot(alpha, sigma)


def leap(seen: Transition, step: int) -> Tensor:
    """The latents of a later denoising step, reached at once along the straight line that one denoiser output gives.

    For flow matching Euler's step, ``x_t - (sigma_t - sigma_s) v``; otherwise that of DDIM (arXiv 2010.02502, eq. 12).
    """
    x_t, _ = _state(seen)
    alpha, sigma = noise_level(seen, seen.step)
    later_alpha, later_sigma = noise_level(seen, step)
    x_0 = _clean(seen)
    reached = later_alpha * x_0 + later_sigma * (x_t - alpha * x_0) / sigma
    return reached.to(seen.arguments["sample"].dtype)


def noised(seen: Transition, x_0: Tensor, noise: Tensor, step: int) -> Tensor:
    """``alpha_t x_0 + sigma_t noise``, as the latents of a denoising step of the run, in the dtype of ``x_0``."""
    alpha, sigma = noise_level(seen, step)
    return (alpha * _wide(x_0) + sigma * _wide(noise)).to(x_0.dtype)


def _state(seen: Transition) -> tuple[Tensor, Tensor]:
    """The noisy latents and what the denoiser said of them."""
    output = seen.arguments["model_output"]
    return _wide(seen.arguments["sample"]), _wide(output)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


SMALLEST_DEVIATION = 1e-4
"""Below it a step counts as deterministic: some schedulers leave a rest of noise there that divides by zero."""


class _NoiseOf(TorchFunctionMode):
    """All noise that would be drawn inside has this value; nothing is drawn."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        without = {name: value for name, value in (kwargs or {}).items() if name != "generator"}
        if func is torch.randn:
            return torch.empty(*args, **without).fill_(self.value)
        if func is torch.randn_like:
            return torch.empty_like(*args, **without).fill_(self.value)
        return func(*args, **(kwargs or {}))


def gaussian(seen: Transition) -> tuple[Tensor, Tensor]:
    """Mean, with gradient, and deviation of the latents that a stochastic scheduler draws in this step.

    Found by taking the step with noise of 0 and of 1, whatever the scheduler: the latents are linear in the noise.

    Returns:
        The mean, shaped as the latents, and the deviation, a scalar; 0 for a step that draws nothing to speak of.
    """
    mean = _step_with_noise(seen, 0.0)
    with torch.no_grad():
        deviation = (_step_with_noise(seen, 1.0) - mean).mean()
    return mean, torch.where(deviation > SMALLEST_DEVIATION, deviation, 0.0)


def _step_with_noise(seen: Transition, value: float) -> Tensor:
    wide = {name: _wide(seen.arguments[name]) for name in ("sample", "model_output")}
    with _NoiseOf(value):
        latents: Tensor = scheduler_copy(seen.scheduler).step(**{**seen.arguments, **wide})[0]
    return latents


def log_probability(latents: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Log-density of latents under a Gaussian, the *mean* over all elements of a picture, shaped (B,).

    The mean and not the sum is what the released code of DDPO takes, and what its clip range is made for.
    """
    squared = (_wide(latents.detach()) - mean) ** 2 / (2 * deviation**2)
    each = -squared - deviation.log() - 0.5 * math.log(2 * math.pi)
    return each.flatten(1).mean(1)
