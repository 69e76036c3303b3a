"""Logistic regression, solved to its optimum, as a differentiable head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafit.learners.base import Adapted, Learner, embed, logarithm, mask_absent, members
from metafit.learners.ridge import with_ones
from metafit.task import Examples

LENGTHS = tuple(2.0**-power for power in range(8))  # of a Newton step


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
        newton: int = 8,
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
        fixed = optimum(kernel.detach(), member, weight, here, penalty.detach(), self.newton)
        missed = residual(kernel, fixed, member, weight, here, penalty)
        known = probabilities(kernel, fixed, here).detach()
        dual = fixed - newton_step(kernel.detach(), known, weight, penalty.detach(), missed)
        return {"map": features.mT @ dual, "present": here}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        return mask_absent(self.embed(x) @ adapted["map"], adapted["present"])


@torch.no_grad()
def optimum(kernel: Tensor, member: Tensor, weight: Tensor, here: Tensor, penalty: Tensor, steps: int) -> Tensor:
    """The dual coefficients ``(N, way)``, by so many Newton steps from zero, each of the length of ``LENGTHS`` that
    takes the loss furthest down: whole ones alone may go in circles."""
    dual = torch.zeros_like(member)
    order, slack = torch.arange(len(LENGTHS), device=dual.device), torch.finfo(dual.dtype).eps ** 0.5
    for _ in range(steps):
        missed = residual(kernel, dual, member, weight, here, penalty)
        step = newton_step(kernel, probabilities(kernel, dual, here), weight, penalty, missed)
        candidates = torch.stack([dual - length * step for length in LENGTHS])
        scores = kernel @ candidates
        loss = (weight * mask_absent(scores, here).logsumexp(-1)).sum(-1) - (member * scores).sum((-1, -2))
        loss = loss + penalty / 2 * (candidates * scores).sum((-1, -2))
        good = loss <= loss.amin() + slack * (1 + loss.amin().abs())  # of steps that are as good, the longest
        dual = candidates.index_select(0, torch.where(good, order, len(order)).amin()[None])[0]
    return dual


def probabilities(kernel: Tensor, dual: Tensor, here: Tensor) -> Tensor:
    return mask_absent(kernel @ dual, here).softmax(-1)


def residual(kernel: Tensor, dual: Tensor, member: Tensor, weight: Tensor, here: Tensor, penalty: Tensor) -> Tensor:
    """λA + w·(P − Y), zero at the optimum; ``member`` is w·Y."""
    return penalty * dual + weight[:, None] * probabilities(kernel, dual, here) - member


def newton_step(kernel: Tensor, probability: Tensor, weight: Tensor, penalty: Tensor, value: Tensor) -> Tensor:
    """J⁻¹ times a residual ``(N, way)``, where J = λI + (D − ΠΠᵀ)K is the residual's derivative in A.

    One system of N unknowns for each class and one for all of them, in place of one of N × way (Rasmussen and Williams,
    2006, section 3.5, algorithm 3.3; here with the examples' weights).
    """
    kernel = kernel / penalty
    root = (weight[:, None] * probability).mT.sqrt()  # √D, (way, N)
    one = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    factor = torch.linalg.cholesky(one + root[:, :, None] * kernel * root[:, None, :])
    inner = root[:, :, None] * torch.cholesky_solve(torch.diag_embed(root), factor)  # (K + D⁻¹)⁻¹ of each class
    nobody = torch.diag_embed((weight == 0).to(kernel.dtype))  # padding says nothing: its rows are zero
    said = (inner @ (kernel @ value).mT[:, :, None])[..., 0]
    shared = torch.linalg.solve(inner.sum(0) + nobody, said.sum(0))
    return (value - (said - inner @ shared).mT) / penalty
