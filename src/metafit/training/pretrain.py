"""Supervised pretraining: an ordinary classifier over all training classes, whose body everything else starts from."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from metafit.backbones.pictures import unit_floats
from metafit.data.source import Source
from metafit.errors import BadInput
from metafit.training.descend import check_trainable, descend, inputs


def pretrain(
    body: nn.Module,
    source: Source,
    dim: int,
    head: Callable[[int, int], nn.Module] = nn.Linear,
    mixup: float = 0.0,
    steps: int = 1000,
    batch: int = 128,
    rate: float = 1e-3,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    show_progress: bool = True,
) -> list[float]:
    """Trains ``body`` under a head over the source's classes by cross-entropy.

    With ``nn.Linear`` this is the Baseline of Chen et al. (2019, arXiv:1904.04232), with ``CosineHead`` of
    ``metafit.learners.heads`` their Baseline++, whose features are told apart by their angles.

    Args:
        body: from inputs to ``(N, dim)``; trained in place.
        source: the meta-training classes.
        head: makes the layer over the features, of ``dim`` and the number of classes; thrown away in the end.
        mixup: a of Beta(a, a), from which each batch draws the share of its mixtures; 0 mixes nothing. See ``blended``.
        steps, batch, rate: of AdamW, its rate annealed to 0 along a cosine.
        seed: of the order of the examples, and of the mixtures.
        out, resume: as in ``descend``.

    Returns:
        The loss of every step.

    Raises:
        BadInput: the source holds raw items, the body has nothing to train, ``mixup`` is below 0, or as ``descend``.
    """
    check_trainable(body, source)
    if not mixup >= 0:
        raise BadInput(f"mixup {mixup}: needs 0 (nothing is mixed) or more")
    top = head(dim, len(source.classes))

    def loss(rows: Tensor, step: int) -> Tensor:
        x, y = inputs(body, source.x, rows), source.y[rows]
        if not mixup:
            return F.cross_entropy(top(body(x)), y)
        share = float(np.random.default_rng([seed, step]).beta(mixup, mixup))
        return blended(body, top, x, y, share)

    work = {
        "method": "supervised",
        "head": type(top).__name__,
        "mixup": mixup,
        "source": source.name,
        "classes": source.classes,
    }
    return descend([body, top], loss, len(source), steps, batch, rate, seed, out, resume, work, show_progress)


def blended(body: nn.Module, top: nn.Module, x: Any, y: Int64[Tensor, " n"], share: float) -> Tensor:
    """The loss of mixtures: of each example, by ``share``, and the one before it (Zhang et al., 2018, mixup,
    arXiv:1710.09412): λ·x_i + (1 − λ)·x_{i−1} under λ·loss(y_i) + (1 − λ)·loss(y_{i−1}).

    Tokens cannot be mixed: of texts, the features are (Guo et al., 2019, arXiv:1905.08941, senMixup). Bytes of images
    become 0 to 1 first, as a backbone would read them.
    """

    def mixed(z: Tensor) -> Tensor:
        return share * z + (1 - share) * z.roll(1, 0)

    if isinstance(x, Tensor) and (x.is_floating_point() or x.dtype == torch.uint8):
        features = body(mixed(unit_floats(x, next(body.parameters()).dtype)))
    else:
        features = mixed(body(x))
    logits = top(features)
    return share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y.roll(1))
