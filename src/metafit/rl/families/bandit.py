"""Bandits: arms whose rewards are unknown, a pull is an episode (Duan et al., 2016, arXiv:1611.02779, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from metafit.data.randomness import derive, normal, uniform
from metafit.errors import BadInput
from metafit.rl.actions import Actions
from metafit.rl.family import Family


class _Bandit(Family):
    """
    Args:
        arms: to choose from.
        pulls: of a trial.
    """

    observations, horizon = 0, 1

    def __init__(self, arms: int = 5, pulls: int = 10):
        if arms < 2 or pulls < 1:
            raise BadInput(f"arms {arms}, pulls {pulls}: needs at least 2 arms and 1 pull")
        self.actions, self.episodes = Actions(arms), pulls

    def reset(self, params: Tensor, generator: torch.Generator) -> tuple[tuple[()], Tensor]:
        return (), params.new_zeros(len(params), 0)

    def step(
        self, params: Tensor, state: tuple[()], action: Tensor, generator: torch.Generator
    ) -> tuple[tuple[()], Tensor, Tensor]:
        mean = params.gather(-1, action[:, None])[:, 0]
        return (), params.new_zeros(len(params), 0), self._reward(mean, generator)

    def _reward(self, mean: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


class Bernoulli(_Bandit):
    """Arms that pay 1 or nothing, with unknown probabilities. These ``(N, arms)`` are uniform."""

    name = "bandit"

    def draw(self, key: Tensor) -> Tensor:
        return uniform(derive(key[:, None], torch.arange(self.actions.size)), 0.0, 1.0)

    def _reward(self, mean: Tensor, generator: torch.Generator) -> Tensor:
        return (torch.rand(mean.shape, generator=generator, dtype=mean.dtype) < mean).to(mean.dtype)


class Gaussian(_Bandit):
    """Arms of unknown mean. The means ``(N, arms)`` are standard normal, rewards normal with variance 1."""

    name = "gaussian-bandit"

    def draw(self, key: Tensor) -> Tensor:
        return normal(key, self.actions.size).to(torch.get_default_dtype())

    def _reward(self, mean: Tensor, generator: torch.Generator) -> Tensor:
        return mean + torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
