"""Supervised pretraining: an ordinary classifier over all training classes, whose body the baselines start from."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from metafit.data.source import Source
from metafit.errors import BadInput
from metafit.progress import progress


def pretrain(
    body: nn.Module,
    source: Source,
    dim: int,
    steps: int = 1000,
    batch: int = 128,
    rate: float = 1e-3,
    seed: int = 0,
    show_progress: bool = True,
) -> list[float]:
    """Trains ``body`` with a linear layer over the source's classes by cross-entropy (Chen et al., 2019, Baseline).

    Args:
        body: from inputs to ``(N, dim)``; trained in place.
        source: the meta-training classes.
        steps, batch, rate: of AdamW, its rate annealed to 0 along a cosine.
        seed: of the order of the examples.

    Returns:
        The loss of every step.

    Raises:
        BadInput: the source holds raw items, or the body has nothing to train.
    """
    if isinstance(source.x, list):
        raise BadInput(f"source {source.name!r} holds raw {source.modality}: preprocess it with a backbone first")
    trainable = [p for p in body.parameters() if p.requires_grad]
    if not trainable:
        raise BadInput("pretrain: the network has no parameter that requires a gradient; call body.requires_grad_()")
    generator = torch.Generator().manual_seed(seed)
    top = nn.Linear(dim, len(source.classes))
    optimizer = torch.optim.AdamW([*trainable, *top.parameters()], rate)
    losses: list[float] = []
    body.train()
    with progress("pretrain", steps, "steps", show_progress) as advance:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            rows = torch.randint(len(source), (batch,), generator=generator)
            loss = F.cross_entropy(top(body(tree_map(lambda leaf, rows=rows: leaf[rows], source.x))), source.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            advance(1, loss=losses[-1])
    return losses
