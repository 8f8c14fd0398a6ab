"""Whether a reward prepares pictures as its model wants them, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alignprop.rewards.doctor.patient import Patient, Result

PIXEL_BOUND = 0.02
"""By how much the prepared pixels may miss those of the published image processor, after normalisation."""


def preprocessing(patient: Patient) -> Result:
    """Pixels as the model sees them, against its published image processor."""
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


def cost(patient: Patient) -> Result:
    """Time of a picture, and what its graph holds."""
    number = len(patient.images)
    figures = {"score_ms": 1000 * _seconds(patient, lambda: patient.score(patient.images)) / number}
    told = f"{figures['score_ms']:.3g} ms a picture"
    if patient.differentiable:
        figures["gradient_ms"] = 1000 * _seconds(patient, lambda: patient.gradient(patient.images)) / number
        figures["kept_mb"] = _bytes_kept(patient) / 2**20 / number
        told += f", {figures['gradient_ms']:.3g} ms with its gradient, for which {figures['kept_mb']:.3g} MB are kept"
    return "sound", f"{told} (batch of {number}, {patient.images.device.type})", figures


def _seconds(patient: Patient, run: Callable[[], Any]) -> float:
    """Of a call; what is done only the first time has been done."""

    def now() -> float:
        if patient.images.device.type == "cuda":
            torch.cuda.synchronize(patient.images.device)
        return time.perf_counter()

    began = now()
    run()
    return now() - began


def _bytes_kept(patient: Patient) -> int:
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
