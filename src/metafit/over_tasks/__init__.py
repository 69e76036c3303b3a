"""Runs a function written for one task over a batch of tasks."""

from metafit.over_tasks.choice import plan_for
from metafit.over_tasks.compiled import compiles
from metafit.over_tasks.double_backward import double_backward
from metafit.over_tasks.gradient import meta_gradient
from metafit.over_tasks.inner import inner_gradient, mixed_mode
from metafit.over_tasks.plan import Backend, Plan
from metafit.over_tasks.run import over_tasks

__all__ = [
    "Backend",
    "Plan",
    "compiles",
    "double_backward",
    "inner_gradient",
    "meta_gradient",
    "mixed_mode",
    "over_tasks",
    "plan_for",
]
