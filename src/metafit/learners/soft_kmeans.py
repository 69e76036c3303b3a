"""Prototypes refined by the queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafit.errors import BadInput
from metafit.learners.base import Adapted, mask_absent, members
from metafit.learners.prototype import Metric, PrototypeLearner
from metafit.task import Examples


class SoftKMeansLearner(PrototypeLearner):
    """Prototypes move to the mean of their support examples and, in part, of all queries: each query counts for a class
    as much as it is likely to be of it (Ren et al., 2018, arXiv:1803.00676, eq. 3, on the queries themselves).

    Transductive: an answer depends on the other queries that it is asked with.

    Args:
        body, way, metric, temperature: as of ``PrototypeLearner``.
        rounds: of refinement.
    """

    def __init__(
        self,
        body: nn.Module,
        way: int,
        metric: Metric = "euclidean",
        temperature: float = 1.0,
        rounds: int = 1,
    ):
        super().__init__(body, way, metric, temperature)
        if rounds < 1:
            raise BadInput(f"rounds {rounds}: needs at least 1")
        self.rounds = rounds

    @property
    def transductive(self) -> str:
        return "prototypes are refined by the query inputs"

    def adapt(self, support: Examples) -> Adapted:
        assert self.way is not None
        return {**super().adapt(support), "size": members(support, self.way).sum(0)}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        features, start, here = self.embed(x), adapted["prototypes"], adapted["present"]
        size = adapted["size"].to(features.dtype)
        moved = start
        for _ in range(self.rounds):
            likely = mask_absent(self.scores(features, moved), here).softmax(-1)
            total = size + likely.sum(0)
            moved = (size[:, None] * start + likely.mT @ features) / torch.where(here, total, 1.0)[:, None]
        return mask_absent(self.scores(features, moved), here)
