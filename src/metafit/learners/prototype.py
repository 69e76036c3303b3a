"""Prototypical networks, and the frozen centroid that they reduce to."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from metafit.errors import unknown
from metafit.learners.base import Adapted, Learner, embed, logarithm, mask_absent, members, squared_distances
from metafit.task import Examples, unit

Metric = Literal["euclidean", "cosine"]


class PrototypeLearner(Learner):
    """The class of the nearest mean of embedded support examples (Snell et al., 2017, arXiv:1703.05175, eq. 1-2).

    Args:
        body: the embedding, from inputs to ``(N, dim)``.
        way: the most classes of a task.
        metric: ``"euclidean"`` scores by minus the squared distance, as in the paper; ``"cosine"`` by the cosine
            between normalised embeddings and normalised means.
        normalise: whether embeddings are scaled to length 1 under the euclidean metric, too.
        temperature: what the score is divided by; a meta-parameter (learned as its logarithm).
    """

    def __init__(
        self,
        body: nn.Module,
        way: int,
        metric: Metric = "euclidean",
        temperature: float = 1.0,
        normalise: bool = False,
    ):
        super().__init__(way)
        if metric not in get_args(Metric):
            raise unknown("metric", str(metric), get_args(Metric))
        self.body, self.metric, self.normalise = body, metric, normalise or metric == "cosine"
        self.log_temperature = logarithm("temperature", temperature)

    def embed(self, x: Any) -> Tensor:
        return embed(self.body, x, self.normalise)

    def adapt(self, support: Examples) -> Adapted:
        return self.settle(self.sums(support))

    def sums(self, support: Examples) -> dict[str, Tensor]:
        """What ``settle`` needs to know, one row a class; those of two sets together are the sum of theirs."""
        assert self.way is not None  # the catalogue refuses regression
        features, member = self.embed(support.x), members(support, self.way)
        return {"features": member.to(features.dtype).mT @ features, "size": member.sum(0)}

    def settle(self, sums: dict[str, Tensor]) -> Adapted:
        size = torch.where(sums["size"] > 0, sums["size"], 1.0)[:, None]
        return {"prototypes": sums["features"] / size.to(sums["features"].dtype), "present": sums["size"] > 0}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        return mask_absent(self.scores(self.embed(x), adapted["prototypes"]), adapted["present"])

    def scores(self, features: Tensor, prototypes: Tensor) -> Tensor:
        cosine = self.metric == "cosine"
        scores = features @ unit(prototypes).mT if cosine else -squared_distances(features, prototypes)
        return scores / self.log_temperature.exp()
