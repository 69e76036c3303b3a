"""Adam, differentiable."""

from __future__ import annotations

import torch
from torch import nn

from metafit.context import Context
from metafit.errors import BadInput
from metafit.optim.base import MetaOptimizer, Params, State

Moments = tuple[Params, Params]


class Adam(MetaOptimizer):
    """θ' = θ − α·m̂ / (√(v̂ + ε₀) + ε) (Kingma and Ba, 2015, arXiv:1412.6980, algorithm 1).

    Args:
        rate: α.
        learned: whether α is a meta-parameter.
        betas: decay of the first and of the second moment, each 0 or more, and less than 1.
        epsilon: ε.
        inside: ε₀; above 0, so that the derivative of the root is finite where a gradient is 0.
    """

    def __init__(
        self,
        rate: float = 0.01,
        learned: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        inside: float = 1e-12,
    ):
        super().__init__()
        if not all(0 <= beta < 1 for beta in betas):
            raise BadInput(f"betas {betas}: each needs 0 or more, and less than 1")
        self.rate = nn.Parameter(torch.tensor(float(rate)), requires_grad=learned)
        self.betas, self.epsilon, self.inside = betas, epsilon, inside

    def init(self, params: Params) -> Moments:
        zeros = {name: torch.zeros_like(value) for name, value in params.items()}
        return zeros, zeros

    def update(self, params: Params, grads: Params, state: State, context: Context) -> tuple[Params, State]:
        first, second = self.betas
        m = {name: first * state[0][name] + (1 - first) * grad for name, grad in grads.items()}
        v = {name: second * state[1][name] + (1 - second) * grad.square() for name, grad in grads.items()}
        t = context.step + 1

        def moved(name: str) -> torch.Tensor:
            root = (v[name] / (1 - second**t) + self.inside).sqrt() + self.epsilon
            return params[name] - self.rate * m[name] / (1 - first**t) / root

        return {name: moved(name) for name in params}, (m, v)
