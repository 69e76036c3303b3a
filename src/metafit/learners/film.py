"""A scale and a shift of the features: few numbers to adapt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Film(nn.Module):
    """γ'∘body(x) + β with γ' = 1 + γ; both start at zero, so that the features start as they are.

    Perez et al., 2018, arXiv:1709.07871; for few-shot adaptation, Requeima et al., 2019, arXiv:1906.07697.

    Args:
        body: from inputs to features ``(N, dim)``.
        dim: size of the features.
    """

    def __init__(self, body: nn.Module, dim: int):
        super().__init__()
        self.body = body
        self.gamma, self.beta = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Any) -> Tensor:
        features: Tensor = self.body(x)
        return features * (1 + self.gamma) + self.beta
