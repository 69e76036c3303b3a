"""Losses, for the inner loop and the outer one: from outputs, targets and weights to a scalar."""

from metafit.losses.base import Loss
from metafit.losses.plain import CrossEntropy, SquaredError

__all__ = ["CrossEntropy", "Loss", "SquaredError"]
