"""Plain gradient descent over random batches of examples: what every pretraining does."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metafit.backbones import pack
from metafit.data.source import Source, is_raw
from metafit.errors import BadInput
from metafit.progress import progress
from metafit.training.checkpoint import check_work, moments, restore_moments
from metafit.training.store import STATE
from metafit.weights import free_for, load_folder, save_folder, tidy, under

LOOKS = 20  # a training: how often its state is written
KIND = "pretraining state"
NEW_RATE = 1e-3  # at least, of layers without pretrained weights


def check_trainable(body: nn.Module, source: Source) -> None:
    """Raises ``BadInput`` where the source holds raw items, or the body has nothing to train."""
    if is_raw(source.x):
        raise BadInput(f"source {source.name!r} holds raw {source.modality}: preprocess it with a backbone first")
    if not any(p.requires_grad for p in body.parameters()):
        raise BadInput("pretrain: the network has no parameter that requires a gradient; call body.requires_grad_()")


def inputs(body: nn.Module, x: Any, rows: Int64[Tensor, " batch"]) -> Any:
    """Those rows of the inputs; of texts, without the padding that all of them share."""
    taken = tree_map(lambda leaf: leaf[rows], x)
    if not isinstance(taken, Mapping) or "attention_mask" not in taken:
        return taken
    if getattr(body, "packs", False):
        return pack(taken)
    longest = int(taken["attention_mask"].sum(1).max())
    return {name: leaf[:, :longest] for name, leaf in taken.items()}


def descend(
    modules: Sequence[nn.Module],
    loss: Callable[[Int64[Tensor, " batch"], int], Tensor],
    examples: int,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    work: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> list[float]:
    """Lowers the loss of random rows, a function of the rows and the step, in the parameters of the modules.

    AdamW, its rate annealed to 0 along a cosine. Where a small rate spares what the body knows, the new layers over it
    have one of 1e-3.

    Args:
        modules: what is trained: the body, and the new layers over it.
        loss: of rows ``(batch,)`` of the ``examples``, and the step; it may draw from torch's generator.
        out: folder for the state to resume from, written whole 20 times a training.
        resume: go on from the state in ``out``, to the same bits; start afresh where there is none.
        work: what a resumed training must share with the interrupted one, beside batch, rate and seed.

    Returns:
        The loss of every step, those before the interruption too.

    Raises:
        BadInput: fewer than one step or row, a loss that is not finite, or a folder that cannot be written or holds
            another training.
    """
    for name, value in (("steps", steps), ("batch", batch)):
        if value < 1:
            raise BadInput(f"{name} {value}: needs at least 1")
    folder = None if out is None else free_for(out, KIND, STATE)
    trained = nn.ModuleList(modules)
    generator = torch.Generator().manual_seed(seed)
    body, *new = ([p for p in module.parameters() if p.requires_grad] for module in trained)
    rates = [rate, max(rate, NEW_RATE)]
    groups = zip((body, [p for parameters in new for p in parameters]), rates, strict=True)
    optimizer = torch.optim.AdamW([{"params": parameters, "lr": at} for parameters, at in groups])
    about = {"batch": batch, "rate": rate, "seed": seed, "examples": examples, **(work or {})}
    losses: list[float] = []
    if folder is not None:
        tidy(folder, [STATE])
        losses = _restored(folder, trained, optimizer, generator, about) if resume else []
    step, every = len(losses), max(1, steps // LOOKS)

    def keep() -> None:
        if folder is not None:
            tensors = {f"modules/{name}": value for name, value in trained.state_dict().items()} | moments(optimizer)
            tensors |= {"order": generator.get_state(), "random": torch.get_rng_state()}
            save_folder(folder, KIND, {"work": about, "losses": losses}, tensors, STATE)

    if step == 0:
        keep()
    trained.train()
    with progress("pretrain", steps, "steps", show_progress) as advance:
        advance(step)
        while step < steps:
            for group, at in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = at * 0.5 * (1 + math.cos(math.pi * step / steps))
            now = loss(torch.randint(examples, (batch,), generator=generator), step)
            optimizer.zero_grad()
            now.backward()
            optimizer.step()
            losses.append(now.item())
            if not math.isfinite(losses[-1]):
                raise BadInput(f"pretraining diverged: the loss of step {step} is not finite; lower the rate")
            step += 1
            if step % every == 0 or step == steps:
                keep()
            advance(1, loss=losses[-1])
    return losses


def _restored(
    folder: Path,
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    work: Mapping[str, Any],
) -> list[float]:
    """Restores the state in the folder, in place; the losses of the steps so far, none where it holds no state."""
    if not (folder / STATE).exists():
        return []
    about, tensors = load_folder(folder, KIND, STATE)
    check_work(folder, about["work"], json.loads(json.dumps(work)))
    try:
        trained.load_state_dict(under("modules/", tensors))
    except RuntimeError:
        raise BadInput(
            f"cannot resume from {folder}: it trains a network of other shapes; use the same one, or a new folder"
        ) from None
    restore_moments(optimizer, tensors)
    generator.set_state(tensors["order"])
    torch.set_rng_state(tensors["random"])
    return list(about["losses"])
