"""The loss of diffusion training, at every denoising step that the pipeline takes."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from alignprop import distributed
from alignprop.denoising import noised, target
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
    *,
    guided: bool = False,
) -> tuple[Tensor, int]:
    """Backpropagate ``sum_b weights_b mean_t || target_t - prediction(x_t) ||^2`` into the adapter.

    The pipeline itself supplies times and conditions: it is walked through once, each of its denoising steps is given
    ``x_0`` with fresh noise of its level, and each is backpropagated before the next. The first step keeps
    the pipeline's own noise, as noise is almost all that a picture is there.

    Args:
        sampler: the pipeline and the arguments of its call.
        prompts: of B pictures.
        seeds: B seeds of noise; not those that ``x_0`` was drawn from.
        x_0: (B, ...), clean latents in the scheduler's units.
        weights: (B,).
        checkpointing: activation checkpointing of the steps.
        guided: whether the prediction is the guided one that pictures are drawn by, or the plain one of training.

    Returns:
        The unweighted loss of each picture, (B,), and the number of denoiser calls.
    """
    losses: list[Tensor] = []

    def learn(seen: Transition) -> Tensor | None:
        difference = seen.arguments["model_output"].float() - target(seen, x_0).float()
        loss = (difference**2).flatten(1).mean(1)[: len(seeds)]
        (weights.to(loss) * loss / seen.num_steps).sum().backward()
        losses.append(loss.detach())
        if seen.is_last:
            return None
        return noised(seen, x_0, noise_of(x_0, seeds, seen.step), seen.step + 1)

    trace = sampler.walk(
        prompts,
        seeds,
        lambda num_steps: Plan(live=range(num_steps)),
        learn,
        checkpointing=checkpointing,
        **({} if guided else _unguided(sampler)),
    )
    return torch.stack(losses).mean(0), trace.calls


def noise_of(x_0: Tensor, seeds: Sequence[int], stream: int) -> Tensor:
    """Noise of each picture's own, whatever else is in the batch.

    Args:
        x_0: (B, ...), gives shape, dtype and device; or (n B, ...), for pipelines that keep n copies of their latents.
        seeds: of the B pictures.
        stream: tells one draw of a seed from another.
    """
    generators = [torch.Generator().manual_seed(distributed.derive_seed(seed, stream)) for seed in seeds]
    noise = torch.stack([torch.randn(x_0.shape[1:], generator=generator) for generator in generators])
    return torch.cat([noise] * (len(x_0) // len(seeds))).to(x_0)


def _unguided(sampler: Sampler) -> dict[str, float]:
    known = inspect.signature(sampler.pipeline.__call__).parameters
    return {"guidance_scale": 1.0} if "guidance_scale" in known else {}
