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
    """RL² (Duan et al., 2016, arXiv:1611.02779): a GRU reads percepts, and its state is what was learned.

    Args:
        recall: whether it also reads the observation that it took its last action at, so that a percept tells a whole
            transition.
    """

    def __init__(self, observations: int, actions: Actions, width: int = 64, recall: bool = False, **training: Any):
        super().__init__(observations, actions, width, **training)
        self.recalled = observations if recall else 0
        self.network = GRU(self.percepts + self.recalled, width)

    def begin(self, n: int) -> Tensor:
        """The state of the network, and the observation to be recalled."""
        return torch.zeros(n, self.width + self.recalled, dtype=self.network.inputs.weight.dtype)

    def unroll(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        if not len(x):
            return x.new_zeros(0, self.width), memory
        state, before = memory.split([self.width, self.recalled])
        seen = x[:, : self.recalled]
        states = self.network.over(torch.cat([x, _shifted(before, seen)], -1), state)
        return states, torch.cat([states[-1], seen[-1]])

    def remember(self, memory: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        state, before = memory.split([self.width, self.recalled], -1)
        state = self.network(torch.cat([x, before], -1), state)
        return state, torch.cat([state, x[:, : self.recalled]], -1)


def _shifted(first: Tensor, rows: Tensor) -> Tensor:
    """Each row's predecessor ``(T, ...)``, the first one given."""
    return torch.cat([first[None], rows[:-1]])
