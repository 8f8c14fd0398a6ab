"""Mixtures of adapters in weight-update space: exact or compressed, by denoising step, and swept over their weights."""

from alignprop.mixing.files import StoredAdapter, read_adapter, save_mixture
from alignprop.mixing.schedule import StepWeights, load_mixture, save_schedule
from alignprop.mixing.weightspace import Member, Mixture, mix

__all__ = [
    "Member",
    "Mixture",
    "StepWeights",
    "StoredAdapter",
    "load_mixture",
    "mix",
    "read_adapter",
    "save_mixture",
    "save_schedule",
]
