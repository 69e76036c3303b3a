"""One learned rate per layer and inner step."""

from __future__ import annotations

import torch
from torch import nn

from metafit.context import Context
from metafit.optim.base import MetaOptimizer, Params, State


class PerStepSGD(MetaOptimizer):
    """θ' = θ − α[layer, step]·g, with α learned (MAML++, Antoniou et al., 2019, arXiv:1810.09502, section 4, LSLR).

    Args:
        params: the parameters that will adapt; only their names are used.
        steps: inner steps that have rates of their own; later steps take the last.
        rate: the first value of all.
    """

    def __init__(self, params: Params, steps: int, rate: float = 0.01):
        super().__init__()
        self.names = tuple(params)
        self.rates = nn.Parameter(torch.full((steps, len(params)), float(rate)))

    def update(self, params: Params, grads: Params, state: State, context: Context) -> tuple[Params, State]:
        rates = self.rates[min(context.step, len(self.rates) - 1)].unbind()
        return {n: params[n] - rate * grads[n] for n, rate in zip(self.names, rates, strict=True)}, state
