"""Rates and weight decay that are generated for each task and step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metafit.context import Context
from metafit.optim.base import MetaOptimizer, Params, State


class ALFA(MetaOptimizer):
    """θ' = β∘θ − α∘g, with α and β of each layer generated from the state of the adaptation (Baik et al., 2020,
    arXiv:2011.00209, eq. 4 to 6).

    The state is the mean of each layer's parameters and of its gradients; the gradients count as given there, as in
    the paper: what a changed state would change is not differentiated through them. The generator's last layer starts
    at zero, so that the rule starts as gradient descent: α = rate·(1 + a) and β = 1 − b, with (a, b) generated.

    Args:
        params: the parameters that will adapt; only their names are used.
        steps: inner steps that have base rates of their own; later steps take the last.
        rate: the base rates at the start; they are learned, as in MAML++.
        through_state: differentiate through the gradients in the state, too.
    """

    def __init__(self, params: Params, steps: int, rate: float = 0.01, through_state: bool = False):
        super().__init__()
        layers = len(params)
        self.names, self.through_state = tuple(params), through_state
        self.rates = nn.Parameter(torch.full((steps, layers), float(rate)))
        self.generator = nn.Sequential(nn.Linear(2 * layers, 2 * layers), nn.ReLU(), nn.Linear(2 * layers, 2 * layers))
        for parameter in self.generator[2].parameters():
            nn.init.zeros_(parameter)

    def update(self, params: Params, grads: Params, state: State, context: Context) -> tuple[Params, State]:
        means = [[part[name].mean() for name in self.names] for part in (params, grads)]
        weights, gradients = (torch.stack(part) for part in means)
        gradients = gradients if self.through_state else gradients.detach()
        a, b = self.generator(torch.cat([weights, gradients])).chunk(2)
        rates: Tensor = self.rates[min(context.step, len(self.rates) - 1)] * (1 + a)
        scaled = zip(self.names, rates.unbind(), (1 - b).unbind(), strict=True)
        return {name: beta * params[name] - alpha * grads[name] for name, alpha, beta in scaled}, state
