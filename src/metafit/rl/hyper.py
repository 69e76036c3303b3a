"""RL² whose recurrent state makes the weights of the policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafit.rl.actions import Actions
from metafit.rl.recurrent import RecurrentAgent


class HyperAgent(RecurrentAgent):
    """A GRU reads percepts; a hypernetwork maps its state to the weights of a small policy over the observation (Beck
    et al., 2022, arXiv:2210.11348).

    The hypernetwork's weights start near zero and its bias as the usual initial weights of the policy, for every state
    the same (their Bias-HyperInit).

    Args:
        hidden: units of the policy's hidden layer.
    """

    def __init__(self, observations: int, actions: Actions, width: int = 64, hidden: int = 32, **training: Any):
        super().__init__(observations, actions, width, **training)
        first, second = nn.Linear(observations, hidden), nn.Linear(hidden, actions.outputs)
        nn.init.orthogonal_(second.weight, 0.01)
        initial = [first.weight.flatten(), first.bias, second.weight.flatten(), second.bias]
        self.shapes = [(hidden, observations), (hidden,), (actions.outputs, hidden), (actions.outputs,)]
        self.actor = nn.Linear(width, sum(len(part) for part in initial))
        with torch.no_grad():
            nn.init.normal_(self.actor.weight, std=0.01 / width**0.5)
            self.actor.bias.copy_(torch.cat(initial))

    def decide(self, mind: Tensor, x: Tensor) -> Tensor:
        parts = self.actor(mind).split([torch.Size(shape).numel() for shape in self.shapes], -1)
        w, b, v, c = (part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True))
        hidden = ((w @ x[..., : self.observations, None])[..., 0] + b).tanh()
        return (v @ hidden[..., None])[..., 0] + c
