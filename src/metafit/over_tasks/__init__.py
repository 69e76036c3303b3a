"""Runs a function written for one task over a batch of tasks."""

from metafit.over_tasks.double_backward import double_backward
from metafit.over_tasks.gradient import meta_gradient
from metafit.over_tasks.run import Backend, over_tasks

__all__ = ["Backend", "double_backward", "meta_gradient", "over_tasks"]
