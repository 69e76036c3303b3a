"""A small network as the update rule, which sees momentum and Adam's features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metafit.context import Context
from metafit.errors import BadInput
from metafit.optim.base import MetaOptimizer, Params, State

_DECAYS = (0.5, 0.9, 0.99)
_SQUARES = 0.99
_EPSILON = 1e-8


class MLPOptimizer(MetaOptimizer):
    """θ' = θ − α·g + r·d·exp(r·s), with direction d and size s from a network over each coordinate's features (the
    "small_fc_lopt" of Metz et al., 2022, arXiv:2203.11860, section 2.2, with fewer features).

    The features are the gradient, three momenta, the square root of the second moment, the gradient and the momenta
    over that root, and the parameter: each divided by its own root mean square over the tensor, and the step. They
    count as given. The last layer starts at zero: the rule starts as gradient descent of rate α, which is learned, too.

    Args:
        hidden: units of the two hidden layers.
        rate: α at the start.
        scale: r.
        through_state: differentiate through the features, too.
    """

    def __init__(self, hidden: int = 32, rate: float = 0.01, scale: float = 0.1, through_state: bool = False):
        super().__init__()
        if hidden < 1:
            raise BadInput(f"hidden {hidden}: needs at least 1")
        self.rate = nn.Parameter(torch.tensor(float(rate)))
        features = 2 * (1 + len(_DECAYS)) + 3
        last = nn.Linear(hidden, 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last)
        self.scale, self.through_state = scale, through_state

    def init(self, params: Params) -> State:
        return {name: value.new_zeros(*value.shape, len(_DECAYS) + 1) for name, value in params.items()}

    def update(self, params: Params, grads: Params, state: State, context: Context) -> tuple[Params, State]:
        new, after = {}, {}
        for name, value in params.items():
            seen = (value, grads[name]) if self.through_state else (value.detach(), grads[name].detach())
            after[name] = _moments(seen[1], state[name])
            direction, size = self.network(_features(*seen, after[name], context.step)).unbind(-1)
            change = self.scale * direction * (self.scale * size).exp()
            new[name] = value - self.rate * grads[name] + change
        return new, after


def _moments(grad: Tensor, before: Tensor) -> Tensor:
    decays = before.new_tensor([*_DECAYS, _SQUARES])
    seen = torch.stack([grad] * len(_DECAYS) + [grad.square()], -1)
    return decays * before + (1 - decays) * seen


def _features(value: Tensor, grad: Tensor, moments: Tensor, step: int) -> Tensor:
    momenta, root = moments[..., :-1], (moments[..., -1:] + _EPSILON).sqrt()
    first_order = torch.cat([grad[..., None], momenta], -1)
    raw = torch.cat([first_order, first_order / root, root, value[..., None]], -1)
    square = raw.reshape(-1, raw.shape[-1]).square().mean(0)  # of each feature, of a single number too
    normal = raw * torch.rsqrt(square + _EPSILON)
    time = torch.full_like(root, step).div(10).tanh()
    return torch.cat([normal, time], -1)
