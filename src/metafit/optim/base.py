"""The interface of update rules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metafit.context import Context

Params = dict[str, Tensor]
State = Any


class MetaOptimizer(nn.Module):
    """An update rule as a pure pair, ``init`` and ``update``; its own parameters are meta-parameters."""

    def init(self, params: Params) -> State:
        """The state before the first step of a task; a pytree of tensors."""
        return ()

    def update(self, params: Params, grads: Params, state: State, context: Context) -> tuple[Params, State]:
        """New parameters and state; differentiable in everything that it is given, nothing changed in place."""
        raise NotImplementedError


def by_name(values: Params) -> nn.ParameterDict:
    """Learned tensors of the names of the parameters that adapt; read them by ``of``."""
    return nn.ParameterDict({name.replace(".", "/"): nn.Parameter(value) for name, value in values.items()})


def of(learned: nn.ParameterDict, name: str) -> Tensor:
    """
    >>> import torch
    >>> of(by_name({"body.weight": torch.ones(1)}), "body.weight").tolist()
    [1.0]
    """
    found: Tensor = learned[name.replace(".", "/")]  # a ParameterDict's keys may not hold dots
    return found
