"""Supervised pretraining: an ordinary classifier over all training classes, whose body the baselines start from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn
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
    check_trainable(body, source)
    top = nn.Linear(dim, len(source.classes))

    def loss(rows: Tensor, step: int) -> Tensor:
        return F.cross_entropy(top(body(tree_map(lambda leaf: leaf[rows], source.x))), source.y[rows])

    return descend([body, top], loss, len(source), steps, batch, rate, seed, show_progress)


def check_trainable(body: nn.Module, source: Source) -> None:
    """Raises ``BadInput`` where the source holds raw items, or the body has nothing to train."""
    if isinstance(source.x, list):
        raise BadInput(f"source {source.name!r} holds raw {source.modality}: preprocess it with a backbone first")
    if not any(p.requires_grad for p in body.parameters()):
        raise BadInput("pretrain: the network has no parameter that requires a gradient; call body.requires_grad_()")


def descend(
    modules: Sequence[nn.Module],
    loss: Callable[[Int64[Tensor, " batch"], int], Tensor],
    examples: int,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    show_progress: bool,
) -> list[float]:
    """Lowers the loss of random rows, a function of the rows and the step, in the parameters of the modules.

    AdamW, its rate annealed to 0 along a cosine.

    Returns:
        The loss of every step.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for module in modules for p in module.parameters() if p.requires_grad], rate)
    losses: list[float] = []
    for module in modules:
        module.train()
    with progress("pretrain", steps, "steps", show_progress) as advance:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            now = loss(torch.randint(examples, (batch,), generator=generator), step)
            optimizer.zero_grad()
            now.backward()
            optimizer.step()
            losses.append(now.item())
            advance(1, loss=losses[-1])
    return losses
