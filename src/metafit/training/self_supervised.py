"""Pretraining without labels: two views of an example are alike, or what was changed is found and mended.

What comes out is a body to start meta-training from, and embeddings to cluster (``data.clusters``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metafit.data.randomness import derive, keys
from metafit.data.source import Source
from metafit.data.views import Marginal, View, changed
from metafit.errors import BadInput
from metafit.losses.contrastive import contrastive
from metafit.training.descend import check_trainable, descend


def nt_xent(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], temperature: float = 0.5) -> Tensor:
    """SimCLR's loss (Chen et al., 2020, arXiv:2002.05709, eq. 1): of 2N views, each is told from the 2N − 2 of other
    examples as the partner of its own; the mean over the 2N of −log of the softmax of cosines over temperature."""
    number = torch.arange(len(a), device=a.device).repeat(2)
    return contrastive(torch.cat([a, b]), number, a.new_ones(len(number)), temperature)


def vicreg(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "n d"],
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Tensor:
    """Bardes et al., 2022, arXiv:2105.04906, eq. 1 to 6: λ·s(a, b) + μ·½(v(a) + v(b)) + ν·(c(a) + c(b)).

    s is the mean squared difference, v how far each dimension's standard deviation is below 1 on average, c the sum of
    the squared covariances of different dimensions over d. Means over dimensions in s, and the half, are as in the
    authors' code, for which the weights were chosen.
    """
    spread = [F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (a, b)]
    between = [_off_diagonal(z.T.cov()).square().sum() / z.shape[1] for z in (a, b)]
    return invariance * F.mse_loss(a, b) + variance * (spread[0] + spread[1]) / 2 + covariance * sum(between)


def pretrain_alike(
    body: nn.Module,
    source: Source,
    dim: int,
    augment: Sequence[View],
    loss: Callable[[Tensor, Tensor], Tensor] = nt_xent,
    steps: int = 1000,
    batch: int = 256,
    rate: float = 1e-3,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    show_progress: bool = True,
) -> list[float]:
    """Trains ``body`` under a two-layer projection so that two views of an example are alike and examples are not.

    With ``nt_xent`` this is SimCLR; with ``nt_xent`` over ``Marginal`` views of a table, SCARF, but that both views are
    changed; with ``vicreg``, VICReg.

    Args:
        body: from inputs to ``(N, dim)``; trained in place. The projection is thrown away.
        source: examples, ``x`` a tensor; labels are not read.
        augment: what makes a view, one after the other.
        loss: of the projections of both views, each ``(batch, dim)``.
        steps, batch, rate: of AdamW, its rate annealed to 0 along a cosine.
        seed: of the order of the examples, and of the views.
        out, resume: as in ``descend``.

    Returns:
        The loss of every step.

    Raises:
        BadInput: the source holds raw items, or the body has nothing to train.
    """
    check_trainable(body, source)
    projection = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def of(rows: Tensor, step: int) -> Tensor:
        key = _keys(seed, step, batch)
        a, b = (projection(body(changed(source.x[rows], derive(key, i), augment))) for i in (0, 1))
        return loss(a, b)

    work = {"method": "alike", "loss": getattr(loss, "__name__", ""), "source": source.name}
    return descend([body, projection], of, len(source), steps, batch, rate, seed, out, resume, work, show_progress)


def pretrain_denoising(
    body: nn.Module,
    source: Source,
    dim: int,
    share: float = 0.3,
    weight: float = 2.0,
    steps: int = 1000,
    batch: int = 128,
    rate: float = 1e-3,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    show_progress: bool = True,
) -> list[float]:
    """Trains ``body`` on rows of a table with values of other rows in them: two linear layers over its features tell
    which entries were changed, and what they were (Yoon et al., 2020, VIME, NeurIPS, eq. 1 to 4).

    Args:
        body: from rows to ``(N, dim)``; trained in place.
        source: rows ``(N, columns)``, of columns on one scale; labels are not read.
        share: of the entries that are changed.
        weight: α of the squared error beside the binary cross-entropy of what was changed.
        steps, batch, rate, seed, out, resume: as in ``pretrain_alike``.

    Returns:
        The loss of every step.

    Raises:
        BadInput: as ``pretrain_alike``, or where ``x`` is not rows of floats.
    """
    check_trainable(body, source)
    if not isinstance(source.x, Tensor) or source.x.ndim != 2:
        raise BadInput(f"pretrain: {source.name!r} holds no rows of numbers to restore")
    corrupt = Marginal(source.x, share)
    columns = source.x.shape[1]
    found, mended = nn.Linear(dim, columns), nn.Linear(dim, columns)

    def of(rows: Tensor, step: int) -> Tensor:
        x = source.x[rows]
        noisy = corrupt(x, _keys(seed, step, batch))
        features = body(noisy)
        return denoising(x, noisy, found(features), mended(features), weight)

    work = {"method": "denoise", "share": share, "weight": weight, "source": source.name}
    return descend([body, found, mended], of, len(source), steps, batch, rate, seed, out, resume, work, show_progress)


def denoising(
    x: Float[Tensor, "n d"],
    noisy: Float[Tensor, "n d"],
    found: Float[Tensor, "n d"],
    mended: Float[Tensor, "n d"],
    weight: float,
) -> Tensor:
    """Binary cross-entropy of the logits ``found`` of an entry being changed, plus ``weight`` times the squared error
    of ``mended``. An entry whose new value is the old one was not changed."""
    return F.binary_cross_entropy_with_logits(found, (noisy != x).to(x.dtype)) + weight * F.mse_loss(mended, x)


def _off_diagonal(square: Tensor) -> Tensor:
    return square - torch.diag(square.diagonal())


def _keys(seed: int, step: int, batch: int) -> Tensor:
    """One key an example of the step."""
    return torch.from_numpy(keys(seed, np.arange(step * batch, (step + 1) * batch)))
