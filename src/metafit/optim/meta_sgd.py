"""One learned rate per parameter element."""

from __future__ import annotations

import torch

from metafit.context import Context
from metafit.errors import BadInput
from metafit.optim.base import MetaOptimizer, Params, State, by_name, of


class MetaSGD(MetaOptimizer):
    """θ' = θ − α∘g, with α of the shape of θ, learned (Li et al., 2017, arXiv:1707.09835, eq. 2).

    Args:
        params: the parameters that will adapt; only their names and shapes are used.
        rate: every element's first rate, or (low, high), from which each is drawn uniformly, as in the paper.
    """

    def __init__(self, params: Params, rate: float | tuple[float, float] = 0.01):
        super().__init__()
        low, high = (rate, rate) if isinstance(rate, (int, float)) else rate
        if not low <= high:
            raise BadInput(f"rate {rate}: a range needs its lower end first")
        self.rates = by_name({name: torch.empty_like(value).uniform_(low, high) for name, value in params.items()})

    def update(self, params: Params, grads: Params, state: State, context: Context) -> tuple[Params, State]:
        return {name: value - of(self.rates, name) * grads[name] for name, value in params.items()}, state
