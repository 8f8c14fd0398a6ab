"""The reward doctor: what a reward does to pictures, told in sentences, before a run is spent on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignprop.rewards.base import Reward, check_scores
from alignprop.rewards.differentiable import is_differentiable
from alignprop.rewards.modality import modality_of

Verdict = Literal["sound", "doubtful", "broken", "idle"]
"""Of a finding; idle where there is nothing to examine."""

GREY_LEVEL = 1 / 255
COMPANY_BOUND = 1e-4
"""By how much a score may differ between batch sizes, as a part of the largest score."""
COMPANY_GRADIENT_BOUND = 1e-2
"""By how much the gradient may, as a part of its norm."""
HALF_BOUND = 0.05
"""By how much bfloat16 arithmetic may change a score, as a part of the largest score."""
HALF_COSINE = 0.9
"""How well the gradient in bfloat16 must agree with that in float32: the cosine of the angle between them."""
PIXEL_BOUND = 0.02
"""By how much the prepared pixels may miss those of the published image processor, after normalisation."""
ZERO_SHARE = 0.5
"""Share of pixel values without gradient from which on it is worth a warning."""
PROMISE = (0.5, 2.0)
"""Between which a small step along the gradient must change the score, as a part of what the gradient says."""
NUM_PLACES = 8
"""Single pixels that are changed in each picture."""

_FAULTS = (ValueError, RuntimeError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError, OSError)
"""What rewards of users raise."""


@dataclass(frozen=True)
class Finding:
    """One thing that was examined.

    Attributes:
        name: What.
        verdict: How it is.
        detail: What was measured and, where it is not as it should be, what to do.
        figures: The measured numbers by name.
    """

    name: str
    verdict: Verdict
    detail: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """All that was found.

    Attributes:
        findings: In the order of the examination, which ends early where there are no scores.
    """

    findings: tuple[Finding, ...]

    @property
    def broken(self) -> bool:
        """Whether the reward must not be used as it is."""
        return any(finding.verdict == "broken" for finding in self.findings)

    @property
    def figures(self) -> dict[str, float]:
        """All measured numbers by name."""
        return {name: value for finding in self.findings for name, value in finding.figures.items()}


@dataclass(frozen=True)
class _Patient:
    """A reward with pictures to examine it on; it is given copies, which it may spoil.

    Attributes:
        differentiable: Whether there is a gradient to examine.
    """

    reward: Reward
    images: Tensor
    prompts: Sequence[str]
    name: str
    differentiable: bool

    def score(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        with torch.no_grad():
            return self.reward(images.clone(), prompts or self.prompts)

    def gradient(self, images: Tensor, prompts: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """Scores, and the gradient of their sum."""
        leaf = images.clone().requires_grad_()
        scores = self.reward(leaf * 1.0, prompts or self.prompts)  # a reward may write into what is no leaf
        (gradient,) = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)
        return scores.detach(), torch.zeros_like(leaf) if gradient is None else gradient


def examine(reward: Reward, images: Tensor, prompts: Sequence[str], name: str = "reward") -> Diagnosis:
    """Measure what training relies on.

    Args:
        reward: Scores pictures; on the device of the images.
        images: Real pictures, shape (B, 3, H, W) in [0, 1], float32; two or more, or company cannot be examined.
        prompts: B of them.
        name: The reward's, for the messages.

    Raises:
        ValueError: The reward scores videos or sound.
    """
    if modality_of(reward) != "image":
        raise ValueError(
            f"reward {name!r} scores {modality_of(reward)}, and the doctor examines rewards of pictures; "
            "`alignprop check` examines it with its pipeline."
        )
    patient, findings = _Patient(reward, images, prompts, name, is_differentiable(reward)), list[Finding]()
    for label, examination in _EXAMINATIONS.items():
        findings.append(_found(label, examination, patient))
        if label == "scores" and findings[-1].verdict == "broken":
            break  # nothing more can be measured
        if label == "gradient" and findings[-1].verdict == "broken":
            patient = replace(patient, differentiable=False)  # told once is enough
    return Diagnosis(tuple(findings))


_Result = tuple[Verdict, str, dict[str, float]]


def _found(label: str, examination: Callable[[_Patient], _Result], patient: _Patient) -> Finding:
    try:
        return Finding(label, *examination(patient))
    except _FAULTS as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        told = first_line if isinstance(error, ValueError) else f"it fails with {type(error).__name__}: {first_line}"
        return Finding(label, "broken", told)


def _scores(patient: _Patient) -> _Result:
    scores = patient.score(patient.images)
    check_scores(scores, patient.images, patient.name, patient.prompts)
    dtype = str(scores.dtype).removeprefix("torch.")
    return "sound", f"shape {tuple(scores.shape)}, {dtype}, finite", {}


def _range(patient: _Patient) -> _Result:
    scores = patient.score(patient.images)
    others = {"noise": _noise(patient.images), **_plain(patient.images)}
    by_kind = {kind: patient.score(pictures) for kind, pictures in others.items()}
    for kind, values in by_kind.items():
        if not values.isfinite().all():
            return "broken", f"not finite on {kind}: {values.tolist()}; a picture may come near that in training.", {}
    figures = {
        "mean": scores.mean().item(),
        "spread": _spread(scores),
        **{kind: values.mean().item() for kind, values in by_kind.items()},
    }
    told = f"{scores.min():.4g} to {scores.max():.4g} on the pictures, "
    told += ", ".join(f"{figures[kind]:.4g} on {kind}" for kind in by_kind)
    if len(scores) > 1 and figures["spread"] == 0:
        return "doubtful", f"{told}: all pictures score the same, so there is nothing to prefer.", figures
    if figures["noise"] > scores.max():
        return "doubtful", f"{told}: it likes noise better than pictures, and so will training; add a judge.", figures
    return "sound", told, figures


def _gradient(patient: _Patient) -> _Result:
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
    for kind, pictures in {"noise": _noise(patient.images), **_plain(patient.images)}.items():
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


def _ascent(patient: _Patient) -> _Result:
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


def _sensitivity(patient: _Patient) -> _Result:
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
    spread = _spread(scores)
    told = f"one pixel moves a score by up to {max(changes):.2g}, one grey level in all of them by {grain:.2g}"
    told += f"; the pictures differ by {spread:.2g}" if spread else ""
    if max(changes) == 0 and grain == 0:
        return "doubtful", f"{told}: it sees neither, so small improvements go unnoticed.", figures
    if spread and max(changes) > spread:
        return "doubtful", f"{told}: a few pixels can fool it; train it with `augment: true`.", figures
    return "sound", told, figures


def _input(patient: _Patient) -> _Result:
    given = patient.images.clone()
    with torch.no_grad():
        patient.reward(given, patient.prompts)
    if not torch.equal(given, patient.images):
        return "broken", "it writes into the pictures that it is given: work on a copy, images.clone().", {}
    return "sound", "the pictures are left as they were", {}


def _repetition(patient: _Patient) -> _Result:
    error = (patient.score(patient.images) - patient.score(patient.images)).abs().max().item()
    if error > COMPANY_BOUND * _scale(patient):
        remedy = "look for dropout (call eval()), or for random views."
        return "doubtful", f"the same pictures score differently by up to {error:.2g}: {remedy}", {"repetition": error}
    return "sound", f"the same pictures score the same (to {error:.1g})", {"repetition": error}


def _company(patient: _Patient) -> _Result:
    """Each picture in a batch of one, and whether a score has gradient to the pictures beside it."""
    images, prompts = patient.images, patient.prompts
    if len(images) < 2:
        return "idle", "needs two pictures or more.", {}
    together = patient.score(images)
    if (together - patient.score(images)).abs().max() > COMPANY_BOUND * _scale(patient):
        return "idle", "cannot be told of scores that are random.", {}
    singles = [(images[i : i + 1], prompts[i : i + 1]) for i in range(len(images))]
    alone = torch.cat([patient.score(*single) for single in singles])
    error = ((alone - together).abs().max() / _scale(patient)).item()
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


def _half(patient: _Patient) -> _Result:
    """The arithmetic of mixed precision: matrix products and convolutions in bfloat16."""
    if not patient.differentiable:
        return "idle", "there is no gradient to compare.", {}
    scores, gradient = patient.gradient(patient.images)
    with torch.autocast(patient.images.device.type, torch.bfloat16):
        half_scores, half_gradient = patient.gradient(patient.images)
    error = ((half_scores.float() - scores).abs().max() / _scale(patient)).item()
    cosine = F.cosine_similarity(gradient.flatten(), half_gradient.flatten(), 0).item()
    figures = {"half": error, "half_cosine": cosine}
    told = f"in bfloat16 scores differ by {100 * error:.2g} % of the largest, cosine of the gradients {cosine:.3f}"
    if not (error <= HALF_BOUND and cosine >= HALF_COSINE):
        return "doubtful", f"{told}: keep it in float32, which is what the library does.", figures
    return "sound", told, figures


def _weights(patient: _Patient) -> _Result:
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


def _preprocessing(patient: _Patient) -> _Result:
    reference_pixels = getattr(patient.reward, "reference_pixels", None)
    if reference_pixels is None:
        return "idle", "not applicable: it names no image processor to compare with.", {}
    ours, theirs = reference_pixels(patient.images)
    if ours.shape != theirs.shape:
        told = f"shape {tuple(ours.shape)}, where the image processor gives {tuple(theirs.shape)}"
        return "broken", f"{told}: the model sees another picture than it was made for.", {}
    error = (ours - theirs).abs().max().item()
    told = f"pixels as its own image processor gives them, to {error:.2g} after normalisation"
    if not error <= PIXEL_BOUND:
        return "doubtful", f"{told}: more than rounding to 8 bits explains.", {"preprocessing": error}
    return "sound", told, {"preprocessing": error}


def _cost(patient: _Patient) -> _Result:
    number = len(patient.images)
    figures = {"score_ms": 1000 * _seconds(patient, lambda: patient.score(patient.images)) / number}
    told = f"{figures['score_ms']:.3g} ms a picture"
    if patient.differentiable:
        figures["gradient_ms"] = 1000 * _seconds(patient, lambda: patient.gradient(patient.images)) / number
        figures["kept_mb"] = _bytes_kept(patient) / 2**20 / number
        told += f", {figures['gradient_ms']:.3g} ms with its gradient, for which {figures['kept_mb']:.3g} MB are kept"
    return "sound", f"{told} (batch of {number}, {patient.images.device.type})", figures


def _seconds(patient: _Patient, run: Callable[[], Any]) -> float:
    """Of a call; what is done only the first time has been done."""

    def now() -> float:
        if patient.images.device.type == "cuda":
            torch.cuda.synchronize(patient.images.device)
        return time.perf_counter()

    began = now()
    run()
    return now() - began


def _bytes_kept(patient: _Patient) -> int:
    """What the graph holds until the backward pass, but for the weights."""
    module = patient.reward if isinstance(patient.reward, nn.Module) else nn.Module()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        leaf = patient.images.clone().requires_grad_()
        scores = patient.reward(leaf * 1.0, patient.prompts)
    del scores
    return sum(kept.values())


def _noise(images: Tensor) -> Tensor:
    return torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).to(images)


def _plain(images: Tensor) -> dict[str, Tensor]:
    return {kind: torch.full_like(images, value) for kind, value in (("black", 0.0), ("white", 1.0), ("grey", 0.5))}


def _spread(scores: Tensor) -> float:
    return scores.double().std(correction=0).item()


def _scale(patient: _Patient) -> float:
    """The largest score, for differences to be a part of."""
    return max(patient.score(patient.images).abs().max().item(), 1e-12)


_EXAMINATIONS: dict[str, Callable[[_Patient], _Result]] = {
    "scores": _scores,
    "range": _range,
    "gradient": _gradient,
    "ascent": _ascent,
    "sensitivity": _sensitivity,
    "input": _input,
    "repetition": _repetition,
    "batch size": _company,
    "bfloat16": _half,
    "weights": _weights,
    "preprocessing": _preprocessing,
    "cost": _cost,
}
