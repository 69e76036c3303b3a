"""Defences against overfitting on few examples, around any update rule."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from metafit.context import Context
from metafit.errors import BadInput
from metafit.optim.base import MetaOptimizer, Params, State

Noise = Literal["gaussian", "bernoulli"]


class DropGrad(MetaOptimizer):
    """While training, the rule sees g∘n with noise n of mean 1 for each element (Tseng et al., 2020, arXiv:2004.05859,
    eq. 5 and 6): n is Bernoulli(1 − p)/(1 − p), or normal with the same variance p/(1 − p).

    Args:
        rule: the update rule.
        rate: p, 0 to 1.
        kind: of the noise.
    """

    def __init__(self, rule: MetaOptimizer, rate: float = 0.1, kind: Noise = "gaussian"):
        super().__init__()
        if not 0 <= rate < 1:
            raise BadInput(f"drop_grad {rate}: needs 0 or more, and less than 1")
        if kind not in get_args(Noise):
            raise BadInput(f"noise {kind!r}: choose {' or '.join(map(repr, get_args(Noise)))}")
        self.rule, self.drop, self.kind = rule, rate, kind

    def init(self, params: Params) -> State:
        return self.rule.init(params)

    def update(self, params: Params, grads: Params, state: State, context: Context) -> tuple[Params, State]:
        if self.training and self.drop:
            grads = {name: grad * self._noise(grad) for name, grad in grads.items()}
        return self.rule.update(params, grads, state, context)

    def _noise(self, like: Tensor) -> Tensor:
        if self.kind == "bernoulli":
            return (torch.rand_like(like) >= self.drop).to(like.dtype) / (1 - self.drop)
        return 1 + torch.randn_like(like) * (self.drop / (1 - self.drop)) ** 0.5


class Proximal(MetaOptimizer):
    """The rule sees g + λ(θ − θ₀): weight decay towards the start (Zhou et al., 2019, Meta-MinibatchProx; the inner
    objective of iMAML, Rajeswaran et al., 2019, arXiv:1909.04630, eq. 3).

    Args:
        rule: the update rule.
        strength: λ.
    """

    def __init__(self, rule: MetaOptimizer, strength: float = 0.1):
        super().__init__()
        if not strength >= 0:
            raise BadInput(f"proximal {strength}: needs 0 or more")
        self.rule, self.strength = rule, strength

    def init(self, params: Params) -> State:
        return params, self.rule.init(params)

    def update(self, params: Params, grads: Params, state: State, context: Context) -> tuple[Params, State]:
        start, inner = state
        pulled = {name: grad + self.strength * (params[name] - start[name]) for name, grad in grads.items()}
        params, inner = self.rule.update(params, pulled, inner, context)
        return params, (start, inner)


class EarlyStop(MetaOptimizer):
    """Once the norm of the whole inner gradient is below a tolerance, the task's parameters stay as they are.

    Args:
        rule: the update rule.
        tolerance: of the norm.
    """

    def __init__(self, rule: MetaOptimizer, tolerance: float = 1e-3):
        super().__init__()
        if not tolerance >= 0:
            raise BadInput(f"early_stop {tolerance}: needs 0 or more")
        self.rule, self.tolerance = rule, tolerance

    def init(self, params: Params) -> State:
        first = next(iter(params.values()))
        return torch.zeros((), dtype=first.dtype, device=first.device), self.rule.init(params)

    def update(self, params: Params, grads: Params, state: State, context: Context) -> tuple[Params, State]:
        stopped, inner = state
        square = torch.stack([grad.detach().square().sum() for grad in grads.values()]).sum()
        stopped = torch.maximum(stopped, (square < self.tolerance**2).to(stopped.dtype))
        moved, inner = self.rule.update(params, grads, inner, context)
        kept = {name: torch.where(stopped > 0, value, moved[name]) for name, value in params.items()}
        return kept, (stopped, inner)
