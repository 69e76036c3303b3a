"""Gradient descent, with a fixed or a meta-learned rate."""

from __future__ import annotations

import torch
from torch import nn

from metafit.context import Context
from metafit.optim.base import MetaOptimizer, Params, State


class SGD(MetaOptimizer):
    """θ' = θ − α·g, the inner rule of MAML (Finn et al., 2017, arXiv:1703.03400, eq. 1).

    Args:
        rate: α.
        learned: whether α is a meta-parameter.
    """

    def __init__(self, rate: float = 0.01, learned: bool = False):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(float(rate)), requires_grad=learned)

    def update(self, params: Params, grads: Params, state: State, context: Context) -> tuple[Params, State]:
        return {name: value - self.rate * grads[name] for name, value in params.items()}, state
