"""A small grid with a goal that is not shown (Zintgraf et al., 2020, VariBAD, arXiv:1910.08348, section 5.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metafit.data.randomness import below, derive
from metafit.errors import BadInput
from metafit.rl.actions import Actions
from metafit.rl.family import Family

MOVES = ((0, 1), (1, 0), (0, -1), (-1, 0), (0, 0))  # up, right, down, left, stay


class Grid(Family):
    """A grid with a goal that is not shown. The reward is 1 on the goal's cell and −0.1 elsewhere; the goal is any cell
    but the three at the start.

    The agent starts in the corner, and sees its cell's column and row, one-hot.
    """

    name, actions = "grid", Actions(len(MOVES))

    def __init__(self, size: int = 5, horizon: int = 15, episodes: int = 4):
        if size < 3:
            raise BadInput(f"size {size}: needs at least 3 cells a side, so that the goal can be away from the start")
        self.size, self.observations, self.horizon, self.episodes = size, 2 * size, horizon, episodes

    def draw(self, key: Tensor) -> Tensor:
        """The goals' cells ``(N, 2)``."""
        cells = torch.cartesian_prod(torch.arange(self.size), torch.arange(self.size))
        far = cells[(cells > 1).any(-1) | (cells == 1).all(-1)]  # not the start, nor the cells beside it
        return far[below(derive(key, 0), len(far))]

    def reset(self, params: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        cell = torch.zeros_like(params)
        return cell, self._seen(cell)

    def step(
        self, params: Tensor, state: Tensor, action: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        cell = (state + torch.tensor(MOVES)[action]).clamp(0, self.size - 1)
        there = (cell == params).all(-1).to(torch.get_default_dtype())
        return cell, self._seen(cell), 1.1 * there - 0.1

    def place(self, state: Tensor) -> Tensor:
        return state.to(torch.get_default_dtype())

    def goal(self, params: Tensor) -> Tensor:
        return params.to(torch.get_default_dtype())

    def _seen(self, cell: Tensor) -> Tensor:
        return F.one_hot(cell, self.size).flatten(1).to(torch.get_default_dtype())
