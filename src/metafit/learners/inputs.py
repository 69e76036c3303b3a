"""What a learner of the catalogue is built over: a network, or frozen features."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from metafit.task import unit


@dataclass(frozen=True)
class Inputs:
    """What a learner is built over.

    Attributes:
        body: a network from inputs to features ``(N, dim)``, or ``None`` where the inputs are frozen features.
        dim: size of the features.
        way: outputs of a classifier; ``None`` for regression.
        outputs: dimensions of a regression target.
    """

    body: nn.Module | None
    dim: int
    way: int | None
    outputs: int = 1

    def frozen(self) -> nn.Module:
        """A copy: what does not learn is not moved by a learner that trains the same network, nor freezes it."""
        return nn.Identity() if self.body is None else copy.deepcopy(self.body)

    def trainable(self, dropout: float = 0.0, normalise: bool = False) -> nn.Module:
        """The network; over frozen features, of length 1 where asked, a linear map that starts as the identity."""
        return FeatureMap(self.dim, dropout, normalise) if self.body is None else self.body

    def of_one_length(self) -> bool:
        """Whether a learner with a rate or a scale of its own reads features of length 1: frozen ones, of classes.

        Those of one backbone are 1 long and of another 17, where a step goes 300 times as far. A number's length is
        what a regression reads.
        """
        return self.body is None and self.way is not None

    def spread(self) -> nn.Module:
        """The network; over frozen features, their scaling to a variance of about 1.

        That is what the usual initial weights of a network expect; a sequence of small inputs looks like no inputs.
        """
        return Spread(self.of_one_length()) if self.body is None else self.body

    def head(self) -> nn.Linear:
        return nn.Linear(self.dim, self.way or self.outputs)


class FeatureMap(nn.Module):
    """A learned residual map over frozen features: before training, features are what they were.

    Weight decay pulls it towards the identity, and dropout of the features keeps it from learning the training
    classes by heart.

    Args:
        dim: size of the features.
        dropout: share of them that is left out in training.
        normalise: whether they are scaled to length 1 before.
    """

    def __init__(self, dim: int, dropout: float = 0.0, normalise: bool = False):
        super().__init__()
        self.dropout, self.change, self.normalise = nn.Dropout(dropout), nn.Linear(dim, dim), normalise
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(unit(x) if self.normalise else x)
        return x + self.change(x)


class Spread(nn.Module):
    """Features ``(N, dim)`` of length 1 become ones of length √dim, whose elements are about 1.

    Args:
        normalise: whether they are scaled to length 1 before; else they are taken to be about 1 long.
    """

    def __init__(self, normalise: bool = False):
        super().__init__()
        self.normalise = normalise

    def forward(self, x: Tensor) -> Tensor:
        return (unit(x) if self.normalise else x) * x.shape[-1] ** 0.5


class Unit(nn.Module):
    """Features ``(N, dim)`` scaled to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return unit(x)
