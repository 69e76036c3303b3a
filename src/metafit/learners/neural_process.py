"""Neural processes: a network reads the support set, and tells a Gaussian for each query."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafit.learners.attention import Attention, Block, ask, read
from metafit.learners.base import Adapted, Learner
from metafit.losses import GaussianNLL
from metafit.task import Examples, weights

LEAST = 0.01  # a standard deviation: what keeps a density finite


class NeuralProcess(Learner):
    """What neural processes share: inputs beside targets, and outputs ``(Q, 2D)``, means and log-variances.

    Args:
        body: from inputs to ``(N, dim)``.
        dim: size of what it gives.
        outputs: dimensions D of a target.
        width: units of the networks.
        state: size of what a query's Gaussian is told from.
    """

    gaussian = True

    def __init__(self, body: nn.Module, dim: int, outputs: int, width: int, state: int):
        super().__init__(None)
        self.body, self.criterion = body, GaussianNLL()
        self.pair = mlp(dim + outputs, width, width)
        self.out = mlp(state, width, 2 * outputs)

    def pairs(self, support: Examples) -> tuple[Tensor, Tensor]:
        """The support inputs, and a representation of each example ``(N, width)``."""
        x = self.body(support.x)
        return x, self.pair(torch.cat([x, support.y.to(x.dtype)], -1))

    def told(self, hidden: Tensor) -> Tensor:
        mean, raw = self.out(hidden).chunk(2, -1)
        return torch.cat([mean, 2 * (LEAST + (1 - LEAST) * F.softplus(raw)).log()], -1)


class ConditionalNeuralProcess(NeuralProcess):
    """The support set is the mean of what its examples are (Garnelo et al., 2018, arXiv:1807.01613, eq. 2-4)."""

    def __init__(self, body: nn.Module, dim: int, outputs: int, width: int = 128):
        super().__init__(body, dim, outputs, width, dim + width)

    def adapt(self, support: Examples) -> Adapted:
        _, pairs = self.pairs(support)
        weight = weights(support).to(pairs.dtype)
        return {"mean": (weight @ pairs) / weight.sum().clamp_min(torch.finfo(pairs.dtype).tiny)}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        x = self.body(x)
        return self.told(torch.cat([x, adapted["mean"].expand(len(x), -1)], -1))


class AttentiveNeuralProcess(NeuralProcess):
    """Each query attends to the examples whose inputs are like its own, and which attended to each other before (Kim et
    al., 2019, arXiv:1901.05761, section 3).

    The deterministic path alone, which others call the conditional attentive process: no latent variable.
    """

    def __init__(self, body: nn.Module, dim: int, outputs: int, width: int = 128, heads: int = 4):
        super().__init__(body, dim, outputs, width, 2 * width)
        self.place = mlp(dim, width, width)
        self.among, self.cross = Block(width, heads), Attention(width, heads)

    def adapt(self, support: Examples) -> Adapted:
        x, pairs = self.pairs(support)
        weight = weights(support)
        return {"keys": self.place(x), "values": self.among(pairs, pairs, weight), "weight": weight}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        place = self.place(self.body(x))
        found = self.cross(place, adapted["keys"], adapted["values"], adapted["weight"])
        return self.told(torch.cat([place, found], -1))


class TransformerNeuralProcess(NeuralProcess):
    """A transformer in which support examples attend to each other, and queries to them (TNP-D, Nguyen and Grover,
    2022, arXiv:2207.04179, section 3.1).

    An example is its input, its target and a mark; a query has zeros for the target. What the support set is at each
    layer does not depend on the queries, so ``adapt`` computes it once.
    """

    def __init__(self, body: nn.Module, dim: int, outputs: int, width: int = 64, layers: int = 4, heads: int = 4):
        super().__init__(body, dim, outputs, width, width)
        self.outputs = outputs
        self.mark = nn.Parameter(0.02 * torch.randn(width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def adapt(self, support: Examples) -> Adapted:
        _, tokens = self.pairs(support)
        weight = weights(support)
        return {"states": read(self.blocks, tokens, weight), "weight": weight}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        x = self.body(x)
        tokens = self.pair(torch.cat([x, x.new_zeros(len(x), self.outputs)], -1)) + self.mark
        return self.told(self.norm(ask(self.blocks, tokens, adapted["states"], adapted["weight"])))


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs)
    )
