"""The data that every floor speaks: a task is a support set to learn from and a query set to be right on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class Examples(NamedTuple):
    """Labelled examples, a pytree of tensors.

    Attributes:
        x: a tensor, or a pytree of tensors, whose leading dimension counts the examples.
        y: class indices ``(N,)`` (int64) or regression targets ``(N, D)`` (floating point).
        weight: ``(N,)``; 0 marks padding, so that tasks of different ways and shots share one batch.
            ``None`` means that every example counts.
    """

    x: Any
    y: Shaped[Tensor, "n ..."]
    weight: Float[Tensor, " n"] | None = None


class Task(NamedTuple):
    """A support and a query set. A batch of tasks is the same object with one more leading dimension."""

    support: Examples
    query: Examples


def weights(examples: Examples) -> Float[Tensor, " n"]:
    """The weights of one task's examples, as floating-point numbers; ones where there are none.

    >>> weights(Examples(torch.zeros(2, 3), torch.tensor([0, 1])))
    tensor([1., 1.])
    """
    if examples.weight is not None and examples.weight.is_floating_point():
        return examples.weight
    floating = [leaf.dtype for leaf in (*tree_leaves(examples.x), examples.y) if leaf.is_floating_point()]
    dtype = floating[0] if floating else torch.get_default_dtype()
    if examples.weight is not None:
        return examples.weight.to(dtype)
    return torch.ones(examples.y.shape[:1], dtype=dtype, device=examples.y.device)


def weighted_mean(values: Float[Tensor, " n"], weight: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """The mean over the examples that count; 0, not NaN, where none does.

    Padding does not count even where its value is infinite: the cross-entropy of an absent class is.
    """
    counted = torch.where(weight > 0, values * weight, 0.0)
    return counted.sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)


def unit(features: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    """Features of length 1. The zero vector stays zero, with a gradient of the size of the others'."""
    length = features.square().sum(-1, keepdim=True)
    return features * torch.where(length > 0, length, 1.0).rsqrt()


def count(tasks: Any) -> int:
    """The length of the leading dimension that every leaf of the pytree shares."""
    return int(tree_leaves(tasks)[0].shape[0])


def take(tasks: Any, index: Any) -> Any:
    """Indexes the leading dimension of every leaf: one task of a batch, or a slice of it."""
    return tree_map(lambda leaf: None if leaf is None else leaf[index], tasks)
