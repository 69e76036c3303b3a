"""Queries that are alike get alike answers."""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from metafit.errors import BadInput
from metafit.learners.base import Adapted, mask_absent, squared_distances
from metafit.learners.prototype import Metric, PrototypeLearner


class LaplacianLearner(PrototypeLearner):
    """Scores of the nearest prototype, smoothed over the nearest neighbours among the queries (LaplacianShot, Ziko et
    al., 2020, arXiv:2006.15486, eq. 7-9): y ← softmax(scores + λ·Wy), from y = softmax(scores), until it settles.

    Each round lowers a bound on −Σ y·scores − λ/2·Σ w·yᵀy + Σ y·log y, as W is made symmetric and positive
    semi-definite. Transductive: an answer depends on the other queries that it is asked with.

    Args:
        body, way, metric, temperature: as of ``PrototypeLearner``.
        neighbours: of each query, that weigh 1 / neighbours.
        smoothness: λ.
        rounds: at most.
    """

    def __init__(
        self,
        body: nn.Module,
        way: int,
        metric: Metric = "euclidean",
        temperature: float = 1.0,
        neighbours: int = 3,
        smoothness: float = 1.0,
        rounds: int = 20,
    ):
        super().__init__(body, way, metric, temperature)
        if index(neighbours) < 1 or index(rounds) < 1:
            raise BadInput(f"neighbours {neighbours}, rounds {rounds}: both need to be at least 1")
        if not smoothness >= 0:
            raise BadInput(f"smoothness {smoothness}: needs 0 or more")
        self.neighbours, self.smoothness, self.rounds = neighbours, smoothness, rounds

    @property
    def transductive(self) -> str:
        return "answers are smoothed over similar queries"

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        features = self.embed(x)
        scores = mask_absent(self.scores(features, adapted["prototypes"]), adapted["present"])
        alike, found = self.smoothness * affinity(features, self.neighbours), scores
        for _ in range(self.rounds):
            found = scores + alike @ found.softmax(-1)
        return found


def affinity(features: Tensor, neighbours: int) -> Tensor:
    """Who is among whose nearest neighbours, ``(Q, Q)``: symmetric, rows of about 1, and no negative eigenvalue."""
    distance = squared_distances(features, features)
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    k = min(neighbours, len(features) - 1)
    if k < 1:
        return torch.zeros_like(distance)
    near = distance.masked_fill(itself, torch.inf).topk(k, largest=False).indices
    linked = torch.zeros_like(distance).scatter(-1, near, 1 / k)
    both = (linked + linked.mT) / 2
    return (both + torch.diag_embed(both.sum(-1))) / 2  # diagonally dominant
