"""Estimators: each turns rollouts and a reward into gradients of the adapter, one file each."""

from alignprop.estimators.alignprop import AlignProp
from alignprop.estimators.as_released import AsReleased
from alignprop.estimators.base import Descent, Estimate, Estimator, MicroBatch, OneBackward, RewardGradient, Step
from alignprop.estimators.ddpo import DDPO
from alignprop.estimators.draft_k import DraftK
from alignprop.estimators.draft_lv import DraftLV
from alignprop.estimators.drtune import DRTune
from alignprop.estimators.flowbp import FlowBPSparse
from alignprop.estimators.leapalign import LeapAlign
from alignprop.estimators.refl import ReFL
from alignprop.estimators.rwr import RWR

__all__ = [
    "DDPO",
    "RWR",
    "AlignProp",
    "AsReleased",
    "DRTune",
    "Descent",
    "DraftK",
    "DraftLV",
    "Estimate",
    "Estimator",
    "FlowBPSparse",
    "LeapAlign",
    "MicroBatch",
    "OneBackward",
    "ReFL",
    "RewardGradient",
    "Step",
]
