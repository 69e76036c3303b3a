"""How different tasks are: embeddings of tasks, and what follows from their similarities."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metafit.errors import BadInput
from metafit.task import Task

UNUSUAL = 0.05  # rank of a task that is unlike the known ones: see ``likeness``


def task_embeddings(tasks: Task, temperature: float = 0.1) -> Float[Tensor, "t dim"]:
    """A unit vector for each task of a batch: which features it needs to tell its classes apart.

    The diagonal Fisher information of a gate on each feature, as Task2Vec (Achille et al., 2019, arXiv:1902.03545)
    takes it of a network's filters: with a softmax over the cosines with the class means, E_x x_d²·Var_{c∼p(x)}(w_cd).
    Support and query examples count alike. A regression's targets take the place of classes by their sign about the
    mean.

    Args:
        tasks: a batch of T tasks whose inputs are feature vectors (of a frozen backbone), or are flattened to such.
        temperature: of the softmax.

    Raises:
        BadInput: the inputs are no single tensor of numbers.
    """
    if not isinstance(tasks.support.x, Tensor) or tasks.support.x.dtype == torch.int64:
        raise BadInput("task embeddings: inputs need to be one tensor of numbers; give features of a frozen backbone")
    x = torch.cat([part.x.flatten(2) for part in tasks], 1).double()
    y = torch.cat([part.y for part in tasks], 1)
    if y.is_floating_point():
        y = y.flatten(2).mean(-1)
    every = [torch.ones(part.y.shape[:2], device=y.device) if part.weight is None else part.weight for part in tasks]
    weight = torch.cat(every, 1).double()
    if y.is_floating_point():
        y = (y > (weight * y).sum(1, keepdim=True) / weight.sum(1, keepdim=True)).long()
    x = torch.nn.functional.normalize(x, dim=-1)
    member = torch.nn.functional.one_hot(y, int(y.max()) + 1).double() * weight[..., None]
    size = member.sum(1)
    means = torch.nn.functional.normalize(member.mT @ x, dim=-1)
    logits = (x @ means.mT / temperature).masked_fill(size[:, None] == 0, -torch.inf)
    p = logits.softmax(-1)
    variance = p @ means.square() - (p @ means).square()
    fisher = (weight[..., None] * x.square() * variance).sum(1)
    fisher = fisher.clamp_min(0)  # where no feature tells classes apart, none does so more than another
    return torch.nn.functional.normalize(torch.where(fisher.sum(-1, keepdim=True) > 0, fisher, 1.0), dim=-1)


def similarities(embeddings: Float[Tensor, "t dim"]) -> Float[Tensor, "t t"]:
    """Cosines, a kernel with ones on its diagonal."""
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    return unit @ unit.mT


def vendi(kernel: Float[Tensor, "t t"]) -> float:
    """How many different tasks there are, in effect: the exponential of the entropy of the eigenvalues of K/T, from 1
    (all the same) to T (all orthogonal). Friedman and Dieng, 2023, arXiv:2210.02410.

    >>> round(vendi(torch.eye(4)), 6), round(vendi(torch.ones(4, 4)), 6)
    (4.0, 1.0)
    """
    values = torch.linalg.eigvalsh(kernel.double() / len(kernel)).clamp_min(0)
    return float(torch.special.entr(values).sum().exp())


def leverages(kernel: Float[Tensor, "t t"], ridge: float = 0.1) -> Float[Tensor, " t"]:
    """How likely each item is in a sample of the determinantal point process with L = K/ridge: the diagonal of
    K(K + ridge·I)⁻¹ (Kulesza and Taskar, 2012, arXiv:1207.6083, eq. 2.5). Items that are alike share their weight.

    >>> leverages(torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]), 1e-6)
    tensor([0.5000, 0.5000, 1.0000])
    """
    k = kernel.double()
    inside = torch.linalg.solve(k + ridge * torch.eye(len(k), dtype=k.dtype), k).diagonal()
    return inside.to(kernel.dtype)


def most_diverse(kernel: Float[Tensor, "t t"], k: int) -> list[int]:
    """k items, each chosen to enlarge the determinant of the kernel of those chosen the most (Chen et al., 2018,
    arXiv:1709.05135: a Cholesky row an item, T·k² operations).

    Raises:
        BadInput: k is not from 1 to T.
    """
    if not 1 <= k <= len(kernel):
        raise BadInput(f"k {k}: needs to be from 1 to the {len(kernel)} items")
    left = kernel.double().diagonal().clone()
    rows = kernel.new_zeros(k, len(kernel), dtype=torch.float64)
    chosen: list[int] = []
    for i in range(k):
        best = int(left.argmax())
        chosen.append(best)
        row = (kernel[best].double() - rows[:i, best] @ rows[:i]) / left[best].clamp_min(1e-12).sqrt()
        rows[i] = row
        left = left - row.square()
        left[best] = -torch.inf
    return chosen


def likeness(new: Float[Tensor, "n dim"], known: Float[Tensor, "t dim"]) -> dict[str, Any]:
    """How alike new tasks are to known ones.

    Returns:
        ``nearest``, the mean over new tasks of the cosine with the nearest known task; ``among_known``, the same of
        known tasks with the other known ones; ``rank`` ``(N,)``, for each new task the share of known tasks whose own
        nearest is no nearer: 1 is as usual as can be, 0 unlike all.
    """
    inside = similarities(known).fill_diagonal_(-torch.inf).max(1).values
    unit = torch.nn.functional.normalize
    nearest = (unit(new, dim=-1) @ unit(known, dim=-1).mT).max(1).values
    rank = (inside[None] <= nearest[:, None] + 1e-9).double().mean(1)
    return {"nearest": float(nearest.mean()), "among_known": float(inside.mean()), "rank": rank}
