"""The loss of diffusion training, at every denoising step that the pipeline takes."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from alignprop import distributed
from alignprop.denoising import next_timestep, noised, target
from alignprop.rollout import Sampler
from alignprop.seams import Checkpointing
from alignprop.steps import Plan, Transition


def denoising_loss(
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    x_0: Tensor,
    weights: Tensor,
    checkpointing: Checkpointing = "none",
) -> tuple[Tensor, int]:
    """Backpropagate ``sum_b weights_b mean_t || target_t - prediction(x_t) ||^2`` into the adapter.

    The pipeline itself supplies times and conditions: it is walked through once, each of its denoising steps is given
    ``x_0`` with fresh noise of its level, and each is backpropagated before the next. Guidance is switched off. The
    first step keeps the pipeline's own noise, as noise is almost all that a picture is there.

    Args:
        sampler: the pipeline and the arguments of its call.
        prompts: of B pictures.
        seeds: B seeds of noise; not those that ``x_0`` was drawn from.
        x_0: (B, ...), clean latents in the scheduler's units.
        weights: (B,).
        checkpointing: activation checkpointing of the steps.

    Returns:
        The unweighted loss of each picture, (B,), and the number of denoiser calls.
    """
    losses: list[Tensor] = []

    def learn(seen: Transition) -> Tensor | None:
        difference = seen.arguments["model_output"].float() - target(seen, x_0).float()
        loss = (difference**2).flatten(1).mean(1)
        (weights.to(loss) * loss / seen.num_steps).sum().backward()
        losses.append(loss.detach())
        if seen.is_last:
            return None
        return noised(seen.scheduler, x_0, noise_of(x_0, seeds, seen.step), next_timestep(seen))

    trace = sampler.walk(
        prompts,
        seeds,
        lambda num_steps: Plan(live=range(num_steps)),
        learn,
        checkpointing="block" if checkpointing in ("block", "nested") else "none",
        **_unguided(sampler),
    )
    return torch.stack(losses).mean(0), trace.calls


def noise_of(x_0: Tensor, seeds: Sequence[int], stream: int) -> Tensor:
    """Noise of each picture's own, whatever else is in the batch.

    Args:
        x_0: (B, ...), gives shape, dtype and device.
        seeds: of the B pictures.
        stream: tells one draw of a seed from another.
    """
    generators = [torch.Generator().manual_seed(distributed.derive_seed(seed, stream)) for seed in seeds]
    return torch.stack([torch.randn(x_0.shape[1:], generator=generator) for generator in generators]).to(x_0)


def _unguided(sampler: Sampler) -> dict[str, float]:
    known = inspect.signature(sampler.pipeline.__call__).parameters
    return {"guidance_scale": 1.0} if "guidance_scale" in known else {}
