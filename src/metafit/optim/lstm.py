"""A recurrent network as the update rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metafit.context import Context
from metafit.errors import BadInput
from metafit.optim.base import MetaOptimizer, Params, State

_SMALLEST = 10.0  # p: gradients below e^-p are told by their value, not by the logarithm of their size


class LSTMOptimizer(MetaOptimizer):
    """θ' = θ − α·g + r·f(g, h), with f an LSTM that all coordinates share, each with its own state h (Andrychowicz et
    al., 2016, arXiv:1606.04474, section 2.1; the gradient's preprocessing is that of appendix A).

    The last layer of f starts at zero: the rule starts as gradient descent of rate α, which is learned, too. What it
    reads of the gradient counts as given, as in the paper. It is for parameters of any shape and number: a rule that
    was trained on one network runs on another, for as many steps as one likes; how well is measured in
    benchmarks/RESULTS.md.

    Args:
        hidden: size of the state of a coordinate, of each of the two layers.
        rate: α at the start.
        scale: r, which keeps the first updates small.
        through_state: differentiate through what f reads, too.
    """

    def __init__(self, hidden: int = 20, rate: float = 0.01, scale: float = 0.1, through_state: bool = False):
        super().__init__()
        if hidden < 1:
            raise BadInput(f"hidden {hidden}: needs at least 1")
        self.rate = nn.Parameter(torch.tensor(float(rate)))
        self.cells = nn.ModuleList([_Cell(2, hidden), _Cell(hidden, hidden)])
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.hidden, self.scale, self.through_state = hidden, scale, through_state

    def init(self, params: Params) -> State:
        def zeros(value: Tensor) -> Tensor:
            return value.new_zeros(value.numel(), self.hidden)

        return {name: tuple((zeros(value), zeros(value)) for _ in self.cells) for name, value in params.items()}

    def update(self, params: Params, grads: Params, state: State, context: Context) -> tuple[Params, State]:
        new, after = {}, {}
        for name, value in params.items():
            grad = grads[name].flatten()
            z, kept = logarithmic(grad if self.through_state else grad.detach()), []
            for cell, before in zip(self.cells, state[name], strict=True):
                kept.append(cell(z, *before))
                z = kept[-1][0]
            change = self.scale * self.out(z).view(value.shape)
            new[name], after[name] = value - self.rate * grads[name] + change, tuple(kept)
        return new, after


def logarithmic(grad: Tensor) -> Tensor:
    """(log|g|/p, sign g) where |g| ≥ e^−p, else (−1, e^p·g): of shape ``(N, 2)``, both within about ±1.

    >>> logarithmic(torch.tensor([math.e, 0.0]))
    tensor([[ 0.1000,  1.0000],
            [-1.0000,  0.0000]])
    """
    large = grad.abs() >= math.exp(-_SMALLEST)
    size = torch.where(large, grad.abs(), 1.0).log() / _SMALLEST
    first = torch.where(large, size, -1.0)
    return torch.stack([first, torch.where(large, grad.sign(), math.exp(_SMALLEST) * grad)], -1)


class _Cell(nn.Module):
    """An LSTM cell written out: the fused one has no second derivative under vmap."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.gates = nn.Linear(inputs + hidden, 4 * hidden)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, o, g = self.gates(torch.cat([x, h], -1)).chunk(4, -1)
        c = (f + 1).sigmoid() * c + i.sigmoid() * g.tanh()  # remembers, at the start
        return o.sigmoid() * c.tanh(), c
