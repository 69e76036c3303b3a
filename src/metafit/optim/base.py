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
