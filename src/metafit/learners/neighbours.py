"""k nearest neighbours among the support examples' embeddings."""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from metafit.errors import BadInput
from metafit.learners.base import Adapted, Learner, embed, mask_absent, squared_distances, targets
from metafit.task import Examples, weights


class NeighbourLearner(Learner):
    """Votes (classification) or averages (regression) of the k nearest support examples, weighted by similarity.

    A neighbour at squared distance d weighs exp(−d / τ) of normalised embeddings. Nothing is meta-learned.

    Args:
        body: the embedding, from inputs to ``(N, dim)``.
        way: the most classes of a task, ``None`` for regression.
        k: neighbours that count; all, where the support set has fewer.
        temperature: τ.
    """

    weighs = False

    def __init__(self, body: nn.Module, way: int | None, k: int = 5, temperature: float = 0.1):
        super().__init__(way)
        if index(k) < 1:
            raise BadInput(f"k {k}: needs at least 1 neighbour")
        if not temperature > 0:
            raise BadInput(f"temperature {temperature}: needs to be above 0")
        self.body, self.k, self.temperature = body, k, temperature

    def embed(self, x: Any) -> Tensor:
        return embed(self.body, x, normalise=self.way is not None)

    def adapt(self, support: Examples) -> Adapted:
        features = self.embed(support.x)
        weight = weights(support).to(features.dtype)
        return {"features": features, "targets": targets(support, self.way).to(features.dtype), "weight": weight}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        known, targets, weight = adapted["features"], adapted["targets"], adapted["weight"]
        features = self.embed(x)
        distance = squared_distances(features, known).clamp_min(0)
        similarity = torch.where(weight > 0, -distance / self.temperature, -torch.inf)
        nearest, rows = similarity.topk(min(self.k, known.shape[0]), dim=-1)
        share = nearest.softmax(-1)
        answer = (share[..., None] * targets[rows]).sum(-2)
        if self.way is None:
            return answer
        # a class without a vote keeps a small probability: log 0 would make the loss of one mistake infinite
        present = targets.sum(0) > 0
        return mask_absent((answer + 1e-3).log(), present)
