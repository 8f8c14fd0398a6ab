"""Gradient estimators: each turns rollouts and a reward into gradients of the adapter, one file each."""

from alignprop.estimators.alignprop import AlignProp
from alignprop.estimators.base import Estimate, Estimator

__all__ = ["AlignProp", "Estimate", "Estimator"]
