"""What a reward's gradient is worth."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignprop.rewards.base import check_scores
from alignprop.rewards.doctor.patient import GREY_LEVEL, Patient, Result, noise, plain, scale

HALF_BOUND = 0.05
"""By how much bfloat16 arithmetic may change a score, as a part of the largest score."""
HALF_COSINE = 0.9
"""How well the gradient in bfloat16 must agree with that in float32: the cosine of the angle between them."""
ZERO_SHARE = 0.5
"""Share of pixel values without gradient from which on it is worth a warning."""
PROMISE = (0.5, 2.0)
"""Between which a small step along the gradient must change the score, as a part of what the gradient says."""


def gradient(patient: Patient) -> Result:
    """Whether there is one, finite and not zero, on pictures and on plain ones."""
    if not patient.differentiable:
        return "idle", "none, and it says so: a judge, or for estimators that need none.", {}
    leaf = patient.images.clone().requires_grad_()
    images = leaf * 1.0
    scores = patient.reward(images, patient.prompts)
    if not scores.requires_grad:
        return "broken", f"{_detached(patient.name)} If that is meant, set `differentiable = False`.", {}
    check_scores(scores, images, patient.name, patient.prompts)
    gradient = patient.gradient(patient.images)[1]
    norms = gradient.flatten(1).norm(dim=1)
    zeros = (gradient == 0).float().mean().item()
    figures = {"gradient_norm": norms.mean().item(), "zero_share": zeros}
    told = f"norm {norms.mean():.3g} a picture, exactly zero in {100 * zeros:.3g} % of the pixel values"
    if not gradient.isfinite().all():
        return "broken", "not finite on the pictures: look for a square root or a logarithm of zero.", figures
    if not gradient.any():
        remedy = "look for round, floor, sign, argmax, a comparison, or a clamp that all pixels are beyond."
        return "broken", f"exactly zero in every pixel value, so there is nothing to follow: {remedy}", figures
    for kind, pictures in {"noise": noise(patient.images), **plain(patient.images)}.items():
        if not patient.gradient(pictures)[1].isfinite().all():
            return "broken", f"not finite on {kind}: look for a square root or a logarithm of zero.", figures
    if not norms.all():
        return "doubtful", f"{told}: for {int((norms == 0).sum())} of {len(norms)} pictures there is none.", figures
    if zeros > ZERO_SHARE:
        return "doubtful", f"{told}: the rest of the picture cannot be improved; look for a crop or a clamp.", figures
    return "sound", told, figures


def _detached(name: str) -> str:
    return (
        f"reward {name!r} gives no gradient to the pixels: compute it in torch from `images`, without detach, "
        "no_grad, numpy or Pillow."
    )


def ascent(patient: Patient) -> Result:
    """Central difference along the gradient, of a step of one grey level where it is largest."""
    if not patient.differentiable:
        return "idle", "there is no gradient to climb.", {}
    gradient = patient.gradient(patient.images)[1]
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    shift = GREY_LEVEL * gradient / largest.clamp_min(torch.finfo(largest.dtype).tiny)
    promised = 2 * (gradient * shift).sum().item()
    kept = (patient.score(patient.images + shift) - patient.score(patient.images - shift)).double().sum().item()
    share = kept / promised
    told = f"a step of one grey level along the gradient changes the scores by {100 * share:.3g} % of what it promises"
    if not PROMISE[0] <= share <= PROMISE[1]:
        remedy = "look for rounding, a part that is detached, or a curve too sharp to follow."
        return "doubtful", f"{told}: {remedy}", {"kept_promise": share}
    return "sound", told, {"kept_promise": share}


def in_bfloat16(patient: Patient) -> Result:
    """The arithmetic of mixed precision: matrix products and convolutions in bfloat16."""
    if not patient.differentiable:
        return "idle", "there is no gradient to compare.", {}
    scores, gradient = patient.gradient(patient.images)
    with torch.autocast(patient.images.device.type, torch.bfloat16):
        half_scores, half_gradient = patient.gradient(patient.images)
    error = ((half_scores.float() - scores).abs().max() / scale(patient)).item()
    cosine = F.cosine_similarity(gradient.flatten(), half_gradient.flatten(), 0).item()
    figures = {"half": error, "half_cosine": cosine}
    told = f"in bfloat16 scores differ by {100 * error:.2g} % of the largest, cosine of the gradients {cosine:.3f}"
    if not (error <= HALF_BOUND and cosine >= HALF_COSINE):
        return "doubtful", f"{told}: keep it in float32, which is what the library does.", figures
    return "sound", told, figures


def frozen_weights(patient: Patient) -> Result:
    """Whether training would compute gradients of the reward's own weights."""
    module = patient.reward if isinstance(patient.reward, nn.Module) else nn.Module()
    number = sum(parameter.numel() for parameter in module.parameters())
    learning = 0
    if patient.differentiable:
        leaf = patient.images.clone().requires_grad_()
        learning = sum(p.numel() for p in _leaves(patient.reward(leaf * 1.0, patient.prompts)) if p is not leaf)
    figures = {"weights": float(number), "weights_with_gradient": float(learning)}
    if learning:
        told = f"{learning:,} get a gradient that nobody uses, at the price of time and memory"
        return "doubtful", f"{told}: call requires_grad_(False) on the model.", figures
    return "sound", f"{number:,}, all frozen" if number else "none that it shows", figures


def _leaves(scores: Tensor) -> list[Tensor]:
    """The tensors that a backward pass from `scores` would give a gradient to."""
    seen, stack, leaves = set[Any](), [scores.grad_fn], []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [parent for parent, _ in node.next_functions]
        if hasattr(node, "variable"):  # where a gradient is accumulated
            leaves.append(node.variable)
    return leaves
