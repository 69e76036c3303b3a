"""Gradients transformed along each dimension of their tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metafit.context import Context
from metafit.optim.base import MetaOptimizer, Params, State, by_name, of


class MetaCurvature(MetaOptimizer):
    """θ' = θ − α·(g ×₁ M_o ×₂ M_i ×₃ M_f), with learned matrices that start as the identity (Park and Oliva, 2019,
    arXiv:1902.03356, eq. 8 and 9).

    A weight ``(out, in, ...)`` has a matrix over its outputs, one over its inputs, and one over all that follows (the
    places of a convolution's kernel); a vector has one rate per element, as the paper treats biases.

    Args:
        params: the parameters that will adapt; only their names and shapes are used.
        rate: α.
        learned: whether α is a meta-parameter.
    """

    def __init__(self, params: Params, rate: float = 0.01, learned: bool = False):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(float(rate)), requires_grad=learned)
        self.outputs, self.inputs, self.places = map(by_name, _identities(params))

    def update(self, params: Params, grads: Params, state: State, context: Context) -> tuple[Params, State]:
        return {name: value - self.rate * self.transformed(name, grads[name]) for name, value in params.items()}, state

    def transformed(self, name: str, grad: Tensor) -> Tensor:
        """The gradient of a parameter as the rule sees it."""
        if grad.dim() < 2:
            return of(self.outputs, name) * grad
        g = of(self.outputs, name) @ grad.flatten(1)
        g = torch.einsum("ij,ojf->oif", of(self.inputs, name), g.reshape(*grad.shape[:2], -1))
        return (g if grad.dim() == 2 else g @ of(self.places, name).mT).reshape(grad.shape)


def _identities(params: Params) -> tuple[Params, Params, Params]:
    outputs, inputs, places = {}, {}, {}
    for name, value in params.items():
        if value.dim() < 2:
            outputs[name] = torch.ones_like(value)
            continue
        outputs[name], inputs[name] = (torch.eye(value.shape[d], dtype=value.dtype) for d in (0, 1))
        if value.dim() > 2:
            places[name] = torch.eye(value[0, 0].numel(), dtype=value.dtype)
    return outputs, inputs, places
