"""What one denoising step means, asked of the scheduler itself: noise levels, clean estimates, probabilities.

``x_t = alpha_t x_0 + sigma_t epsilon`` in the units of the scheduler's own latents: ``alpha_t`` is 1 for those that
scale the noise alone (Euler and its kin), and ``1 - sigma_t`` for flow matching.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from alignprop.steps import Transition, scheduler_copy


def noise_level(scheduler: Any, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of picture and noise, (alpha_t, sigma_t), both scalars.

    Args:
        scheduler: any of diffusers that says how it noises.
        timestep: one of its timesteps.
        like: gives dtype and device.

    Raises:
        ValueError: the scheduler does not say, or takes two calls a step.
    """
    noised = getattr(scheduler, "scale_noise", None) or getattr(scheduler, "add_noise", None)
    if noised is None or getattr(scheduler, "order", 1) > 1:
        raise _no_estimate(scheduler)
    twin = scheduler_copy(scheduler)
    twin._step_index = twin._begin_index = None  # looked up by the timestep
    times = torch.as_tensor(timestep).reshape(1)
    one, zero = torch.ones(1, 1, dtype=like.dtype, device=like.device), torch.zeros(1, 1).to(like)
    if hasattr(twin, "scale_noise"):
        return twin.scale_noise(one, times, zero).squeeze(), twin.scale_noise(zero, times, one).squeeze()
    return twin.add_noise(one, zero, times).squeeze(), twin.add_noise(zero, one, times).squeeze()


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


def clean_estimate(transition: Transition) -> Tensor:
    """The clean latents that one denoiser output stands for, with its gradient.

    epsilon: ``(x_t - sigma_t e) / alpha_t``; v: ``alpha_t x_t - sigma_t v`` for ``alpha_t^2 + sigma_t^2 = 1``
    (arXiv 2202.00512, appendix D); flow: ``x_t - sigma_t v`` (arXiv 2210.02747).

    Raises:
        ValueError: the scheduler has no such estimate, or none at this step.
    """
    scheduler, x_t, output = (transition.scheduler, *_state(transition))
    kind = prediction_type(scheduler)
    alpha, sigma = noise_level(scheduler, transition.arguments["timestep"], x_t)
    if kind == "sample":
        return output
    if kind == "flow_prediction":
        return x_t - sigma * output
    if kind == "epsilon":
        return (x_t - sigma * output) / alpha
    scale = torch.hypot(alpha, sigma)  # which brings latents of unbounded variance to unit variance
    return (alpha * x_t / scale - sigma * output) / scale


def target(transition: Transition, x_0: Tensor) -> Tensor:
    """What the denoiser should have said of its latents, had they been ``x_0`` with noise added."""
    scheduler, x_t, _ = (transition.scheduler, *_state(transition))
    kind = prediction_type(scheduler)
    if kind == "sample":
        return x_0
    alpha, sigma = noise_level(scheduler, transition.arguments["timestep"], x_t)
    noise = (x_t - alpha * x_0) / sigma
    if kind == "epsilon":
        return noise
    if kind == "flow_prediction":
        return noise - x_0
    return (alpha * noise - sigma * x_0) / torch.hypot(alpha, sigma)


def leap(transition: Transition, timestep: Tensor) -> Tensor:
    """The latents at a later timestep, reached in one step along the straight line that one denoiser output gives.

    For flow matching Euler's step, ``x_t - (sigma_t - sigma_s) v``; otherwise that of DDIM (arXiv 2010.02502, eq. 12).
    """
    x_t, _ = _state(transition)
    scheduler = transition.scheduler
    alpha, sigma = noise_level(scheduler, transition.arguments["timestep"], x_t)
    later_alpha, later_sigma = noise_level(scheduler, timestep, x_t)
    x_0 = clean_estimate(transition)
    return later_alpha * x_0 + later_sigma * (x_t - alpha * x_0) / sigma


def noised(scheduler: Any, x_0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """``alpha_t x_0 + sigma_t noise``."""
    alpha, sigma = noise_level(scheduler, timestep, x_0)
    return alpha * x_0 + sigma * noise


def next_timestep(transition: Transition) -> Tensor:
    """The timestep of the denoising step after this one, of a run that ends with the schedule.

    Raises:
        ValueError: the pipeline does not go through the schedule one by one.
    """
    times = transition.scheduler.timesteps
    place = len(times) - transition.num_steps + transition.step
    if transition.is_last or place < 0 or times[place] != transition.arguments["timestep"]:
        raise ValueError(f"{type(transition.scheduler).__name__} is not stepped through its schedule one by one.")
    following: Tensor = times[place + 1]
    return following


def _state(transition: Transition) -> tuple[Tensor, Tensor]:
    """The noisy latents and what the denoiser said of them."""
    return transition.arguments["sample"], transition.arguments["model_output"]


class _NoiseOf(TorchFunctionMode):
    """All noise that is drawn inside has this value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = func(*args, **(kwargs or {}))
        return torch.full_like(drawn, self.value) if func in (torch.randn, torch.randn_like, torch.normal) else drawn


def gaussian(transition: Transition) -> tuple[Tensor, Tensor]:
    """Mean, with gradient, and deviation of the latents that a stochastic scheduler draws in this step.

    Found by taking the step with noise of 0 and of 1, whatever the scheduler: the latents are linear in the noise.

    Returns:
        The mean, shaped as the latents, and the deviation, a scalar; 0 for a deterministic step.
    """
    mean = _step_with_noise(transition, 0.0)
    with torch.no_grad():
        deviation = (_step_with_noise(transition, 1.0) - mean).mean()
    return mean, deviation.clamp(min=0)


def _step_with_noise(transition: Transition, value: float) -> Tensor:
    # The generators of the run go on as they would have: none is passed, and global noise is put back.
    arguments = {name: each for name, each in transition.arguments.items() if name != "generator"}
    with torch.random.fork_rng(devices=[]), _NoiseOf(value):
        latents: Tensor = scheduler_copy(transition.scheduler).step(**arguments)[0]
    return latents


def log_probability(latents: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Log-density of latents under a Gaussian, the *mean* over all elements of a picture, shaped (B,).

    The mean and not the sum is what the released code of DDPO takes, and what its clip range is made for.
    """
    mean, deviation = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (mean, deviation))
    squared = (latents.detach() - mean) ** 2 / (2 * deviation**2)
    each = -squared - deviation.log() - 0.5 * math.log(2 * math.pi)
    return each.flatten(1).mean(1)
