"""The one entry for training: the gradient of the mean loss over a batch of tasks."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metafit.over_tasks.double_backward import double_backward
from metafit.over_tasks.run import Backend, chunk_size, over_tasks, vmappable
from metafit.task import Task, count, take


def meta_gradient(
    learner: nn.Module, tasks: Task, backend: Backend = "auto", chunk: int | Literal["auto"] | None = "auto"
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Mean query loss over a batch of tasks, and its gradient in the meta-parameters.

    Chunks of tasks go forward and backward one after another, so that memory holds one chunk's graph at a time.

    Args:
        learner: a ``Learner``; its ``loss(task)`` is differentiated, twice where it says ``second_order``.
        tasks: a batch of T tasks.
        backend, chunk: as in ``over_tasks``.

    Returns:
        The mean loss ``()``, the mean of each metric ``()``, and the gradient of every parameter that requires one
        (zeros where the loss does not depend on it), by name.
    """
    parameters = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    total = count(tasks)
    looped = backend == "loop" or (backend == "auto" and not vmappable(learner.loss))  # type: ignore[arg-type]

    def differentiable(vmapped: bool) -> contextlib.AbstractContextManager[None]:
        return double_backward(vmapped) if getattr(learner, "second_order", False) else contextlib.nullcontext()

    with differentiable(vmapped=False):
        size = 1 if looped else chunk_size(learner.loss, tasks, chunk)  # type: ignore[arg-type]
    loss_sum: Any = 0.0
    metric_sums: dict[str, Tensor] = {}
    gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for start in range(0, total, size):
        piece = take(tasks, slice(start, start + size))
        with differentiable(vmapped=size > 1):
            losses, metrics = over_tasks(learner.loss, piece, "loop" if size == 1 else backend, None)  # type: ignore[arg-type]
            loss = losses.sum()
            if parameters and loss.requires_grad:
                parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for accumulated, part in zip(gradients.values(), parts, strict=True):
                    if part is not None:
                        accumulated += part
        loss_sum = loss_sum + loss.detach()
        sums = tree_map(lambda m: m.detach().sum(0), metrics)
        metric_sums = {name: metric_sums.get(name, 0) + value for name, value in sums.items()}
    return (
        loss_sum / total,
        {name: value / total for name, value in metric_sums.items()},
        {name: g / total for name, g in gradients.items()},
    )
