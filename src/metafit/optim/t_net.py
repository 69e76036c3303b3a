"""Gradients warped by a learned layer after each layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metafit.context import Context
from metafit.optim.base import MetaOptimizer, Params, State, by_name, of


class TNet(MetaOptimizer):
    """θ' = θ − α·T·Tᵀ·g over the outputs of each layer, with T learned and first the identity.

    In a T-net (Lee and Choi, 2018, arXiv:1801.05558) each layer W is followed by a linear layer T that does not adapt.
    Both act as one layer T·W, and a step on W moves that by −α·T·Tᵀ·g, with g its own gradient: the network stays as it
    is, and the rule holds T (a warp layer of WarpGrad, Flennerhag et al., 2020, arXiv:1909.00025, that is linear).
    A layer's weight and bias share their T; a single number, such as a scale, has none.

    Args:
        params: the parameters that will adapt; only their names and shapes are used.
        rate: α.
        learned: whether α is a meta-parameter.
    """

    def __init__(self, params: Params, rate: float = 0.01, learned: bool = False):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(float(rate)), requires_grad=learned)
        warped = {_outputs(name, value): value for name, value in params.items() if value.dim()}
        self.warps = by_name({name: torch.eye(len(value), dtype=value.dtype) for name, value in warped.items()})

    def update(self, params: Params, grads: Params, state: State, context: Context) -> tuple[Params, State]:
        def warped(name: str) -> Tensor:
            grad = grads[name]
            if not grad.dim():
                return grad
            warp = of(self.warps, _outputs(name, grad))
            return (warp @ (warp.mT @ grad.reshape(len(warp), -1))).reshape(grad.shape)

        return {name: value - self.rate * warped(name) for name, value in params.items()}, state


def _outputs(name: str, value: Tensor) -> str:
    """What shares a warp: the tensors of a layer that have as many rows."""
    return f"{name.rpartition('.')[0] or name}.{len(value)}"
