"""How much each family of tasks counts, learned from its own uncertainty."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UncertaintyWeights(nn.Module):
    """Σ over tasks of exp(−s_f)·L + s_f/2 with a learned log-variance s_f for each family f (Kendall et al., 2018,
    arXiv:1705.07115, eq. 10, for classes; a regression's ½ goes into its s). All s start at 0: as if it were not there.

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
