"""The meta-gradient of a piece of a batch, and the sum of pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metafit.over_tasks.run import over_tasks
from metafit.task import Task


class Part(NamedTuple):
    """Sums over the tasks of a piece; a gradient is ``None`` where the loss does not depend on the parameter."""

    loss: Tensor
    metrics: dict[str, Tensor]
    gradients: list[Tensor | None]


def part_of(
    loss: Callable[[Task], Any],
    parameters: Sequence[Tensor],
    piece: Task,
    backend: Literal["loop", "vmap"],
    scale: Tensor | None = None,
) -> Part:
    """One piece's sums: ``loss`` gives the loss and the metrics of one task, by way of the parameters.

    The gradient, not the loss, is ``scale`` times what it is: half precision does not hold small numbers.
    """
    losses, metrics = over_tasks(loss, piece, backend, None)
    total = losses.sum()
    gradients: Sequence[Tensor | None] = [None] * len(parameters)
    if parameters and total.requires_grad:
        scaled = total if scale is None else total * scale
        gradients = _gathered(scaled, parameters) if any(map(sharded, parameters)) else _grad(scaled, parameters)
    return Part(total.detach(), tree_map(lambda m: m.detach().sum(0), metrics), list(gradients))


def sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a share of it (a ``DTensor``, as FSDP makes them)."""
    return hasattr(tensor, "full_tensor")


def _grad(total: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return torch.autograd.grad(total, parameters, allow_unused=True)


def _gathered(total: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Those of sharded parameters are the mean over the ranks: FSDP takes it where ``backward`` leaves a gradient."""
    _clear(parameters)
    total.backward()
    gradients = [p.grad for p in parameters]
    _clear(parameters)
    return gradients


def _clear(parameters: Sequence[Tensor]) -> None:
    for p in parameters:
        p.grad = None


def add(a: Part, b: Part) -> Part:
    gradients = [y if x is None else x if y is None else x + y for x, y in zip(a.gradients, b.gradients, strict=True)]
    return Part(a.loss + b.loss, {name: value + b.metrics[name] for name, value in a.metrics.items()}, gradients)
