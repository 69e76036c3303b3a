"""What a forest of decision trees says of each row: rules that no distance and no regression sees.

Extremely randomised trees (Geurts et al., 2006, https://doi.org/10.1007/s10994-006-6226-1), all grown at once, level by
level: a node draws columns, cuts each somewhere between the ends of its rows, and keeps the cut after which Gini's
impurity is least. Each tree is grown on two thirds of the support rows, so that the others are told by trees that have
not seen them (out of bag; Breiman, 2001).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metafit.learners.parts import at_once, in_parts

TREES, DEPTH, CUTS = 32, 5, 10  # CUTS are tried at a node
LEFT_OUT = 3  # a tree does not see one row in so many
PRIOR = 0.1  # rows that the classes' shares count for in a leaf


class Forest(NamedTuple):
    """Trees over F columns, for S slots. Nodes are numbered level by level, the children of ``n`` 2n + 1 and 2n + 2.

    Attributes:
        columns: that a node cuts ``(TREES, nodes)``.
        cuts: a row with more than this goes to the second child ``(TREES, nodes)``; infinite where nothing is cut.
        leaves: the probability of each slot ``(TREES, leaves, S)``.
    """

    columns: Tensor
    cuts: Tensor
    leaves: Tensor

    def of(self, rows: Tensor) -> Tensor:
        """The mean of the trees ``(Q, S)`` for rows ``(Q, F)``."""
        return in_parts(lambda part: self._each(part).mean(0), TREES * self.leaves.shape[-1], rows)

    def _each(self, rows: Tensor) -> Tensor:
        """What each tree says ``(TREES, Q, S)``."""
        node = torch.zeros(len(self.cuts), len(rows), dtype=torch.long, device=rows.device)
        for _ in range(DEPTH):
            value = _take(rows, self.columns.gather(1, node)[..., None])[..., 0]
            node = 2 * node + 1 + (value > self.cuts.gather(1, node)).long()
        return _of_nodes(self.leaves, node - (2**DEPTH - 1))


def forest(rows: Tensor, labels: Tensor, told: Tensor) -> tuple[Forest, Tensor]:
    """The forest, and what each support row is told by the trees that have not seen it ``(N, S)``.

    Neither the order of the rows nor padding matters, but for ties.

    Args:
        rows: the support rows ``(N, F)``.
        labels: one-hot ``(N, S)``, zero for padding.
        told: of each column, above 0 where it varies ``(F,)``; those that do come first.
    """
    rows, real = rows.detach(), labels.sum(-1) > 0
    share = labels.sum(0) / real.sum().clamp_min(1)
    turn, where = (drawn.to(rows) for drawn in _chance(rows.shape[-1]))
    columns = (where[0] * (told > 0).sum().clamp_min(1)).long().clamp_max(rows.shape[-1] - 1)
    # Systematic sampling: every third row along a direction of the tree's own.
    along = (turn @ rows.mT).masked_fill(~real, torch.inf).argsort(dim=-1, stable=True).argsort(-1)  # (TREES, N)
    first = torch.arange(TREES, device=rows.device)[:, None] % LEFT_OUT
    seen = (along % LEFT_OUT != first) & real
    some = at_once(CUTS * len(rows))  # trees that are grown together
    grown, total, voices = [], torch.zeros_like(labels), torch.zeros_like(labels[:, :1])
    for part in zip(columns.split(some), where[1].split(some), seen.split(some), strict=True):
        *trees, said = _grow(rows, labels, share, *part)
        unseen = (~part[2] & real)[..., None]
        total, voices = total + (said * unseen).sum(0), voices + unseen.sum(0)
        grown.append(trees)
    columns, cuts, leaves = (torch.cat(part) for part in zip(*grown, strict=True))
    return Forest(columns, cuts, leaves), torch.where(voices > 0, total / voices.clamp_min(1), share)


@torch.compiler.assume_constant_result
def _chance(columns: int) -> tuple[Tensor, Tensor]:
    """A direction of each tree ``(TREES, columns)``; where each node cuts, ``(2, TREES, nodes, CUTS)`` of 0 to 1.

    The numbers are numpy's, always the same: torch draws none while tasks are mapped over.
    """
    chance = np.random.default_rng(0)
    turn, where = chance.standard_normal((TREES, columns)), chance.random((2, TREES, 2**DEPTH - 1, CUTS))
    return torch.from_numpy(turn), torch.from_numpy(where)


def _grow(
    rows: Tensor, labels: Tensor, share: Tensor, columns: Tensor, where: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Some trees: their columns, cuts and leaves, and what they say of each row.

    Args:
        columns, where: of each node's cuts ``(trees, nodes, CUTS)``: the column, and the place between the ends.
        seen: rows that a tree is grown on ``(trees, N)``.
    """
    trees, slots, y = len(seen), labels.shape[-1], labels.argmax(-1)
    weight, at = seen.to(rows.dtype), torch.zeros_like(seen, dtype=torch.long)  # at: the row's node within its level
    chosen, cuts = [], []
    for level in range(DEPTH):
        nodes = 2**level
        here = slice(nodes - 1, 2 * nodes - 1)
        column, place = columns[:, here], at[..., None].expand(-1, -1, CUTS)
        value = _take(rows, column.gather(1, place))  # (trees, N, CUTS)
        ends = []
        for end, reduce in ((torch.inf, "amin"), (-torch.inf, "amax")):
            known = value.masked_fill(~seen[..., None], end)
            start = torch.full((trees, nodes, CUTS), end, dtype=rows.dtype, device=rows.device)
            ends.append(start.scatter_reduce(1, place, known, reduce))
        cut = ends[0] + where[:, here] * (ends[1] - ends[0])
        beyond = (value > cut.gather(1, place)).to(rows.dtype) * weight[..., None]
        of = at * slots + y  # node and slot
        zeros = torch.zeros(trees, nodes * slots, CUTS, dtype=rows.dtype, device=rows.device)
        right = zeros.scatter_add(1, of[..., None].expand(-1, -1, CUTS), beyond).reshape(trees, nodes, slots, CUTS)
        total = zeros[..., 0].scatter_add(1, of, weight).reshape(trees, nodes, slots, 1)
        purity, best = (_purity(right) + _purity(total - right)).max(-1, keepdim=True)
        better = purity > _purity(total) * (1 + 1e-5)
        chosen.append(column.gather(-1, best)[..., 0])
        cuts.append(torch.where(better, cut.gather(-1, best), torch.inf)[..., 0])
        value = _take(rows, chosen[-1].gather(1, at)[..., None])[..., 0]
        at = 2 * at + (value > cuts[-1].gather(1, at)).long()
    zeros = torch.zeros(trees, 2**DEPTH * slots, dtype=rows.dtype, device=rows.device)
    held = zeros.scatter_add(1, at * slots + y, weight).reshape(trees, 2**DEPTH, slots)
    leaves = (held + PRIOR * share) / (held.sum(-1, keepdim=True) + PRIOR)
    return torch.cat(chosen, 1), torch.cat(cuts, 1), leaves, _of_nodes(leaves, at)


def _purity(counts: Tensor) -> Tensor:
    """Of rows of each slot ``(trees, nodes, S, CUTS)``: their number times one minus Gini's impurity."""
    return counts.square().sum(2) / counts.sum(2).clamp_min(1)


def _take(rows: Tensor, columns: Tensor) -> Tensor:
    """Of each row ``(N, F)``, the values in its columns ``(trees, N, C)``."""
    return rows.expand(len(columns), -1, -1).gather(-1, columns)


def _of_nodes(values: Tensor, at: Tensor) -> Tensor:
    """The values ``(trees, nodes, S)`` of the nodes ``(trees, N)`` that rows are in."""
    return values.gather(1, at[..., None].expand(-1, -1, values.shape[-1]))
