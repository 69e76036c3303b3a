"""Gradient descent, with a fixed or a meta-learned rate."""

from __future__ import annotations

import torch
from torch import nn

from metafit.context import Context
from metafit.errors import BadInput
from metafit.optim.base import MetaOptimizer, Params, State


class SGD(MetaOptimizer):
    """θ' = θ − α·v with v' = μ·v + g: without momentum, the inner rule of MAML (Finn et al., 2017, arXiv:1703.03400,
    eq. 1); with it, heavy-ball momentum (Polyak, 1964), as in torch.optim.

    Args:
        rate: α.
        learned: whether α is a meta-parameter.
        momentum: μ, 0 or more, and less than 1.
    """

    def __init__(self, rate: float = 0.01, learned: bool = False, momentum: float = 0.0):
        super().__init__()
        if not 0 <= momentum < 1:
            raise BadInput(f"momentum {momentum}: needs 0 or more, and less than 1")
        self.rate = nn.Parameter(torch.tensor(float(rate)), requires_grad=learned)
        self.momentum = momentum

    def init(self, params: Params) -> State:
        return {name: torch.zeros_like(value) for name, value in params.items()} if self.momentum else ()

    def update(self, params: Params, grads: Params, state: State, context: Context) -> tuple[Params, State]:
        if self.momentum:
            grads = state = {name: self.momentum * state[name] + grad for name, grad in grads.items()}
        return {name: value - self.rate * grads[name] for name, value in params.items()}, state
