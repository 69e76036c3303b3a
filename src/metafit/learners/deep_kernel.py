"""A Gaussian process over a learned embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafit.learners.base import Adapted, Learner, logarithm
from metafit.losses import GaussianNLL
from metafit.losses.plain import LOG_2_PI
from metafit.task import Examples, Task, weights


class DeepKernelLearner(Learner):
    """The posterior of a Gaussian process with kernel s²·exp(−‖z − z'‖²/2ℓ²) and noise σ² on embeddings z (DKT,
    Patacchiola et al., 2020, arXiv:1910.05199, section 3).

    Training maximises the marginal likelihood of all of a task's targets, support and query; evaluation scores the
    predictive density of each query given the support set. Outputs are means and log-variances, noise included.

    Args:
        body: the embedding, from inputs to ``(N, dim)``.
        length: ℓ at the start; like s and σ a meta-parameter, learned as its logarithm.
        noise: σ at the start, in units of the target; s is 1.
    """

    gaussian = True

    def __init__(self, body: nn.Module, length: float = 1.0, noise: float = 0.1):
        super().__init__(None)
        self.body, self.criterion = body, GaussianNLL()
        self.log_length, self.log_noise = logarithm("length", length), logarithm("noise", noise)
        self.log_scale = logarithm("scale", 1.0)

    def embed(self, x: Any) -> Tensor:
        return self.body(x).to(self.log_length.dtype)  # a covariance in half precision is not positive definite

    def adapt(self, support: Examples) -> Adapted:
        z, weight = self.embed(support.x), weights(support)
        factor = torch.linalg.cholesky(self.covariance(z, weight))
        y = torch.where(weight[:, None] > 0, support.y.to(z.dtype), 0.0)
        return {"z": z, "weight": weight, "factor": factor, "dual": torch.cholesky_solve(y, factor)}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        z = self.embed(x)
        across = self.kernel(z, adapted["z"]) * (adapted["weight"] > 0)
        explained = torch.linalg.solve_triangular(adapted["factor"], across.mT, upper=False).square().sum(0)
        own = (2 * self.log_scale).exp()
        variance = (own - explained).clamp_min(0) + (2 * self.log_noise).exp()
        mean = across @ adapted["dual"]
        return torch.cat([mean, variance.log()[:, None].expand_as(mean)], -1)

    def loss(self, task: Task) -> tuple[Tensor, dict[str, Tensor]]:
        predictive, metrics = super().loss(task)
        if not self.training:
            return predictive, metrics
        parts = [task.support, task.query]
        z = torch.cat([self.embed(part.x) for part in parts])
        weight = torch.cat([weights(part) for part in parts])
        y = torch.where(weight[:, None] > 0, torch.cat([part.y for part in parts]).to(z.dtype), 0.0)
        n = (weight > 0).sum()
        return -log_density(y, self.covariance(z, weight), n) / n, metrics

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        square = (a[:, None] - b).square().sum(-1)
        return (2 * self.log_scale).exp() * (-0.5 * square * (-2 * self.log_length).exp()).exp()

    def covariance(self, z: Tensor, weight: Tensor) -> Tensor:
        """Of noisy targets; what does not count is on its own, with variance 1."""
        counts = weight > 0
        both = counts[:, None] & counts
        own = torch.where(counts, (2 * self.log_noise).exp(), 1.0)
        return torch.where(both, self.kernel(z, z), 0.0) + torch.diag_embed(own)


def log_density(y: Tensor, covariance: Tensor, n: Tensor) -> Tensor:
    """Of targets ``(N, D)``, n of which count, under a centred Gaussian in each dimension; summed over dimensions.

    A row that does not count is zero, and of variance 1.
    """
    factor = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(factor, y, upper=False)
    half_log_determinant = factor.diagonal(dim1=-2, dim2=-1).log().sum()
    return -0.5 * whitened.square().sum() - y.shape[-1] * (half_log_determinant + 0.5 * n * LOG_2_PI)
