"""The one entry for training: the gradient of the mean loss over a batch of tasks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from metafit.over_tasks.choice import plan_for
from metafit.over_tasks.execute import execute
from metafit.over_tasks.plan import Backend, Plan
from metafit.task import Task, count


def meta_gradient(
    learner: nn.Module,
    tasks: Task,
    backend: Backend | Plan = "auto",
    chunk: int | Literal["auto"] | None = "auto",
    steps: int = 1,
    scale: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Mean query loss over a batch of tasks, and its gradient in the meta-parameters.

    Chunks of tasks go forward and backward one after another, so that memory holds one chunk's graph at a time.

    Args:
        learner: a ``Learner``; its ``loss(task)`` is differentiated, twice where it says ``second_order``.
        tasks: a batch of T tasks.
        backend, chunk, steps: see ``plan_for``; or a ``Plan`` that it has made.
        scale: what the gradient, not the loss, is multiplied by on its way back; not for generated code.

    Returns:
        The mean loss ``()``, the mean of each metric ``()``, and the gradient of every parameter that requires one
        (zeros where the loss does not depend on it), by name. That of a sharded parameter is the mean over the ranks.
    """
    plan = backend if isinstance(backend, Plan) else plan_for(learner, tasks, backend, chunk, steps)
    total = count(tasks)
    whole = execute(learner, tasks, plan, scale)
    parameters = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    gradients = {
        name: torch.zeros_like(p) if gradient is None else gradient / total
        for (name, p), gradient in zip(parameters.items(), whole.gradients, strict=True)
    }
    return whole.loss / total, {name: value / total for name, value in whole.metrics.items()}, gradients
