"""RL² with a transformer: what it has in mind is the last percepts of the trial, which it attends to."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafit.errors import BadInput
from metafit.rl.actions import Actions
from metafit.rl.in_context import InContextAgent

Memory = dict[str, Tensor]


class AttentiveAgent(InContextAgent):
    """RL² with causal attention (as in Mishra et al., 2018, arXiv:1707.03141, section 5.2).

    Blocks have their norms before, and a linear bias for distance is in place of positions (Press et al., 2022,
    arXiv:2108.12409), so that a trial may be longer than those of training.

    Args:
        width, layers, heads: of the transformer; heads divide the width.
        context: percepts that it attends to, itself included; those before them are forgotten.
    """

    def __init__(
        self,
        observations: int,
        actions: Actions,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        context: int = 256,
        **training: Any,
    ):
        super().__init__(observations, actions, width, **training)
        if width % heads or context < 2:
            raise BadInput(
                f"heads {heads}, context {context}: heads need to divide the width, {width}; context 2 or more"
            )
        self.heads, self.context = heads, context
        self.embed = nn.Linear(self.percepts, width)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def begin(self, n: int) -> Memory:
        """Keys and values of the percepts remembered, none as yet: ``(n, layers, 0 to context - 1, width)``."""
        nothing = self.embed.weight.new_zeros(n, len(self.layers), 0, self.width)
        return {"keys": nothing, "values": nothing}

    def unroll(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        mind, after = self._read(x[None], {name: value[None] for name, value in memory.items()})
        return mind[0], {name: value[0] for name, value in after.items()}

    def remember(self, memory: Memory, x: Tensor) -> tuple[Tensor, Memory]:
        mind, memory = self._read(x[:, None], memory)
        return mind[:, 0], memory

    def _read(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """T percepts ``(n, T, percept)`` after those remembered."""
        t, past = x.shape[1], memory["keys"].shape[2]
        distance = past + torch.arange(t)[:, None] - torch.arange(past + t)
        seen = (distance >= 0) & (distance < self.context)
        z, kept = self.embed(x), []
        for layer, keys, values in zip(self.layers, memory["keys"].unbind(1), memory["values"].unbind(1), strict=True):
            z, keys, values = layer(z, keys, values, distance, seen)
            kept.append((keys[:, 1 - self.context :], values[:, 1 - self.context :]))
        keys, values = (torch.stack(part, 1) for part in zip(*kept, strict=True))
        return self.norm(z), {"keys": keys, "values": values}


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ask, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        for last in (self.out, self.narrow):  # a block starts as nearly nothing
            nn.init.normal_(last.weight, std=0.02)
            nn.init.zeros_(last.bias)

    def forward(
        self, z: Tensor, keys: Tensor, values: Tensor, distance: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        normal = self.first(z)
        keys, values = (torch.cat([old, new(normal)], 1) for old, new in ((keys, self.key), (values, self.value)))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.ask(normal), keys, values))
        slopes = 2.0 ** (-8 * (torch.arange(self.heads) + 1) / self.heads)
        scores = q @ k.mT / k.shape[-1] ** 0.5 - slopes[:, None, None].to(z.dtype) * distance
        found = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        z = z + self.out(found.transpose(1, 2).flatten(2))
        return z + self.narrow(F.gelu(self.wide(self.second(z)))), keys, values
