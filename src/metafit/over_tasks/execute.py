"""Runs a batch of tasks by a plan."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import reduce

from torch import Tensor, nn

from metafit.over_tasks import by_step, compiled
from metafit.over_tasks.double_backward import double_backward
from metafit.over_tasks.inner import mixed_mode
from metafit.over_tasks.part import Part, add, part_of
from metafit.over_tasks.plan import Plan
from metafit.over_tasks.thrift import thriftily
from metafit.task import Task, count, take


def execute(learner: nn.Module, tasks: Task, plan: Plan, scale: Tensor | None = None) -> Part:
    """The sums over the batch, the gradient ``scale`` times itself.

    Its pieces are added in their order, so that one plan gives the same bits each time.
    """

    def run() -> Part:
        return reduce(add, _parts(learner, tasks, plan, scale))

    return thriftily(run) if plan.thrift else run()


def _parts(learner: nn.Module, tasks: Task, plan: Plan, scale: Tensor | None) -> Iterator[Part]:
    total = count(tasks)
    size = min(plan.chunk or total, total)
    pieces = [take(tasks, slice(start, start + size)) for start in range(0, total, size)]
    if plan.by_step:
        yield from by_step.parts(learner, pieces, plan)
        return
    if plan.backend == "compile":
        yield from compiled.parts(learner, pieces, plan)
        return
    parameters = [p for p in learner.parameters() if p.requires_grad]
    for piece in pieces:
        with mixed_mode(plan.mixed), _differentiable(learner, plan.backend == "vmap" or plan.mixed or _half(learner)):
            yield part_of(learner.loss, parameters, piece, plan.backend, scale)  # type: ignore[arg-type]


def _half(learner: nn.Module) -> bool:
    """Whether it differentiates in half precision, forward over backward: normalisation does not keep to one there."""
    return getattr(learner, "precision", "full") == "bf16" and getattr(learner, "outer", None) == "implicit"


def _differentiable(learner: nn.Module, primitives: bool) -> contextlib.AbstractContextManager[None]:
    return double_backward(primitives) if getattr(learner, "second_order", False) else contextlib.nullcontext()
