"""Dropout whose noise is meta-learned, and depends on the input."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MetaDropout(nn.Module):
    """z∘softplus(μ(z) + ε) / log 2, with ε ~ N(0, 1) for each element while training and 0 otherwise (Lee et al., 2020,
    arXiv:1905.12914).

    μ is linear and starts at zero. The paper does not divide: log 2 = softplus(0), so that the module starts as the
    identity in evaluation mode; while training, the noise at the start has mean 1.16 and variance 0.57.

    It is for the support set alone (``GradientLearner``'s ``noise``): queries are never perturbed. The paper draws ε
    for unseen tasks, too; here a fitted model is to be the same each time. μ is meta-learned and does not adapt,
    whatever the scope.

    Args:
        dim: size of the features.
    """

    meta_only = True  # no scope lets it adapt

    def __init__(self, dim: int):
        super().__init__()
        self.mean = nn.Linear(dim, dim)
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.mean.bias)

    def forward(self, features: Tensor) -> Tensor:
        a = self.mean(features)
        if self.training:
            a = a + torch.randn_like(a)
        return features * F.softplus(a) / math.log(2)
