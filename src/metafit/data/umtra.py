"""Tasks without labels: every example is a class of its own, and its queries are other views of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from metafit.data.randomness import below, derive, keys, sample_distinct, uniform
from metafit.data.rows import StoredRows
from metafit.data.sampler import Range, as_range, by_class, take_rows
from metafit.data.source import Source
from metafit.data.views import View, changed, rounded
from metafit.errors import BadInput
from metafit.task import Task


class UMTRA:
    """N examples drawn at random are the N classes of a task (Khodadadeh et al., 2019, arXiv:1811.11819, section 3).

    The first support example of a class is the example as it is; further ones, and the queries, are views of it. That
    two of the N are of one true class is unlikely where there are many; the fewer classes, the fewer ways are wise.

    With ``mixed``, each query is also drawn towards an example that is not in the task: z = (1 − λ)·view + λ·other, λ
    uniform in [0, ½), so that it still is mostly of its class (Vettoruzzo et al., 2024, CAMeLU, arXiv:2405.16124;
    λ as in the authors' code).

    The task with a given (seed, index) is always the same, whatever the batch; tasks of different ways and shots are
    padded, as those of ``TaskSampler``.

    Args:
        source: examples, ``x`` a tensor or rows on disk; labels are not read.
        way, shot: of the tasks, or (least, most).
        query: queries a class; 1 in the paper.
        batch, seed: as in ``TaskSampler``.
        augment: what makes a view of an example, one after the other.
        views: views made beforehand ``(N, V, ...)``, such as ``text_views``; ``augment`` then changes these.
        mixed: whether queries are mixed with other examples.

    Raises:
        BadInput: no views, fewer examples than a task takes, or inputs that cannot be mixed.
    """

    def __init__(
        self,
        source: Source,
        way: Range = 5,
        shot: Range = 1,
        query: int = 1,
        batch: int = 16,
        seed: int = 0,
        augment: Sequence[View] = (),
        views: Float[Tensor, "n v ..."] | None = None,
        mixed: bool = False,
    ):
        self.way, self.shot, self.query, self.batch, self.seed = way, shot, query, batch, seed
        self.ways, self.shots = as_range("way", way, 2), as_range("shot", shot, 1)
        self.x, self.augment, self.views, self.mixed = source.x, tuple(augment), views, mixed
        if not isinstance(self.x, (Tensor, StoredRows)):
            raise BadInput(f"source {source.name!r}: views are of one tensor; take features, or images, by a backbone")
        if views is None and not augment:
            raise BadInput("UMTRA: a query is a view of its example; give augment=, views= or both")
        if views is not None and len(views) != len(source):
            raise BadInput(f"UMTRA: views of {len(views)} examples for {len(source)}; give each its own")
        if mixed and not (self.x.dtype.is_floating_point or self.x.dtype == torch.uint8):
            raise BadInput(f"UMTRA: inputs of type {self.x.dtype} cannot be mixed; give it features or images")
        self.others = self.ways[1] * query if mixed else 0
        if self.ways[1] + self.others > len(source):
            raise BadInput(
                f"way {self.ways[1]}: a task takes {self.ways[1] + self.others} examples, {source.name!r} has "
                f"{len(source)}; ask for fewer ways or queries"
            )

    def tasks(self, start: int, stop: int) -> Task:
        """The tasks ``start`` to ``stop - 1``: x ``(T, way * shot, ...)``, y and weight ``(T, way * shot)``."""
        key = keys(self.seed, np.arange(start, stop))
        (way_low, way), (shot_low, shot) = self.ways, self.shots
        drawn, _ = sample_distinct(derive(key, 0), len(self.x), way + self.others)
        present = np.arange(way) < way_low + below(derive(key, 1), way - way_low + 1)[:, None]
        shots = shot_low + below(derive(key, 2), shot - shot_low + 1)
        place = np.arange(shot + self.query)
        own = derive(derive(derive(key, 3)[:, None], np.arange(way))[..., None], place)  # (T, way, places)
        rows, own_key = torch.from_numpy(drawn), torch.from_numpy(own)
        x = self._views(rows[:, :way, None].expand(own.shape), own_key)
        support, query = x[:, :, :shot].clone(), x[:, :, shot:]
        support[:, :, 0] = take_rows(self.x, rows[:, :way])
        if self.mixed:
            query = self._mixed(query, rows[:, way:], own_key[..., shot:])
        in_support = present[..., None] & (np.arange(shot) < shots[:, None, None])
        in_query = present[..., None].repeat(self.query, -1)
        parts = ((support, in_support), (query, in_query))
        return Task(*(by_class(x.flatten(1, 2), torch.from_numpy(exists)) for x, exists in parts))

    def draw(self, index: int) -> Task:
        """The batch with that index: tasks ``index * batch`` to ``(index + 1) * batch - 1``."""
        return self.tasks(index * self.batch, (index + 1) * self.batch)

    def _views(self, rows: Int64[Tensor, "t w e"], key: Int64[Tensor, "t w e"]) -> Tensor:
        if self.views is None:
            x = take_rows(self.x, rows.flatten(1)).flatten(0, 1)
        else:  # one after the other from a random one on, so that they differ while there are enough
            first = below(derive(key[..., :1], 0), self.views.shape[1])
            x = self.views[rows, (first + torch.arange(rows.shape[2])) % self.views.shape[1]].flatten(0, 2)
        return changed(x, derive(key.flatten(), 1), self.augment).unflatten(0, rows.shape)

    def _mixed(self, query: Tensor, others: Int64[Tensor, "t wq"], key: Int64[Tensor, "t w q"]) -> Tensor:
        other = take_rows(self.x, others).unflatten(1, key.shape[1:])
        share = uniform(derive(key, 2), 0.0, 0.5).view(*key.shape, *[1] * (query.ndim - 3))
        return rounded(query * (1 - share) + other * share, query)
