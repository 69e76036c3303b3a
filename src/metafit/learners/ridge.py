"""Ridge regression in closed form as a differentiable head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafit.learners.base import Adapted, Learner, embed, logarithm, mask_absent, members
from metafit.task import Examples, weights


class RidgeLearner(Learner):
    """W = (XᵀX + λI)⁻¹XᵀY, and outputs α·xW (R2D2, Bertinetto et al., 2019, arXiv:1805.08136, eq. 3-6).

    X has a column of ones for the bias; Y is one-hot, or the targets of a regression. λ and α are meta-parameters,
    learned as logarithms. (The paper's β moves all logits of a query alike, which the softmax does not see.) The
    system that is solved has the size of the support set or of the features, whichever is less.

    Args:
        body: the embedding, from inputs to ``(N, dim)``.
        way: the most classes of a task, ``None`` for regression, where α is 1.
        penalty: λ at the start.
        scale: α at the start.
        normalise: whether features are scaled to length 1.
    """

    def __init__(
        self, body: nn.Module, way: int | None, penalty: float = 1.0, scale: float = 10.0, normalise: bool = False
    ):
        super().__init__(way)
        self.body, self.normalise = body, normalise
        self.log_penalty = logarithm("penalty", penalty)
        self.log_scale = logarithm("scale", scale) if way is not None else None

    def embed(self, x: Any) -> Tensor:
        return with_ones(embed(self.body, x, self.normalise))

    def adapt(self, support: Examples) -> Adapted:
        features = self.embed(support.x)
        root = weights(support).to(features.dtype).sqrt()[:, None]  # weighted least squares: rows times √weight
        targets = support.y if self.way is None else members(support._replace(weight=None), self.way)
        found = ridge(root * features, root * targets.to(features.dtype), self.log_penalty.exp())
        return {"map": found} if self.way is None else {"map": found, "present": members(support, self.way).sum(0) > 0}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        outputs = self.embed(x) @ adapted["map"]
        return outputs if self.log_scale is None else mask_absent(self.log_scale.exp() * outputs, adapted["present"])


def with_ones(features: Tensor) -> Tensor:
    """Features ``(N, dim + 1)`` whose last column is the bias's."""
    return torch.cat([features, torch.ones_like(features[:, :1])], -1)


def ridge(x: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    """(XᵀX + λI)⁻¹XᵀY, by Woodbury's identity where there are fewer rows than columns."""
    rows, columns = x.shape
    if rows < columns:
        return x.mT @ solve(x @ x.mT, penalty, y)
    return solve(x.mT @ x, penalty, x.mT @ y)


def solve(gram: Tensor, penalty: Tensor, y: Tensor) -> Tensor:
    """(G + λI)⁻¹Y of a positive semi-definite G."""
    factor = torch.linalg.cholesky(gram + penalty * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    return torch.cholesky_solve(y, factor)
