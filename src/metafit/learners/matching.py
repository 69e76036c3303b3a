"""Matching networks: every support example votes, weighted by attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafit.learners.base import Adapted, Learner, logarithm, mask_absent, targets
from metafit.task import Examples, unit, weights

LEAST = 1e-30  # of a vote: log 0 would make the loss of one mistake infinite


class MatchingLearner(Learner):
    """ŷ = Σ aᵢ·yᵢ with attention a = softmax of the cosines over τ (Vinyals et al., 2016, arXiv:1606.04080, eq. 1-2).

    Query and support share the embedding; the paper's full-context embeddings, which read the support set as a
    sequence, are left out: the prediction does not depend on the order of the support set.

    Args:
        body: the embedding, from inputs to ``(N, dim)``.
        way: the most classes of a task, ``None`` for regression.
        temperature: τ; a meta-parameter (learned as its logarithm).
    """

    def __init__(self, body: nn.Module, way: int | None, temperature: float = 0.1):
        super().__init__(way)
        self.body = body
        self.log_temperature = logarithm("temperature", temperature)

    def adapt(self, support: Examples) -> Adapted:
        keys = unit(self.body(support.x))
        return {"keys": keys, "targets": targets(support, self.way).to(keys.dtype), "weight": weights(support)}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        scores = unit(self.body(x)) @ adapted["keys"].mT / self.log_temperature.exp()
        attention = scores.masked_fill(adapted["weight"] == 0, -torch.inf).softmax(-1)
        votes = attention @ adapted["targets"]
        if self.way is None:
            return votes
        return mask_absent(votes.clamp_min(LEAST).log(), adapted["targets"].sum(0) > 0)
