"""Honest confidence: one temperature, from what a learner says about support examples that it has not seen."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metafit.learners import Learner
from metafit.task import Examples, take

FOLDS = 5
ENOUGH = 400  # held-out examples that tell a temperature: further folds would only cost
GRID = torch.linspace(-7.0, 7.0, 561, dtype=torch.float64)


def temperature(held_out: tuple[Tensor, Tensor] | None, start: float, spread: float) -> float:
    """What logits are divided by before the softmax (temperature scaling, Guo et al., 2017, arXiv:1706.04599).

    It maximises the probability of held-out labels times a log-normal prior around ``start``, which keeps a handful
    of right answers from claiming certainty.

    Args:
        held_out: logits and labels of :func:`held_out`; where there are none, the temperature is ``start``.
        start, spread: median of the prior, and standard deviation of its logarithm, measured on other tasks.
    """
    if held_out is None:
        return start
    logits, y = held_out
    nll = torch.stack([F.cross_entropy(logits / t, y, reduction="sum") for t in GRID.exp()])
    penalty = (GRID - math.log(start)).square() / (2 * spread**2)
    return float(GRID[(nll + penalty).argmin()].exp())


def held_out(learner: Learner, support: Examples) -> tuple[Tensor, Tensor] | None:
    """Logits and labels of the support examples, each from a learner that adapted without it.

    The support set is cross-validated, each class spread over at most five folds, until 400 examples were held out;
    ``None`` where no class has two examples.

    Args:
        learner: the classifier; it adapts once a fold.
        support: labels ``(N,)`` from 0.
    """
    y = support.y
    counts = torch.bincount(y)
    folds = min(FOLDS, int(counts.max()))
    if folds < 2:
        return None
    order = y.argsort(stable=True)
    rank = torch.empty_like(y)
    rank[order] = torch.arange(len(y)) - (counts.cumsum(0) - counts)[y[order]]
    fold = torch.where(counts[y] > 1, rank % folds, -1)  # the only example of its class is never held out
    logits, labels = [], []
    for i in range(folds):
        seen, unseen = (torch.nonzero(mask)[:, 0] for mask in (fold != i, fold == i))
        adapted = learner.adapt(take(Examples(support.x, y, support.weight), seen))
        logits.append(learner.predict(adapted, take(support.x, unseen)).double())
        labels.append(y[unseen])
        if sum(map(len, labels)) >= ENOUGH:
            break
    return torch.cat(logits), torch.cat(labels)
