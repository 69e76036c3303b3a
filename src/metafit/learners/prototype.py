"""Prototypical networks, and the frozen centroid that they reduce to."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from metafit.errors import BadInput, unknown
from metafit.learners.base import Adapted, Learner, mask_absent, members, unit
from metafit.task import Examples

Metric = Literal["euclidean", "cosine"]


class PrototypeLearner(Learner):
    """The class of the nearest mean of embedded support examples (Snell et al., 2017, arXiv:1703.05175, eq. 1-2).

    Args:
        body: the embedding, from inputs to ``(N, dim)``.
        way: the most classes of a task.
        metric: ``"euclidean"`` scores by minus the squared distance, as in the paper; ``"cosine"`` by the cosine
            between normalised embeddings and normalised means.
        temperature: what the score is divided by; a meta-parameter (learned as its logarithm).
    """

    def __init__(
        self,
        body: nn.Module,
        way: int,
        metric: Metric = "euclidean",
        temperature: float = 1.0,
    ):
        super().__init__(way)
        if metric not in get_args(Metric):
            raise unknown("metric", str(metric), get_args(Metric))
        if not temperature > 0:
            raise BadInput(f"temperature {temperature}: needs to be above 0")
        self.body, self.metric = body, metric
        self.log_temperature = nn.Parameter(torch.tensor(float(temperature)).log())

    def embed(self, x: Any) -> Tensor:
        features = self.body(x)
        return unit(features) if self.metric == "cosine" else features

    def adapt(self, support: Examples) -> Adapted:
        assert self.way is not None
        member = members(support, self.way)
        size = member.sum(0)
        features = self.embed(support.x)
        means = (member.to(features.dtype).T @ features) / size.clamp_min(1e-12)[:, None].to(features.dtype)
        return {"prototypes": means, "present": size > 0}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        features, prototypes = self.embed(x), adapted["prototypes"]
        if self.metric == "cosine":
            scores = features @ unit(prototypes).T
        else:
            # ‖f − p‖² without the (Q, way, dim) difference; ‖f‖² stays, so that scores are comparable across queries
            scores = 2 * features @ prototypes.T - features.square().sum(-1)[:, None] - prototypes.square().sum(-1)
        return mask_absent(scores / self.log_temperature.exp(), adapted["present"])
