"""Prototypes whose metric is the class's own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafit.learners.base import Adapted, Learner, embed, logarithm, mask_absent, members
from metafit.task import Examples

EVEN = math.log(math.e - 1)  # softplus⁻¹(1): at the start every dimension of every example counts 1


class GaussianPrototypeLearner(Learner):
    """Logits −Σ s̄ₖ·(z − pₖ)², the distance to a class scaled by its own precision in each dimension.

    Each example has a precision sᵢ; the class is pₖ = Σ sᵢxᵢ / Σ sᵢ, with the mean precision s̄ₖ of its examples
    (Gaussian prototypical networks, Fort, 2017, arXiv:1708.02735, eq. 4-6).

    The mean, where the paper has the sum, does not grow with the shots. Without training this is the prototypical
    network of the same embedding.

    Args:
        body: the embedding, from inputs to ``(N, dim)``.
        dim: its size.
        way: the most classes of a task.
        temperature: what distances are divided by; a meta-parameter (learned as its logarithm).
        normalise: whether features are scaled to length 1.
    """

    def __init__(self, body: nn.Module, dim: int, way: int, temperature: float = 1.0, normalise: bool = False):
        super().__init__(way)
        self.body, self.normalise = body, normalise
        self.precision = nn.Linear(dim, dim)
        nn.init.zeros_(self.precision.weight)
        nn.init.constant_(self.precision.bias, EVEN)
        self.log_temperature = logarithm("temperature", temperature)

    def embed(self, x: Any) -> Tensor:
        return embed(self.body, x, self.normalise)

    def adapt(self, support: Examples) -> Adapted:
        assert self.way is not None
        features = self.embed(support.x)
        precision = F.softplus(self.precision(features))
        member = members(support, self.way).to(features.dtype)
        size, total = member.sum(0)[:, None], member.mT @ precision
        means = member.mT @ (precision * features) / torch.where(size > 0, total, 1.0)
        return {"means": means, "precision": total / torch.where(size > 0, size, 1.0), "present": size[:, 0] > 0}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        features, means, precision = self.embed(x), adapted["means"], adapted["precision"]
        # Σ s(z − p)² without the (Q, way, dim) difference
        crossed = features @ (precision * means).mT
        distances = features.square() @ precision.mT - 2 * crossed + (precision * means.square()).sum(-1)
        return mask_absent(-distances / self.log_temperature.exp(), adapted["present"])
