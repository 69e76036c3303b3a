"""Environments that become another one of their family within a trial, unannounced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metafit.data.randomness import below, derive
from metafit.errors import BadInput
from metafit.rl.family import Family


class Changing(Family):
    """Any family, in which each environment changes once: at the start of an episode that nothing tells.

    Args:
        family: whose environments they are, before and after.
        episodes: of a trial; the change is at the start of one of the middle half of them, by default.
        window: the first and the last episode, from 0, that it may come before.
    """

    def __init__(self, family: Family, episodes: int | None = None, window: tuple[int, int] | None = None):
        self.family, self.name = family, f"changing-{family.name}"
        self.observations, self.actions, self.horizon = family.observations, family.actions, family.horizon
        self.episodes = episodes or max(4, 2 * family.episodes)
        self.window = window or (self.episodes // 4, self.episodes - 1 - self.episodes // 4)
        if not 0 < self.window[0] <= self.window[1] < self.episodes:
            raise BadInput(f"window {self.window}: needs two episodes of 1 to {self.episodes - 1}, in order")

    def draw(self, key: Tensor) -> dict[str, Any]:
        """The parameters before and after, and the step ``(N,)`` of the trial from which on it is after."""
        first, last = self.window
        episode = first + below(derive(key, 2), last - first + 1)
        before, after = (self.family.draw(derive(key, stream)) for stream in (0, 1))
        return {"before": before, "after": after, "step": episode * self.horizon}

    def at(self, params: dict[str, Any], clock: int) -> dict[str, Any]:
        later = params["step"] <= clock

        def chosen(before: Tensor, after: Tensor) -> Tensor:
            return torch.where(later.view(-1, *[1] * (before.dim() - 1)), after, before)

        now = tree_map(chosen, params["before"], params["after"])
        return {**params, "now": self.family.at(now, clock)}

    def reset(self, params: dict[str, Any], generator: torch.Generator) -> tuple[Any, Tensor]:
        return self.family.reset(params["now"], generator)

    def step(
        self, params: dict[str, Any], state: Any, action: Tensor, generator: torch.Generator
    ) -> tuple[Any, Tensor, Tensor]:
        return self.family.step(params["now"], state, action, generator)

    def place(self, state: Any) -> Tensor | None:
        return self.family.place(state)

    def goal(self, params: dict[str, Any]) -> Tensor | None:
        return self.family.goal(params["now"])
