"""The losses without parameters."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metafit.context import Context
from metafit.errors import BadInput
from metafit.losses.base import Loss
from metafit.task import weighted_mean

LOG_2_PI = math.log(2 * math.pi)


class CrossEntropy(Loss):
    """Mean negative log-probability of the right class, in nats.

    Args:
        smoothing: ε of the label goes to the classes that the task has, in equal parts (Szegedy et al., 2016,
            arXiv:1512.00567, section 7).
        class_weight: ``(way,)``, how much the examples of each class count; 0 or more.

    Raises:
        BadInput: smoothing or weights out of range; in ``forward``, weights for another number of classes.
    """

    class_weight: Tensor | None

    def __init__(self, smoothing: float = 0.0, class_weight: Tensor | None = None):
        super().__init__()
        if not 0 <= smoothing < 1:
            raise BadInput(f"smoothing {smoothing}: needs 0 or more, and less than 1")
        if class_weight is not None:
            class_weight = torch.as_tensor(class_weight)
            if class_weight.dim() != 1 or not bool((class_weight >= 0).all()):
                raise BadInput(f"class_weight {class_weight.tolist()}: needs one number a class, 0 or more")
        self.smoothing = smoothing
        self.register_buffer("class_weight", class_weight)

    def forward(self, outputs: Tensor, y: Tensor, weight: Tensor, context: Context) -> Tensor:
        if self.class_weight is not None and len(self.class_weight) != outputs.shape[-1]:
            raise BadInput(f"class_weight: {len(self.class_weight)} for {outputs.shape[-1]} classes; give one a class")
        losses = F.cross_entropy(outputs, y, reduction="none")
        if self.smoothing:
            there = outputs > -torch.inf
            spread = torch.where(there, outputs.log_softmax(-1), 0.0).sum(-1) / there.sum(-1)
            losses = (1 - self.smoothing) * losses - self.smoothing * spread
        return weighted_mean(losses, weight if self.class_weight is None else weight * self.class_weight[y])


class Focal(Loss):
    """Mean of −(1 − p)^γ·log p, with p of the right class: easy examples count less (Lin et al., 2017,
    arXiv:1708.02002, eq. 4).

    Args:
        gamma: γ, 0 or more.
    """

    def __init__(self, gamma: float = 2.0):
        super().__init__()
        if not gamma >= 0:
            raise BadInput(f"gamma {gamma}: needs 0 or more")
        self.gamma = gamma

    def forward(self, outputs: Tensor, y: Tensor, weight: Tensor, context: Context) -> Tensor:
        losses = F.cross_entropy(outputs, y, reduction="none")
        losses = torch.where(weight > 0, losses, 0.0)  # the derivative of an infinite one is no number
        # of an example that is surely right, powers below 2 have a derivative that is infinite, times one that is 0
        wrong = (-torch.expm1(-losses)).clamp_min(torch.finfo(losses.dtype).eps)
        return weighted_mean(wrong**self.gamma * losses, weight)


class SquaredError(Loss):
    """Mean squared error over examples and output dimensions."""

    def forward(self, outputs: Tensor, y: Tensor, weight: Tensor, context: Context) -> Tensor:
        return weighted_mean((outputs - like(outputs, y)).square().mean(-1), weight)


class Huber(Loss):
    """Half the squared error up to δ, linear beyond (Huber, 1964).

    Args:
        delta: δ, in units of the target.
    """

    def __init__(self, delta: float = 1.0):
        super().__init__()
        if not delta > 0:
            raise BadInput(f"delta {delta}: needs more than 0")
        self.delta = delta

    def forward(self, outputs: Tensor, y: Tensor, weight: Tensor, context: Context) -> Tensor:
        error = outputs - like(outputs, y)  # F.huber_loss has no forward derivative of its backward one
        size = error.abs()
        losses = torch.where(size <= self.delta, 0.5 * error.square(), self.delta * (size - 0.5 * self.delta))
        return weighted_mean(losses.mean(-1), weight)


class GaussianNLL(Loss):
    """Mean negative log-density of the target, in nats, under outputs ``(N, 2D)``: means, then log-variances.

    A learner that it is the criterion of says ``gaussian = True``: its metric is that of the means.

    Raises:
        BadInput: in ``forward``, outputs of another shape.
    """

    def forward(self, outputs: Tensor, y: Tensor, weight: Tensor, context: Context) -> Tensor:
        if outputs.shape[-1] % 2:
            raise BadInput(
                f"GaussianNLL: outputs of shape {tuple(outputs.shape)}; give the head twice as many outputs as "
                "targets, means and then log-variances"
            )
        mean, log_variance = outputs.chunk(2, -1)
        square = (like(mean, y) - mean).square() * (-log_variance).exp()
        return weighted_mean(0.5 * (square + log_variance + LOG_2_PI).sum(-1), weight)


def like(outputs: Tensor, y: Tensor) -> Tensor:
    """The targets, which are of the shape of the outputs: ``(N,)`` against ``(N, 1)`` would be ``(N, N)`` differences.

    Raises:
        BadInput: they are of another.
    """
    if y.shape != outputs.shape:
        raise BadInput(f"targets of shape {tuple(y.shape)} for outputs {tuple(outputs.shape)}: give y as (N, D)")
    return y
