"""What simple predictors that need no training say of each row: ridge regressions, kernel votes, naive Bayes, trees.

Every one is told for the support rows too, each without that row itself (leave one out; of trees, those that have not
seen it), so that whoever reads them can see which of them is right on this table.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metafit.learners.forest import Forest, forest
from metafit.learners.parts import in_parts

RIDGES = ((0, 0.03), (0, 1.0), (1, 0.1))  # which shares of the columns, and the penalty
OPINIONS = len(RIDGES) + 5  # of each row, one score a slot
TAIL = 4.0  # no value of a row is larger
PERIOD, WAVES = 12.0, 30  # of the series of exp(−2d²): good to 1e-13 where |d| ≤ 2·TAIL
_NEVER = -1e30  # the logit of one who has no voice


class Opinions(NamedTuple):
    """What they remember of the support set: S slots, N rows, F columns.

    Attributes:
        rows: the support rows, columns of variance 1, ``(N, F)``.
        labels: the slot of each ``(N, S)``, one-hot; zero for padding.
        shares: how much each column counts ``(2, F)``: alike, and by how well it tells the classes apart; sums are 1.
        ridges: the weights of the ridge regressions ``(3, F, S)``.
        reach: the squared distances at which an example's vote falls to 1/e, under either shares ``(2,)``.
        densities: in each column, the series of the sum of each slot's kernels ``(F, 2·WAVES + 1, S)``.
        trees: the ``Forest``, as a mapping.
    """

    rows: Tensor
    labels: Tensor
    shares: Tensor
    ridges: Tensor
    reach: Tensor
    densities: Tensor
    trees: dict[str, Tensor]

    def of(self, queries: Tensor) -> Tensor:
        """``(Q, OPINIONS, S)`` of rows ``(Q, F)``."""
        ridges = [(queries * self.shares[which]) @ ridge for (which, _), ridge in zip(RIDGES, self.ridges, strict=True)]
        nobody = torch.full((len(queries),), -1, device=queries.device)
        by_rules = Forest(**self.trees).of(queries)[:, None]
        return torch.cat([torch.stack(ridges, -2), self.votes(queries, nobody), by_rules], -2)

    def votes(self, queries: Tensor, own: Tensor) -> Tensor:
        """The opinions ``(Q, 4, S)`` in which every support row has a voice but the ``own`` one of a query ``(Q,)``."""
        left_out = torch.where(own[:, None] >= 0, self.labels[own], 0.0)  # (Q, S)
        near = in_parts(self._near, len(self.rows), queries, own)
        voices = self.labels.sum() - left_out.sum(-1)
        near = torch.where(voices[:, None, None] > 0, near, 0.0)
        by_column = in_parts(self._by_column, self.densities[..., 0].numel(), queries, left_out)
        return torch.cat([near, by_column], -2)

    def _near(self, queries: Tensor, own: Tensor) -> Tensor:
        """Votes of the rows by their distance ``(Q, 2, S)``; what all distances of a query share is left out."""
        hidden = _hidden(own, self.labels)
        said = []
        for share, reach in zip(self.shares, self.reach, strict=True):
            nearness = (queries * (2 * share / reach)) @ self.rows.mT - self.rows.square() @ (share / reach)
            said.append(nearness.masked_fill(hidden, _NEVER).softmax(-1) @ self.labels)
        return torch.stack(said, -2)

    def _by_column(self, queries: Tensor, left_out: Tensor) -> Tensor:
        """Naive Bayes ``(Q, 2, S)``, by either shares: the density of each slot's rows in each column, by a kernel;
        log-densities are summed."""
        size = self.labels.sum(0) - left_out
        density = (_waves(queries) @ self.densities - left_out) / size.clamp_min(1)  # (F, Q, S); k(0) = 1
        columns = (self.shares[0] > 0).sum().clamp_min(1).to(queries.dtype)
        score = torch.einsum("fqs,wf->qws", (density.clamp_min(0) + 0.02).log(), self.shares) * columns.sqrt()
        return score.masked_fill(size[:, None] == 0, -1e4).softmax(-1)


def opinions(rows: Tensor, labels: Tensor, told: Tensor) -> tuple[Opinions, Tensor]:
    """What is remembered, and what is said of the support rows themselves ``(N, OPINIONS, S)``.

    Args:
        rows: the support rows, of mean 0 and variance 1 in each column ``(N, F)``, none beyond ``TAIL``.
        labels: one-hot ``(N, S)``, zero for padding.
        told: of each column's variance, the share that is between the classes ``(F,)``.
    """
    real = labels.sum(-1)
    shares = torch.stack([(told > 0).to(rows.dtype), told / (1.05 - told)])
    shares = shares / shares.sum(-1, keepdim=True).clamp_min(1e-6)
    centred = (labels - labels.sum(0) / real.sum().clamp_min(1)) * real[:, None]
    ridges, left_out = zip(
        *(_ridge(rows * real[:, None], centred, shares[which], penalty) for which, penalty in RIDGES), strict=True
    )
    own = torch.arange(len(rows), device=rows.device)
    reach = torch.stack([_reach(rows, labels, own, s) for s in shares])
    grown, out_of_bag = forest(rows, labels, told)
    known = Opinions(rows, labels, shares, torch.stack(ridges), reach, _waves(rows).mT @ labels, grown._asdict())
    return known, torch.cat([torch.stack(left_out, -2), known.votes(rows, own), out_of_bag[:, None]], -2)


def _ridge(rows: Tensor, targets: Tensor, shares: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights ``(F, S)``, for rows times shares, and what each row is told by the regression without it ``(N, S)``."""
    one = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    inverse = torch.linalg.inv(rows.mT @ (rows * shares) + penalty * one)
    weights = inverse @ (rows.mT @ targets)
    leverage = ((rows * shares) @ inverse * rows).sum(-1, keepdim=True)
    return weights, targets - (targets - (rows * shares) @ weights) / (1 - leverage)


