"""What a reward's scores are, and what they depend on."""

from __future__ import annotations

import torch

from alignprop.rewards.base import check_scores
from alignprop.rewards.doctor.patient import GREY_LEVEL, Patient, Result, noise, plain, scale, spread

COMPANY_BOUND = 1e-4
"""By how much a score may differ between batch sizes, as a part of the largest score."""
COMPANY_GRADIENT_BOUND = 1e-2
"""By how much the gradient may, as a part of its norm."""
NUM_PLACES = 8
"""Single pixels that are changed in each picture."""


def valid_scores(patient: Patient) -> Result:
    """Shape, dtype and finiteness."""
    scores = patient.score(patient.images)
    check_scores(scores, patient.images, patient.name, patient.prompts)
    dtype = str(scores.dtype).removeprefix("torch.")
    return "sound", f"shape {tuple(scores.shape)}, {dtype}, finite", {}


def value_range(patient: Patient) -> Result:
    """Scores of the pictures beside those of noise and of plain ones."""
    scores = patient.score(patient.images)
    others = {"noise": noise(patient.images), **plain(patient.images)}
    by_kind = {kind: patient.score(pictures) for kind, pictures in others.items()}
    for kind, values in by_kind.items():
        if not values.isfinite().all():
            return "broken", f"not finite on {kind}: {values.tolist()}; a picture may come near that in training.", {}
    figures = {
        "mean": scores.mean().item(),
        "spread": spread(scores),
        **{kind: values.mean().item() for kind, values in by_kind.items()},
    }
    told = f"{scores.min():.4g} to {scores.max():.4g} on the pictures, "
    told += ", ".join(f"{figures[kind]:.4g} on {kind}" for kind in by_kind)
    if len(scores) > 1 and figures["spread"] == 0:
        return "doubtful", f"{told}: all pictures score the same, so there is nothing to prefer.", figures
    if figures["noise"] > scores.max():
        return "doubtful", f"{told}: it likes noise better than pictures, and so will training; add a judge.", figures
    return "sound", told, figures


def sensitivity(patient: Patient) -> Result:
    """What one pixel changes, and one grey level in all of them."""
    scores, (height, width) = patient.score(patient.images), patient.images.shape[-2:]
    generator = torch.Generator().manual_seed(0)
    changes = []
    for place in torch.randint(height * width, (NUM_PLACES,), generator=generator).tolist():
        changed = patient.images.clone()
        pixel = changed[:, :, place // width, place % width]
        pixel.copy_((pixel < 0.5).to(pixel))  # as far from what it is as can be
        changes.append((patient.score(changed) - scores).abs().max().item())
    signs = torch.randint(2, patient.images.shape, generator=generator).to(patient.images) * 2 - 1
    grain = (patient.score((patient.images + GREY_LEVEL * signs).clamp(0, 1)) - scores).abs().max().item()
    figures = {"one_pixel": max(changes), "one_grey_level": grain}
    apart = spread(scores)
    told = f"one pixel moves a score by up to {max(changes):.2g}, one grey level in all of them by {grain:.2g}"
    told += f"; the pictures differ by {apart:.2g}" if apart else ""
    if max(changes) == 0 and grain == 0:
        return "doubtful", f"{told}: it sees neither, so small improvements go unnoticed.", figures
    if apart and max(changes) > apart:
        return "doubtful", f"{told}: a few pixels can fool it; train it with `augment: true`.", figures
    return "sound", told, figures


def untouched_input(patient: Patient) -> Result:
    """Whether the pictures are left as they were."""
    given = patient.images.clone()
    with torch.no_grad():
        patient.reward(given, patient.prompts)
    if not torch.equal(given, patient.images):
        return "broken", "it writes into the pictures that it is given: work on a copy, images.clone().", {}
    return "sound", "the pictures are left as they were", {}


def repetition(patient: Patient) -> Result:
    """Whether the same pictures score the same."""
    error = (patient.score(patient.images) - patient.score(patient.images)).abs().max().item()
    if error > COMPANY_BOUND * scale(patient):
        remedy = "look for dropout (call eval()), or for random views."
        return "doubtful", f"the same pictures score differently by up to {error:.2g}: {remedy}", {"repetition": error}
    return "sound", f"the same pictures score the same (to {error:.1g})", {"repetition": error}


def batch_size(patient: Patient) -> Result:
    """Each picture in a batch of one, and whether a score has gradient to the pictures beside it."""
    images, prompts = patient.images, patient.prompts
    if len(images) < 2:
        return "idle", "needs two pictures or more.", {}
    together = patient.score(images)
    if (together - patient.score(images)).abs().max() > COMPANY_BOUND * scale(patient):
        return "idle", "cannot be told of scores that are random.", {}
    singles = [(images[i : i + 1], prompts[i : i + 1]) for i in range(len(images))]
    alone = torch.cat([patient.score(*single) for single in singles])
    error = ((alone - together).abs().max() / scale(patient)).item()
    figures = {"company": error}
    remedy = "a score may depend on its own picture and prompt only; look for a mean over the batch or batch norm."
    if error > COMPANY_BOUND:
        told = f"alone, pictures score differently by {100 * error:.2g} % of the largest score"
        return "broken", f"{told}: {remedy}", figures
    told = f"alone, pictures score the same (to {error:.1g} of the largest score)"
    if not patient.differentiable:
        return "sound", told, figures
    leaf = images.clone().requires_grad_()
    first = patient.reward(leaf * 1.0, prompts)[0]
    (gradient,) = torch.autograd.grad(first, leaf, allow_unused=True) if first.requires_grad else (None,)
    if gradient is not None and gradient[1:].any():
        return "broken", f"the first picture's score has a gradient to its neighbours: {remedy}", figures
    whole = patient.gradient(images)[1]
    parts = torch.cat([patient.gradient(*single)[1] for single in singles])
    figures["company_gradient"] = ((whole - parts).norm() / whole.norm().clamp_min(1e-30)).item()
    told += f", with the same gradient (to {figures['company_gradient']:.1g} of its norm)"
    if figures["company_gradient"] > COMPANY_GRADIENT_BOUND:
        return "broken", f"{told}, which is more than rounding: {remedy}", figures
    return "sound", told, figures
