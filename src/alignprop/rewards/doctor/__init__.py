"""The reward doctor: what a reward does to pictures, told in sentences, before a run is spent on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from alignprop.rewards.base import Reward
from alignprop.rewards.differentiable import is_differentiable
from alignprop.rewards.doctor import gradients, practice, scores
from alignprop.rewards.doctor.patient import Patient, Result, Verdict
from alignprop.rewards.modality import modality_of

_FAULTS = (ValueError, RuntimeError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError, OSError)
"""What rewards of users raise."""

EXAMINATIONS: dict[str, Callable[[Patient], Result]] = {
    "scores": scores.valid_scores,
    "range": scores.value_range,
    "gradient": gradients.gradient,
    "ascent": gradients.ascent,
    "sensitivity": scores.sensitivity,
    "input": scores.untouched_input,
    "repetition": scores.repetition,
    "batch size": scores.batch_size,
    "bfloat16": gradients.in_bfloat16,
    "weights": gradients.frozen_weights,
    "preprocessing": practice.preprocessing,
    "cost": practice.cost,
}
"""In the order in which they are told."""


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
    patient, findings = Patient(reward, images, prompts, name, is_differentiable(reward)), list[Finding]()
    for label, examination in EXAMINATIONS.items():
        findings.append(_found(label, examination, patient))
        if label == "scores" and findings[-1].verdict == "broken":
            break  # nothing more can be measured
        if label == "gradient" and findings[-1].verdict == "broken":
            patient = replace(patient, differentiable=False)  # told once is enough
    return Diagnosis(tuple(findings))


def _found(label: str, examination: Callable[[Patient], Result], patient: Patient) -> Finding:
    try:
        return Finding(label, *examination(patient))
    except _FAULTS as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        told = first_line if isinstance(error, ValueError) else f"it fails with {type(error).__name__}: {first_line}"
        return Finding(label, "broken", told)
