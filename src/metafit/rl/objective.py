"""The losses of policies: what their gradients estimate is the return."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from metafit.context import Context
from metafit.losses import Loss
from metafit.rl.actions import Actions
from metafit.rl.trial import Decisions
from metafit.task import weighted_mean


class PolicyGradient(Loss):
    """Minus the mean of π(a|x)/π_old(a|x) times the advantage, over decisions that π_old took.

    Its value at π = π_old is the surrogate of the policy gradient, and its second derivative is what credits the
    policy before adaptation for what it found out (ProMP, Rothfuss et al., 2019, arXiv:1810.06784, eq. 8).
    """

    def __init__(self, actions: Actions):
        super().__init__()
        self.actions = actions

    def forward(self, outputs: Tensor, y: Decisions, weight: Tensor, context: Context) -> Tensor:  # type: ignore[override]
        return -weighted_mean(_ratio(self.actions, outputs, y) * y.advantage, weight)


class ClippedObjective(Loss):
    """PPO: the policy gradient, whose ratio gains nothing beyond 1 ± clip (Schulman et al., 2017, arXiv:1707.06347,
    eq. 7), less a bonus for entropy.

    Args:
        clip: how far the policy may move from the one that took the decisions.
        entropy: weight of its mean entropy.
    """

    def __init__(self, actions: Actions, clip: float = 0.2, entropy: float = 0.0):
        super().__init__()
        self.actions, self.clip, self.entropy = actions, clip, entropy

    def forward(self, outputs: Tensor, y: Decisions, weight: Tensor, context: Context) -> Tensor:  # type: ignore[override]
        ratio = _ratio(self.actions, outputs, y)
        least = torch.minimum(ratio * y.advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * y.advantage)
        return -weighted_mean(least + self.entropy * self.actions.entropy(outputs), weight)


def _ratio(actions: Actions, outputs: Tensor, y: Decisions) -> Float[Tensor, " t"]:
    return (actions.log_prob(outputs, y.action) - y.log_prob).exp()
