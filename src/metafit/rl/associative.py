"""RL² that remembers transitions as a set, bound to where they were made."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafit.rl.actions import Actions
from metafit.rl.in_context import InContextAgent

Memory = dict[str, Tensor]


class AssociativeAgent(InContextAgent):
    """Sums over the transitions of a trial: of all of them, and of those made where the agent is now.

    What a transition tells of an environment does not depend on when it was made, so that a sum over them is memory
    enough (Rakelly et al., 2019, arXiv:1903.08254, section 4.2). The second sum is what fast weights M = Σ v kᵀ say of
    the present observation (Schlag et al., 2021, arXiv:2102.11174, section 3.2, without their feature map): k is a
    direction made from where a transition began, v is bilinear in the transition. With one-hot observations and
    actions, the counts and the summed rewards of each action in this state are such values. Of an environment that
    changes within a trial it forgets nothing: take another agent there.

    Args:
        width: of the network that decides.
        keys, values: sizes of k and v.
    """

    def __init__(
        self, observations: int, actions: Actions, width: int = 64, keys: int = 32, values: int = 64, **training: Any
    ):
        super().__init__(observations, actions, width, **training)
        self.key = nn.Parameter(nn.init.orthogonal_(torch.empty(observations, keys)))
        self.value = nn.Linear(self.percepts + observations, 2 * values)
        self.decision = nn.Sequential(
            nn.Linear(self.percepts + 2 * values, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )

    def begin(self, n: int) -> Memory:
        """The fast weights and the sum of all values ``(n, keys + 1, values)``, and the observation before."""
        (observations, keys), values = self.key.shape, self.value.out_features // 2
        return {
            "bound": self.key.new_zeros(n, keys + 1, values),
            "before": self.key.new_zeros(n, observations),
        }

    def unroll(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        if not len(x):
            return x.new_zeros(0, self.width), memory
        here = x[:, : self.observations]
        before = torch.cat([memory["before"][None], here[:-1]])
        keys, values, asked = self._key(before), self._value(before, x), self._key(here)
        near = (asked @ keys.mT).tril() @ values + asked @ memory["bound"][:-1]
        overall = values.cumsum(0) + memory["bound"][-1]
        bound = memory["bound"] + torch.cat([keys, torch.ones_like(keys[:, :1])], -1).mT @ values
        return self._decide(x, near, overall), {"bound": bound, "before": here[-1]}

    def remember(self, memory: Memory, x: Tensor) -> tuple[Tensor, Memory]:
        here, before = x[:, : self.observations], memory["before"]
        keys = self._key(before)
        keys = torch.cat([keys, torch.ones_like(keys[:, :1])], -1)
        bound = memory["bound"] + keys[:, :, None] * self._value(before, x)[:, None]
        near = (self._key(here)[:, None] @ bound[:, :-1])[:, 0]
        return self._decide(x, near, bound[:, -1]), {"bound": bound, "before": here}

    def _key(self, observation: Tensor) -> Tensor:
        return F.normalize(observation @ self.key, dim=-1)

    def _value(self, before: Tensor, x: Tensor) -> Tensor:
        one, other = self.value(torch.cat([x, before], -1)).chunk(2, -1)
        return one * other

    def _decide(self, x: Tensor, near: Tensor, overall: Tensor) -> Tensor:
        return self.decision(torch.cat([x, torch.asinh(near), torch.asinh(overall)], -1))
