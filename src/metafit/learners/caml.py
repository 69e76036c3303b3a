"""Context-aware meta-learning: a transformer reads the support set and a query as one set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafit.learners.attention import Block, ask, read
from metafit.learners.base import Adapted, Learner, class_means, mask_absent
from metafit.task import Examples, weights


class ContextAwareLearner(Learner):
    """An example is its feature beside the code of its class, a query is its feature beside a learned code for
    "unknown", and a transformer without positions tells the query's class (CAML, Fifty et al., 2024, arXiv:2310.10971,
    section 3).

    Two things differ from the paper. Support examples attend to each other and not to the query, so that ``adapt``
    computes once what they are at each layer. And which class has which code is told by the support set, not by the
    labels: classes are sorted by their means along one fixed direction. So relabelled classes are relabelled logits,
    unless the means of two classes are the same there.

    Args:
        body: the encoder, from inputs to ``(N, dim)``; frozen in the paper.
        dim: size of what it gives.
        way: the most classes of a task.
        width: of the transformer.
        layers: of the transformer.
        heads: of its attention.
    """

    weighs = False
    codes: Tensor
    direction: Tensor

    def __init__(self, body: nn.Module, dim: int, way: int, width: int = 128, layers: int = 4, heads: int = 4):
        super().__init__(way)
        self.body = body
        self.register_buffer("codes", elmes(way))
        self.register_buffer("direction", torch.randn(dim))
        self.unknown = nn.Parameter(torch.randn(way) / way**0.5)
        self.token = nn.Linear(dim + way, width)
        blocks = [Block(width, heads) for _ in range(layers)]
        for block in blocks:  # attention starts as likeness, which is most of what there is to learn
            block.attention.key.load_state_dict(block.attention.query.state_dict())
        self.blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, way))

    def adapt(self, support: Examples) -> Adapted:
        x, weight = self.body(support.x), weights(support)
        means, here = class_means(x, support, self.way)
        rank = (means @ self.direction).masked_fill(~here, torch.inf).argsort(stable=True).argsort()
        tokens = self.token(torch.cat([x, self.codes[rank[support.y]]], -1))
        return {"states": read(self.blocks, tokens, weight), "weight": weight, "rank": rank, "present": here}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        x = self.body(x)
        tokens = self.token(torch.cat([x, self.unknown.expand(len(x), -1)], -1))
        tokens = ask(self.blocks, tokens, adapted["states"], adapted["weight"])
        return mask_absent(self.out(tokens)[:, adapted["rank"]], adapted["present"])


def elmes(way: int) -> Tensor:
    """Codes of classes ``(way, way)``: all of length 1, and as far from each other as can be, with inner products
    of −1 / (way − 1) (definition 1; the corners of a simplex)."""
    centred = torch.eye(way) - 1 / way
    return centred / centred.norm(dim=-1, keepdim=True)
