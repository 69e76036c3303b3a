"""RL² with a gated recurrent unit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafit.rl.actions import Actions
from metafit.rl.in_context import InContextAgent


class GRU(nn.Module):
    """A gated recurrent unit (Cho et al., 2014, arXiv:1406.1078; torch's form), as plain operations, so that vmap runs
    it over trials.

    Args:
        inputs, width: sizes of an input and of the state.
    """

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.inputs, self.recurrent = nn.Linear(inputs, 3 * width), nn.Linear(width, 3 * width)
        nn.init.orthogonal_(self.inputs.weight)
        for part in self.recurrent.weight.chunk(3):
            nn.init.orthogonal_(part)
        nn.init.zeros_(self.inputs.bias)
        nn.init.zeros_(self.recurrent.bias)

    def over(self, x: Tensor, state: Tensor) -> Tensor:
        """The states ``(T, width)`` after each input ``(T, inputs)``."""
        states = []
        for read in self.inputs(x).unbind(0):
            state = self._after(read, state)
            states.append(state)
        return torch.stack(states) if states else state.new_zeros(0, *state.shape)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """The state after one input."""
        return self._after(self.inputs(x), state)

    def _after(self, read: Tensor, state: Tensor) -> Tensor:
        gates, candidate = self._split(read)
        known, kept = self._split(self.recurrent(state))
        reset, update = (gates + known).sigmoid().chunk(2, -1)
        new = (candidate + reset * kept).tanh()
        return new + update * (state - new)

    @staticmethod
    def _split(gates: Tensor) -> tuple[Tensor, Tensor]:
        width = gates.shape[-1] // 3
        return gates[..., : 2 * width], gates[..., 2 * width :]


class RecurrentAgent(InContextAgent):
    """RL² (Duan et al., 2016, arXiv:1611.02779): a GRU reads percepts, and its state is what was learned."""

    def __init__(self, observations: int, actions: Actions, width: int = 64, **training: Any):
        super().__init__(observations, actions, width, **training)
        self.network = GRU(self.percepts, width)

    def begin(self, n: int) -> Tensor:
        return torch.zeros(n, self.width, dtype=self.network.inputs.weight.dtype)

    def unroll(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        states = self.network.over(x, memory)
        return states, states[-1] if len(states) else memory

    def remember(self, memory: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        state = self.network(x, memory)
        return state, state
