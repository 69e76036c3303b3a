"""Random tabular MDPs (Duan et al., 2016, arXiv:1611.02779, section 3.2; Osband et al., 2013, arXiv:1306.0940)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metafit.data.randomness import derive, normal, uniform
from metafit.rl.actions import Actions
from metafit.rl.family import Family


class MDP(NamedTuple):
    """
    Attributes:
        transition: probabilities of the next state ``(N, S, A, S)``.
        reward: its mean ``(N, S, A)``; the reward is normal with variance 1.
    """

    transition: Tensor
    reward: Tensor


class Tabular(Family):
    """Small random MDPs, seen as states. Transitions are uniform over distributions, mean rewards normal N(1, 1).

    Every episode starts in state 0; a state is seen as a one-hot vector.
    """

    name = "tabular"

    def __init__(self, states: int = 10, actions: int = 5, horizon: int = 10, episodes: int = 10):
        self.observations, self.actions, self.horizon, self.episodes = states, Actions(actions), horizon, episodes

    def draw(self, key: Tensor) -> MDP:
        states, actions = self.observations, self.actions.size
        places = derive(derive(key, 0)[:, None], torch.arange(states * actions * states))
        weight = -(1 - uniform(places, 0.0, 1.0)).log()  # exponential numbers over their sum: a flat Dirichlet
        weight = weight.view(-1, states, actions, states)
        reward = 1 + normal(derive(key, 1), states * actions).view(-1, states, actions)
        return MDP(weight / weight.sum(-1, keepdim=True), reward.to(weight.dtype))

    def reset(self, params: MDP, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        state = torch.zeros(len(params.reward), dtype=torch.int64)
        return state, self._seen(state, params.reward)

    def step(
        self, params: MDP, state: Tensor, action: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = torch.arange(len(state))
        mean, probabilities = params.reward[n, state, action], params.transition[n, state, action]
        reward = mean + torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        drawn = torch.rand(mean.shape, generator=generator, dtype=mean.dtype)[:, None]
        after = (probabilities.cumsum(-1) < drawn).sum(-1).clamp_max(self.observations - 1)
        return after, self._seen(after, mean), reward

    def _seen(self, state: Tensor, like: Tensor) -> Tensor:
        return F.one_hot(state, self.observations).to(like.dtype)