def _reach(rows: Tensor, labels: Tensor, own: Tensor, shares: Tensor) -> Tensor:
    """The mean squared distance of a row to the nearest other one."""

    def nearest(part: Tensor, own: Tensor) -> Tensor:
        return _apart(part, rows, shares).masked_fill(_hidden(own, labels), torch.inf).amin(-1)

    found, real = in_parts(nearest, len(rows), rows, own), labels.sum(-1)
    found = torch.where(found.isfinite() & (real > 0), found, 0.0)
    return found.sum() / real.sum().clamp_min(1) + 1e-3


def _waves(rows: Tensor) -> Tensor:
    """``(F, N, 2·WAVES + 1)``, the products of which are exp(−2(a − b)²) of the values ``(N, F)``: the Fourier series
    of that kernel, repeated far enough apart. So a sum of kernels is a product, in time that is linear in the rows."""
    frequency = torch.arange(WAVES + 1, dtype=rows.dtype, device=rows.device) * (2 * math.pi / PERIOD)
    size = (torch.exp(-frequency.square() / 8) * (2 * math.pi) ** 0.5 / PERIOD).sqrt()
    size = torch.cat([size[:1] / 2**0.5, size[1:]])
    angle = rows.mT[..., None] * frequency
    return torch.cat([angle.cos() * size, angle[..., 1:].sin() * size[1:]], -1)


def _apart(a: Tensor, b: Tensor, shares: Tensor) -> Tensor:
    """Mean squared differences ``(N, M)``."""
    return (a.square() @ shares[:, None] - 2 * (a * shares) @ b.mT + b.square() @ shares).clamp_min(0)


def _hidden(own: Tensor, labels: Tensor) -> Tensor:
    """Which support rows a query is not told by ``(Q, N)``: padding, and itself."""
    return (own[:, None] == torch.arange(len(labels), device=own.device)) | (labels.sum(-1) == 0)
