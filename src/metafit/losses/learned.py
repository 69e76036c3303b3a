"""Losses that are learned: a network over what is known of each example."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metafit.context import Context
from metafit.errors import BadInput
from metafit.losses.base import Loss
from metafit.losses.plain import CrossEntropy, SquaredError
from metafit.task import weighted_mean


class LearnedLoss(Loss):
    """The criterion and the mean of a network over (outputs, target) of each example (after Bechtle et al., 2021, ML³,
    arXiv:1906.05374, which has the network alone).

    The network's last layer starts at zero, so that the loss starts as the criterion. A loss of the inner loop: what
    is trained by its own value learns to make it small.

    Args:
        way: classes; ``None`` for regression.
        outputs: dimensions of a regression target.
        hidden: units of the two hidden layers.
    """

    def __init__(self, way: int | None, outputs: int = 1, hidden: int = 32):
        super().__init__()
        self.way, self.criterion = way, criterion(way)
        self.network = network(2 * (way or outputs), hidden)

    def forward(self, outputs: Tensor, y: Tensor, weight: Tensor, context: Context) -> Tensor:
        if context.features is None:  # as only the inner loop has
            raise BadInput("LearnedLoss: as an outer loss it would learn to be small; use it as an inner_loss")
        seen = outputs if self.way is None else outputs.softmax(-1)
        learned = self.network(torch.cat([seen, target(y, outputs, self.way)], -1))[:, 0]
        return self.criterion(outputs, y, weight, context) + weighted_mean(learned, weight)


def criterion(way: int | None) -> Loss:
    return SquaredError() if way is None else CrossEntropy()


def network(inputs: int, hidden: int) -> nn.Sequential:
    """Two hidden layers, smooth so that they can be differentiated twice, to one output that starts at zero."""
    last = nn.Linear(hidden, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last)


def target(y: Tensor, outputs: Tensor, way: int | None) -> Tensor:
    """What a network sees of labels: one-hot rows for classes, else the values, of the outputs' precision."""
    # F.one_hot reads its largest label back
    return y if way is None else (y[:, None] == torch.arange(way, device=y.device)).to(outputs.dtype)
