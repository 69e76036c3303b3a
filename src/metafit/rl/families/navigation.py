"""A point in the plane that is to go to a place it is not told (Finn et al., 2017, arXiv:1703.03400, section 5.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from metafit.data.randomness import derive, uniform
from metafit.rl.actions import Actions
from metafit.rl.family import Family


class Navigation(Family):
    """A point in the plane with a goal that is not shown. The goal is uniform in [-½, ½]²; a step goes at most 0.1
    along each axis; the reward is minus the distance.

    The agent starts at the origin and sees where it is.
    """

    name, observations, actions = "navigation", 2, Actions(2, discrete=False)

    def __init__(self, horizon: int = 100, episodes: int = 2):
        self.horizon, self.episodes = horizon, episodes

    def draw(self, key: Tensor) -> Tensor:
        """The goals ``(N, 2)``."""
        return uniform(derive(key[:, None], torch.arange(2)), -0.5, 0.5)

    def reset(self, params: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        place = torch.zeros_like(params)
        return place, place

    def step(
        self, params: Tensor, state: Tensor, action: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        place = state + action.clamp(-0.1, 0.1)
        return place, place, -(place - params).norm(dim=-1)

    def place(self, state: Tensor) -> Tensor:
        return state

    def goal(self, params: Tensor) -> Tensor:
        return params
