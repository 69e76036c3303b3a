"""How much each family of tasks counts, learned from its own uncertainty."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MOST = 10.0  # times that a family may count


class UncertaintyWeights(nn.Module):
    """Σ over tasks of exp(−s_f)·L + s_f/2 with a learned log-variance s_f for each family f (Kendall et al., 2018,
    arXiv:1705.07115, eq. 10, for classes; a regression's ½ goes into its s). All s start at 0: as if it were not there.

    The best s is log 2L, and a family that is learned, whose L goes to 0, would drown the others: ``bound`` keeps each
    from counting more than ``MOST`` times.

    Args:
        families: how many there are.
    """

    def __init__(self, families: int):
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(families))

    def forward(self, losses: Tensor, family: Tensor) -> Tensor:
        """Of tasks with losses ``(T,)`` and families ``(T,)``, their weighted losses ``(T,)``."""
        s = self.log_variance[family]
        return (-s).exp() * losses + s / 2

    def counts(self) -> list[float]:
        """How often each family counts, exp(−s)."""
        return (-self.log_variance.detach()).exp().tolist()

    @torch.no_grad()
    def bound(self) -> None:
        """To be called after each step of an optimizer."""
        self.log_variance.clamp_(min=-math.log(MOST))
