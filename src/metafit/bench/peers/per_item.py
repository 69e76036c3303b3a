"""A task sampler in the manner of torchmeta and learn2learn: example by example."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from metafit.data import Source


class PerItemSampler:
    """Draws classes, then examples of each, gets each by ``dataset[i]`` and stacks them."""

    def __init__(self, source: Source, way: int, shot: int, query: int, seed: int = 0):
        self.source, self.way, self.shot, self.query = source, way, shot, query
        self.random = random.Random(seed)
        self.rows: dict[int, list[int]] = {}
        for row, label in enumerate(source.y.tolist()):
            self.rows.setdefault(label, []).append(row)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.source.x[row], int(self.source.y[row])

    def task(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The support and the query set of one task: x and y ``(way * shot, ...)``, labels from 0."""
        support, query = [], []
        for label, name in enumerate(self.random.sample(sorted(self.rows), self.way)):
            rows = self.random.sample(self.rows[name], self.shot + self.query)
            items = [(self[row][0], label) for row in rows]
            support += items[: self.shot]
            query += items[self.shot :]
        return _stack(support), _stack(query)

    def batch(self, tasks: int) -> list[Tensor]:
        """The parts of ``tasks`` tasks, each with a leading dimension of tasks."""
        drawn = [self.task() for _ in range(tasks)]
        return [torch.stack([task[i][j] for task in drawn]) for i in range(2) for j in range(2)]


def _stack(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])
