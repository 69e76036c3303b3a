"""Draws batches of few-shot classification tasks from a source of labelled examples."""

from __future__ import annotations

from operator import index
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from metafit.data.randomness import below, derive, keys, sample_distinct
from metafit.data.rows import StoredRows
from metafit.data.source import Source
from metafit.errors import BadInput
from metafit.task import Examples, Task

Range = int | tuple[int, int]


class Tasks(Protocol):
    """Anything that gives the task of a (seed, index), always the same: what training and evaluation draw from."""

    batch: int
    seed: int
    way: Any
    shot: Any
    query: Any

    def tasks(self, start: int, stop: int) -> Task:
        """The tasks with indices ``start`` to ``stop - 1``, as one batch."""
        ...


class Draw(NamedTuple):
    """Which examples of the source make each task: T tasks, W ways, S support and Q query examples a class."""

    classes: Int64[Tensor, "t w"]
    support: Int64[Tensor, "t w s"]
    query: Int64[Tensor, "t w q"]
    in_support: Bool[Tensor, "t w s"]
    in_query: Bool[Tensor, "t w q"]


class TaskSampler:
    """N-way K-shot tasks, a whole batch at a time, by array operations.

    The row numbers are drawn on the host, where NumPy takes less time for a batch than an accelerator for starting its
    many small kernels; the rows are gathered where they lie.

    The task with a given (seed, index) is always the same, on any number of workers, whatever the batch size:
    evaluation is paired and a resumed run goes on exactly. Tasks of different ways and shots are padded to the
    largest; padding has weight 0.

    Args:
        source: examples with classes; ``source.x`` must be a tensor, rows on disk, or a pytree of these.
        way: classes a task, or (least, most), drawn for each task.
        shot: support examples a class, or (least, most).
        query: query examples a class; a class with fewer left gives what it has.
        batch: tasks that ``draw`` gives.
        seed: of the stream of tasks.
        balanced: whether all classes of a task have the same number of shots (only where ``shot`` is a range).

    Raises:
        BadInput: more ways than classes, or a class with too few examples; named, with the mend.
    """

    def __init__(
        self,
        source: Source,
        way: Range = 5,
        shot: Range = 1,
        query: int = 15,
        batch: int = 16,
        seed: int = 0,
        balanced: bool = True,
    ):
        self.source, self.query, self.batch, self.seed, self.balanced = source, query, batch, seed, balanced
        self.ways, self.shots = as_range("way", way, 2), as_range("shot", shot, 1)
        for name, value in (("query", query), ("batch", batch)):
            if value < 1:
                raise BadInput(f"{name} {value}: needs at least 1")
        self.way, self.shot = way, shot
        leaves = tree_leaves(source.x)
        if not all(isinstance(leaf, (Tensor, StoredRows)) for leaf in leaves):
            raise BadInput(
                f"source {source.name!r} holds raw {source.modality}: embed or preprocess it with a backbone"
            )
        self.counts = source.counts.numpy(force=True)
        self._check()
        self.rows = source.y.argsort(stable=True).numpy(force=True)  # the examples of a class are contiguous in it
        self.first = self.counts.cumsum() - self.counts

    def _check(self) -> None:
        classes = len(self.source.classes)
        if self.ways[1] > classes:
            raise BadInput(
                f"way {self.ways[1]}: source {self.source.name!r} has {classes} classes here; "
                f"ask for {classes} or fewer"
            )
        need = self.shots[1] + 1
        smallest = int(self.counts.argmin())
        if self.counts[smallest] < need:
            raise BadInput(
                f"class {self.source.classes[smallest]!r} of source {self.source.name!r} has "
                f"{int(self.counts[smallest])} example(s), {self.shots[1]}-shot tasks need {need} (one to query): "
                f"add examples, drop the class or ask for fewer shots"
            )

    def indices(self, start: int, stop: int) -> Draw:
        """Which examples make the tasks ``start`` to ``stop - 1``."""
        key = keys(self.seed, np.arange(start, stop))
        (way_low, way), (shot_low, shot) = self.ways, self.shots
        classes, _ = sample_distinct(derive(key, 0), len(self.counts), way)
        slot = np.arange(way)
        present = slot < way_low + below(derive(key, 1), way - way_low + 1)[:, None]
        per_class = derive(derive(key, 2)[:, None], slot)
        shots = shot_low + below(derive(per_class if not self.balanced else key[:, None], 3), shot - shot_low + 1)
        picks, exists = sample_distinct(derive(per_class, 4), self.counts[classes], shot + self.query)
        rows = self.rows.take(self.first[classes][..., None] + picks)
        in_support = present[..., None] & (np.arange(shot) < shots[..., None])
        in_query = present[..., None] & exists[..., shot:]
        drawn = (classes, rows[..., :shot], rows[..., shot:], in_support, in_query)
        return Draw(*(torch.from_numpy(part).to(self.source.y.device) for part in drawn))

    def tasks(self, start: int, stop: int) -> Task:
        """The tasks ``start`` to ``stop - 1``: x ``(T, way * shot, ...)``, y and weight ``(T, way * shot)``."""
        draw = self.indices(start, stop)
        return Task(self._examples(draw.support, draw.in_support), self._examples(draw.query, draw.in_query))

    def draw(self, index: int) -> Task:
        """The batch with that index: tasks ``index * batch`` to ``(index + 1) * batch - 1``."""
        return self.tasks(index * self.batch, (index + 1) * self.batch)

    def _examples(self, rows: Tensor, exists: Tensor) -> Examples:
        flat = rows.flatten(1)
        return by_class(tree_map(lambda leaf: take_rows(leaf, flat), self.source.x), exists)


def by_class(x: Any, exists: Bool[Tensor, "t w e"]) -> Examples:
    """Inputs ``(T, W * E, ...)``, E of each of W classes in turn, with their labels; weight 0 where none exists."""
    label = torch.arange(exists.shape[1], device=exists.device)[None, :, None].expand(exists.shape)
    return Examples(x, label.flatten(1), exists.flatten(1).to(torch.get_default_dtype()))


def take_rows(leaf: Tensor | StoredRows, rows: Int64[Tensor, "t n"]) -> Tensor:
    if isinstance(leaf, StoredRows):
        return leaf[rows]
    # ``leaf[rows]``, several times as fast: whole rows are copied.
    return leaf.index_select(0, rows.flatten().to(leaf.device)).unflatten(0, rows.shape)


def as_range(name: str, value: Range, least: int) -> tuple[int, int]:
    try:
        low, high = (index(value), index(value)) if not isinstance(value, (tuple, list)) else map(index, value)
    except (TypeError, ValueError):
        raise BadInput(f"{name} {value!r}: needs a whole number, or a range as (least, most)") from None
    if low < least or high < low:
        raise BadInput(f"{name} {value}: needs {least} or more, a range as (least, most)")
    return low, high
