"""Losses, for the inner loop and the outer one: from outputs, targets and weights to a scalar."""

from metafit.losses.base import Loss
from metafit.losses.contrastive import Contrastive
from metafit.losses.curriculum import Curriculum
from metafit.losses.learned import LearnedLoss
from metafit.losses.metal import MeTAL
from metafit.losses.plain import CrossEntropy, Focal, GaussianNLL, Huber, SquaredError
from metafit.losses.uncertainty import UncertaintyWeights

__all__ = [
    "Contrastive",
    "CrossEntropy",
    "Curriculum",
    "Focal",
    "GaussianNLL",
    "Huber",
    "LearnedLoss",
    "Loss",
    "MeTAL",
    "SquaredError",
    "UncertaintyWeights",
]
