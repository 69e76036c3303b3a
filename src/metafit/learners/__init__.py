"""Learners: from a support set to a predictor."""

from metafit.learners.base import Adapted, Learner, check_tasks
from metafit.learners.catalog import ENTRIES, Entry, build, entry
from metafit.learners.gradient import GradientLearner
from metafit.learners.linear import LinearLearner
from metafit.learners.lora import low_rank
from metafit.learners.neighbours import NeighbourLearner
from metafit.learners.prototype import PrototypeLearner

__all__ = [
    "ENTRIES",
    "Adapted",
    "Entry",
    "GradientLearner",
    "Learner",
    "LinearLearner",
    "NeighbourLearner",
    "PrototypeLearner",
    "build",
    "check_tasks",
    "entry",
    "low_rank",
]
