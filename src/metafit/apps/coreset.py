"""What is remembered of the examples of one class, in bounded room: as means of those alike, or as a sample."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metafit.learners.base import squared_distances


class Means(NamedTuple):
    """Feature vectors, those alike as their mean: the clustering features of BIRCH (Zhang et al., 1996).

    Where there is no room for one more, the two become one whose merging adds least to the scatter within (Ward,
    1963), each feature measured in its own spread within the class. Whatever is merged, the mean of the class and the
    spread of each feature stay those of all examples, up to rounding. What is kept of a class depends on its own
    examples alone, and not on how many came at once.

    Attributes:
        x: ``(M, F)``.
        weight: ``(M,)``, how many examples each row stands for.
        scatter: ``(F,)``, Σ (x − mean)² over all examples.
    """

    x: Float[Tensor, "m dim"]
    weight: Float[Tensor, " m"]
    scatter: Float[Tensor, " dim"]

    @classmethod
    def of(cls, first: Float[Tensor, " dim"]) -> Means:
        return cls(first[None].clone(), first.new_ones(1), torch.zeros_like(first))

    @property
    def seen(self) -> int:
        """How many examples there were."""
        return round(float(self.weight.sum()))

    @property
    def mean(self) -> Float[Tensor, " dim"]:
        return (self.weight @ self.x) / self.weight.sum()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As JSON has it, and tensors."""
        return {}, self._asdict()

    def add(self, example: Float[Tensor, " dim"], room: int) -> Means:
        """With one more example, in ``room`` rows."""
        n = self.weight.sum()
        scatter = self.scatter + (example - self.mean).square() * (n / (n + 1))
        x, weight = torch.cat([self.x, example[None]]), torch.cat([self.weight, n.new_ones(1)])
        return Means(x, weight, scatter).within(room)

    def within(self, room: int) -> Means:
        """In ``room`` rows, at least 1."""
        known = self
        while len(known.x) > room:
            known = known._merged()
        return known

    def _merged(self) -> Means:
        spread = (self.scatter / self.weight.sum()).sqrt()
        z = (self.x - self.mean) / torch.where(spread > 0, spread, 1.0)
        w = self.weight
        cost = squared_distances(z, z).clamp_min(0) * (w[:, None] * w / (w[:, None] + w))
        pairs = torch.ones_like(cost, dtype=torch.bool).triu(1)
        first, second = divmod(int(cost.masked_fill(~pairs, torch.inf).argmin()), len(w))
        x, weight = self.x.clone(), w.clone()
        weight[first] += w[second]
        x[first] += (x[second] - x[first]) * (w[second] / weight[first])
        rest = torch.arange(len(w)) != second
        return Means(x[rest], weight[rest], self.scatter)


class Sample(NamedTuple):
    """Inputs that have no mean (texts, images), for a network that is trained: some of them, each as likely as another.

    Each has a random key, and those with the smallest stay. That is a uniform sample of all that came, at any time, as
    reservoir sampling has it (Vitter, 1985), and of what is left when there is less room.

    Attributes:
        items: texts, or tensors of one input each.
        keys: theirs.
        seen: how many there were.
    """

    items: tuple[Any, ...]
    keys: tuple[float, ...]
    seen: int

    @classmethod
    def of(cls, first: Any) -> Sample:
        return cls((), (), 0).add(first, 1)

    @property
    def weight(self) -> Float[Tensor, " m"]:
        """``(M,)``, how many examples each stands for."""
        return torch.full((len(self.items),), self.seen / len(self.items))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As JSON has it, and tensors."""
        about = {"keys": list(self.keys), "seen": self.seen}
        if isinstance(self.items[0], str):
            return {**about, "texts": list(self.items)}, {}
        return about, {"items": torch.stack(self.items)}

    def add(self, example: Any, room: int) -> Sample:
        """With one more example, of ``room`` at most."""
        key = float(np.random.default_rng(self.seen).random())  # by its number: nothing more to save
        return Sample((*self.items, example), (*self.keys, key), self.seen + 1).within(room)

    def within(self, room: int) -> Sample:
        """The ``room`` with the smallest keys, in the order that they came in."""
        chosen = sorted(np.argsort(self.keys, kind="stable")[:room].tolist())
        return Sample(tuple(self.items[i] for i in chosen), tuple(self.keys[i] for i in chosen), self.seen)


Known = Means | Sample


def known_from(about: dict[str, Any], tensors: dict[str, Tensor]) -> Known:
    """What ``state`` gave, again."""
    if not about:
        return Means(**tensors)
    return Sample(tuple(about["texts"] if "texts" in about else tensors["items"]), tuple(about["keys"]), about["seen"])


def more(known: Known | None, examples: Any, room: int) -> Known:
    """What is known of a class, with examples (rows of a tensor, or texts) that come one after the other."""
    for example in examples:
        if known is None:
            known = Means.of(example) if isinstance(example, Tensor) and example.ndim == 1 else Sample.of(example)
        else:
            known = known.add(example, room)
    assert known is not None  # there is at least one example
    return known


def joined(parts: list[Known]) -> tuple[Any, Float[Tensor, " n"]]:
    """What is kept of several classes as one: rows ``(N, F)``, or a list of texts, or inputs ``(N, ...)``; weights."""
    weight = torch.cat([part.weight for part in parts])
    rows = [part.x for part in parts if isinstance(part, Means)]
    if rows:
        return torch.cat(rows), weight
    items = [item for part in parts if isinstance(part, Sample) for item in part.items]
    return (items if isinstance(items[0], str) else torch.stack(items)), weight


def moments(parts: list[Means]) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """Mean and variance of each feature over all examples of several classes."""
    size = torch.stack([part.weight.sum() for part in parts])
    means, scatter = torch.stack([part.mean for part in parts]), torch.stack([part.scatter for part in parts])
    mean = (size @ means) / size.sum()
    return mean, (scatter.sum(0) + size @ (means - mean).square()) / size.sum()


def nearness(x: Float[Tensor, "n dim"], parts: list[Means]) -> Float[Tensor, "n classes"]:
    """Minus the squared distance to the mean of each class, each feature measured in its spread over all of them."""
    mean, variance = moments(parts)
    scale = torch.where(variance > 0, variance.sqrt(), 1.0)
    means = torch.stack([part.mean for part in parts])
    return -squared_distances((x - mean) / scale, (means - mean) / scale).clamp_min(0)
