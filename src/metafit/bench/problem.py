"""One outer step of MAML that every contender runs: the same network, tasks, rule and numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metafit.task import Task, take

Gradient = tuple[Tensor, dict[str, Tensor]]  # the mean query loss over the tasks, and its gradient by name
Step = Callable[[], Gradient]


class Problem(NamedTuple):
    """Second-order MAML over a batch of tasks.

    Attributes:
        network: its children are ``body`` and ``head``; parameters are known by their names here.
        way: classes, or ``None`` for regression.
        tasks: T tasks in which every example counts.
        steps, rate: inner steps of gradient descent on all parameters that require a gradient.
        chunk: tasks at a time, for a peer that wants to be told.
        scope: what ``GradientLearner`` calls the parameters that adapt.
    """

    network: nn.Sequential
    way: int | None
    tasks: Task
    steps: int
    rate: float
    chunk: int
    scope: str = "all"

    @property
    def criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        return F.mse_loss if self.way is None else F.cross_entropy

    def exact(self, tasks: int | None = None) -> Problem:
        """The same in float64, for the first tasks only (or all of them)."""
        some = tree_map(
            lambda leaf: leaf.double() if leaf is not None and leaf.is_floating_point() else leaf,
            take(self.tasks, slice(tasks)),
        )
        return self._replace(network=copy.deepcopy(self.network).double(), tasks=some)


def distance(found: Gradient, reference: Gradient) -> float:
    """How far a loss and gradient are from the reference: the larger of the two relative distances."""
    return max(_relative({"loss": found[0]}, {"loss": reference[0]}), _relative(found[1], reference[1]))


def _relative(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    if found.keys() != reference.keys():
        return float("inf")
    flat = [torch.cat([part[name].detach().double().flatten() for name in reference]) for part in (found, reference)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())
