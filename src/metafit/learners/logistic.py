"""Logistic regression, solved to its optimum, as a differentiable head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafit.learners.base import Adapted, Learner, embed, logarithm, mask_absent, members
from metafit.learners.ridge import with_ones
from metafit.task import Examples


class LogisticLearner(Learner):
    """argmin over W of Σᵢ CE(s·Wxᵢ, yᵢ) + λ/2·‖W‖², and logits s·Wx, differentiated through the optimum (MetaOptNet,
    Lee et al., 2019, arXiv:1904.03758, with their logistic in place of their hinge loss).

    W is in the span of the support set, so the unknowns are N × way dual coefficients A with λA + P − Y = 0, where P
    are the probabilities. Newton's method solves that; one more step from the solution, whose matrix is held fixed,
    has the derivative of the implicit function theorem.

    Args:
        body: the embedding, from inputs to ``(N, dim)``.
        way: the most classes of a task.
        penalty: λ at the start; a meta-parameter (learned as its logarithm).
        scale: s at the start; likewise.
        normalise: whether features are scaled to length 1.
        newton: steps of Newton's method.
    """

    def __init__(
        self,
        body: nn.Module,
        way: int,
        penalty: float = 1.0,
        scale: float = 1.0,
        normalise: bool = False,
        newton: int = 15,
    ):
        super().__init__(way)
        self.body, self.normalise, self.newton = body, normalise, newton
        self.log_penalty = logarithm("penalty", penalty)
        self.log_scale = logarithm("scale", scale)

    def embed(self, x: Any) -> Tensor:
        return self.log_scale.exp() * with_ones(embed(self.body, x, self.normalise))

    def adapt(self, support: Examples) -> Adapted:
        assert self.way is not None
        features, member = self.embed(support.x), members(support, self.way)
        weight, here = member.sum(-1).to(features.dtype), member.sum(0) > 0
        kernel, penalty = features @ features.mT, self.log_penalty.exp()
        member = member.to(features.dtype)
        dual = optimum(kernel.detach(), member, weight, here, penalty.detach(), self.newton)
        fixed, slope = dual.detach(), jacobian(kernel, dual, weight, here, penalty).detach()
        dual = fixed - newton_step(slope, residual(kernel, fixed, member, weight, here, penalty))
        return {"map": features.mT @ dual, "present": here}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        return mask_absent(self.embed(x) @ adapted["map"], adapted["present"])


@torch.no_grad()
def optimum(kernel: Tensor, member: Tensor, weight: Tensor, here: Tensor, penalty: Tensor, steps: int) -> Tensor:
    """The dual coefficients ``(N, way)``, by so many Newton steps from zero."""
    dual = torch.zeros_like(member)
    for _ in range(steps):
        slope = jacobian(kernel, dual, weight, here, penalty)
        dual = dual - newton_step(slope, residual(kernel, dual, member, weight, here, penalty))
    return dual


def residual(kernel: Tensor, dual: Tensor, member: Tensor, weight: Tensor, here: Tensor, penalty: Tensor) -> Tensor:
    """λA + w·(P − Y), zero at the optimum; ``member`` is w·Y."""
    probability = mask_absent(kernel @ dual, here).softmax(-1)
    return penalty * dual + weight[:, None] * probability - member


def jacobian(kernel: Tensor, dual: Tensor, weight: Tensor, here: Tensor, penalty: Tensor) -> Tensor:
    """Of the residual in A, ``(N, way, N, way)``: λ on the diagonal, and K on each pair of classes."""
    n, way = dual.shape
    p = mask_absent(kernel @ dual, here).softmax(-1)
    spread = weight[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    return spread[:, :, None, :] * kernel[:, None, :, None] + penalty * torch.eye(
        n * way, dtype=dual.dtype, device=dual.device
    ).view(n, way, n, way)


def newton_step(slope: Tensor, value: Tensor) -> Tensor:
    n, way = value.shape
    return torch.linalg.solve(slope.reshape(n * way, n * way), value.reshape(-1)).view(n, way)
