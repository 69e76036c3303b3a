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

    Qₖ⁻¹ is never formed: with 2N rows U such that Qₖ = UᵀU + βI, Woodbury's identity needs a solution of size 2N.

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
        features = self.embed(support.x)
        means, here = class_means(features, support, self.way)
        rows = spread(features, means, support, self.way)
        small = rows @ rows.mT + self.log_ridge.exp() * torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
        return {"means": means, "rows": rows, "factor": torch.linalg.cholesky(small), "present": here}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        rows, ridge = adapted["rows"], self.log_ridge.exp()
        away = self.embed(x) - adapted["means"][:, None]  # (way, Q, dim)
        along = rows @ away.mT  # (way, 2N, Q)
        within = torch.linalg.solve_triangular(adapted["factor"], along, upper=False).square().sum(-2)
        return mask_absent(-0.5 * ((away.square().sum(-1) - within) / ridge).mT, adapted["present"])


def spread(features: Tensor, means: Tensor, support: Examples, way: int | None) -> Tensor:
    """U ``(way, 2N, dim)``, UᵀU = λₖΣₖ + (1 − λₖ)Σ; of a single example the covariance is zero."""
    assert way is not None
    weight, member = weights(support).to(features.dtype), members(support, way).to(features.dtype)
    size, total = member.sum(0), weight.sum()
    share = size / (size + 1)  # λₖ
    centre = (weight @ features) / total.clamp_min(torch.finfo(features.dtype).tiny)
    of_class = share[:, None] * member.mT / (size - 1).clamp_min(1.0)[:, None]
    of_task = (1 - share)[:, None] * weight / (total - 1).clamp_min(1.0)
    return torch.cat(
        [
            of_class.sqrt()[..., None] * (features - means[:, None]),
            of_task.sqrt()[..., None] * (features - centre),
        ],
        -2,
    )
