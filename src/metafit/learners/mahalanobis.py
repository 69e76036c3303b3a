"""The nearest class by a distance that knows how each class spreads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafit.learners.base import Adapted, Learner, class_means, embed, logarithm, mask_absent, members
from metafit.task import Examples, weights


class MahalanobisLearner(Learner):
    """Logits −½(z − μₖ)ᵀQₖ⁻¹(z − μₖ), Qₖ = λₖΣₖ + (1 − λₖ)Σ + βI, λₖ = nₖ/(nₖ + 1) (Simple CNAPS, Bateni et al., 2020,
    arXiv:1912.03432, eq. 2-4).

    Σₖ is the covariance of the class, Σ that of the support set. The paper's network that adapts the embedding to
    the task is left out; β and a scale of the features are meta-parameters (the paper's are 1).

    Qₖ⁻¹ is never formed: Qₖ is βI + ZᵀWZ for the support's features Z, so that each class has a system of as many
    unknowns as there are examples: (βI + ZᵀWZ)⁻¹ = (I − Zᵀ(βI + WZZᵀ)⁻¹WZ)/β (Woodbury).

    Args:
        body: the embedding, from inputs to ``(N, dim)``.
        way: the most classes of a task.
        ridge: β at the start.
        scale: what features are multiplied by, at the start.
        normalise: whether features are scaled to length 1 before.
    """

    def __init__(self, body: nn.Module, way: int, ridge: float = 1.0, scale: float = 1.0, normalise: bool = False):
        super().__init__(way)
        self.body, self.normalise = body, normalise
        self.log_ridge = logarithm("ridge", ridge)
        self.log_scale = logarithm("scale", scale)

    def embed(self, x: Any) -> Tensor:
        return self.log_scale.exp() * embed(self.body, x, self.normalise)

    def adapt(self, support: Examples) -> Adapted:
        assert self.way is not None  # the catalogue refuses regression
        features = self.embed(support.x)
        means, here = class_means(features, support, self.way)
        weight = weights(support).to(features.dtype)
        rows = features - (weight @ features) / weight.sum().clamp_min(torch.finfo(features.dtype).tiny)
        counted = covariance_weights(members(support, self.way).to(features.dtype), weight)
        one = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        inner = torch.linalg.solve(self.log_ridge.exp() * one + counted @ (rows @ rows.mT), counted)
        return {"means": means, "rows": rows, "inner": inner, "present": here}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        away = self.embed(x) - adapted["means"][:, None]  # (way, Q, dim)
        along = away @ adapted["rows"].mT  # (way, Q, N)
        within = ((along @ adapted["inner"]) * along).sum(-1)
        return mask_absent(-0.5 * ((away.square().sum(-1) - within) / self.log_ridge.exp()).mT, adapted["present"])


def covariance_weights(member: Tensor, weight: Tensor) -> Tensor:
    """W ``(way, N, N)``, where ZᵀWₖZ = λₖΣₖ + (1 − λₖ)Σ for the support's features Z less their mean; the covariance of
    a single example is zero.

    Σₖ is taken around its class's own mean, which is Zᵀmₖ/nₖ: hence what is subtracted.
    """
    size, total = member.sum(0), weight.sum()
    share = size / (size + 1)  # λₖ
    of_class = (share / (size - 1).clamp_min(1.0))[:, None] * member.mT
    of_task = (1 - share)[:, None] * weight / (total - 1).clamp_min(1.0)
    mean = member.mT / torch.where(size > 0, size, 1.0)[:, None]
    return torch.diag_embed(of_class + of_task) - of_class[:, :, None] * mean[:, None, :]
