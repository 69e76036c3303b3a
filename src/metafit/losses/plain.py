"""The two losses without parameters that classification and regression start from."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from metafit.context import Context
from metafit.losses.base import Loss
from metafit.task import weighted_mean


class CrossEntropy(Loss):
    """Mean negative log-probability of the right class, in nats."""

    def forward(self, outputs: Tensor, y: Tensor, weight: Tensor, context: Context) -> Tensor:
        return weighted_mean(F.cross_entropy(outputs, y, reduction="none"), weight)


class SquaredError(Loss):
    """Mean squared error over examples and output dimensions."""

    def forward(self, outputs: Tensor, y: Tensor, weight: Tensor, context: Context) -> Tensor:
        return weighted_mean((outputs - y).square().mean(-1), weight)
