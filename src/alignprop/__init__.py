"""Align diffusion models by backpropagating a reward through their sampling chain (AlignProp, arXiv 2310.03739)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignprop import emoji
    from alignprop.adapter_files import load_adapter
    from alignprop.adapters import Adapter, Full, Lora
    from alignprop.checkpointing import Checkpoints, load_checkpoint, save_checkpoint
    from alignprop.estimators import (
        DDPO,
        RWR,
        AlignProp,
        AsReleased,
        DraftK,
        DraftLV,
        DRTune,
        Estimate,
        Estimator,
        FlowBPSparse,
        LeapAlign,
        ReFL,
    )
    from alignprop.evaluation import Evaluation
    from alignprop.guard import Guard
    from alignprop.measures import evaluate
    from alignprop.optimisation import Optimizer
    from alignprop.probe import probe
    from alignprop.regularisation import Regularisation
    from alignprop.report import write_report
    from alignprop.rewards import REWARDS, Reward, WeightedSum, load_reward
    from alignprop.rollout import Rollout, Sampler, rollout
    from alignprop.runfolder import RunFolder
    from alignprop.spec import PipelineSpec, spec_of
    from alignprop.tracking import MetricsFile
    from alignprop.trainer import Callback, Trainer
    from alignprop.truncation import All, Gaussian, Last, Truncation, Uniform

__version__ = "0.1.0"

_HOMES = {
    "adapter_files": ("load_adapter",),
    "adapters": ("Adapter", "Full", "Lora"),
    "checkpointing": ("Checkpoints", "load_checkpoint", "save_checkpoint"),
    "estimators": (
        "AlignProp",
        "AsReleased",
        "DDPO",
        "DRTune",
        "DraftK",
        "DraftLV",
        "Estimate",
        "Estimator",
        "FlowBPSparse",
        "LeapAlign",
        "RWR",
        "ReFL",
    ),
    "evaluation": ("Evaluation",),
    "guard": ("Guard",),
    "measures": ("evaluate",),
    "optimisation": ("Optimizer",),
    "probe": ("probe",),
    "regularisation": ("Regularisation",),
    "report": ("write_report",),
    "rewards": ("REWARDS", "Reward", "WeightedSum", "load_reward"),
    "rollout": ("Rollout", "Sampler", "rollout"),
    "runfolder": ("RunFolder",),
    "spec": ("PipelineSpec", "spec_of"),
    "tracking": ("MetricsFile",),
    "trainer": ("Callback", "Trainer"),
    "truncation": ("All", "Gaussian", "Last", "Truncation", "Uniform"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022  # in the order of a first reading
    "rollout",
    "Rollout",
    "Sampler",
    "All",
    "Last",
    "Uniform",
    "Gaussian",
    "Guard",
    "Truncation",
    "AlignProp",
    "AsReleased",
    "DraftK",
    "DraftLV",
    "ReFL",
    "DRTune",
    "LeapAlign",
    "FlowBPSparse",
    "DDPO",
    "RWR",
    "Estimator",
    "Estimate",
    "Adapter",
    "Lora",
    "Full",
    "load_adapter",
    "REWARDS",
    "Reward",
    "WeightedSum",
    "load_reward",
    "probe",
    "Trainer",
    "Optimizer",
    "Regularisation",
    "Callback",
    "Evaluation",
    "evaluate",
    "Checkpoints",
    "load_checkpoint",
    "save_checkpoint",
    "MetricsFile",
    "RunFolder",
    "write_report",
    "PipelineSpec",
    "spec_of",
    "emoji",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: the command line's help must not wait for torch."""
    if name == "emoji":
        return importlib.import_module("alignprop.emoji")
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"alignprop.{_HOME_OF[name]}"), name)
        globals()[name] = value  # a submodule of the same name (rollout, probe) would hide it
        return value
    raise AttributeError(f"module 'alignprop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
