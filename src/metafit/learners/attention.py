"""Attention over a set whose padding does not count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCORES = 1 << 22  # of queries with keys that are held at once: 16 MB


class Attention(nn.Module):
    """softmax(QKᵀ/√d)V in several heads (Vaswani et al., 2017, arXiv:1706.03762, section 3.2), over one task's sets.

    Where nothing is differentiated, many queries go through one fused kernel, or in parts: memory grows with the sizes
    of the sets, not with their product. In training it grows with the product.

    Args:
        dim: size of queries, keys, values and results.
        heads: that share it; they divide it.
    """

    def __init__(self, dim: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, asking: Tensor, known: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        """Results ``(Q, dim)`` of queries ``(Q, dim)`` over keys and values ``(N, dim)``; weight 0 is padding."""
        q, k, v = (
            part(x).reshape(*x.shape[:-1], self.heads, -1).transpose(-2, -3)
            for part, x in ((self.query, asking), (self.key, known), (self.value, values))
        )
        rows = max(1, SCORES // (self.heads * k.shape[-2]))  # queries at a time
        if rows < q.shape[-2] and not torch.is_grad_enabled():
            mask = (weight != 0)[None, None, None]  # the fused kernel has no second derivative
            found = F.scaled_dot_product_attention(q[None], k[None], v[None], mask)[0]
        else:
            q = q / k.shape[-1] ** 0.5
            found = torch.cat([self._found(part, k, v, weight) for part in q.split(rows, -2)], -2)
        return self.out(found.transpose(-2, -3).flatten(-2))

    @staticmethod
    def _found(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(weight == 0, -torch.inf).softmax(-1) @ v


class Block(nn.Module):
    """A transformer block: attention to a set, then a network on each element, with norms before (Xiong et al., 2020,
    arXiv:2002.04745).

    Args:
        dim, heads: see ``Attention``.
        hidden: units of the network.
    """

    def __init__(self, dim: int, heads: int = 4, hidden: int | None = None):
        super().__init__()
        self.attention, self.first, self.second = Attention(dim, heads), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.wide, self.narrow = nn.Linear(dim, hidden or 2 * dim), nn.Linear(hidden or 2 * dim, dim)

    def forward(self, x: Tensor, context: Tensor, weight: Tensor) -> Tensor:
        seen = self.first(context)
        x = x + self.attention(self.first(x), seen, seen, weight)
        return x + self.narrow(F.gelu(self.wide(self.second(x))))


def read(blocks: nn.ModuleList, tokens: Tensor, weight: Tensor) -> list[Tensor]:
    """What a set ``(N, dim)`` is before each block, its elements attending to each other; weight 0 is padding."""
    states = [tokens]
    for block in blocks[:-1]:
        states.append(block(states[-1], states[-1], weight))
    return states


def ask(blocks: nn.ModuleList, tokens: Tensor, states: list[Tensor], weight: Tensor) -> Tensor:
    """What queries ``(Q, dim)`` become, each attending at each block to what the set was there (see ``read``)."""
    for block, state in zip(blocks, states, strict=True):
        tokens = block(tokens, state, weight)
    return tokens
