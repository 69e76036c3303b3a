"""Tasks of several families, and how often each is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from metafit.data.randomness import derive, keys, uniform
from metafit.data.sampler import Tasks
from metafit.data.source import Source
from metafit.errors import BadInput
from metafit.task import Task

SMOOTHING = 0.9  # share of the old in a family's mean loss


class Families:
    """Task families that take turns: each batch is of one family, so that families may differ in ways and shapes.

    A family is drawn with probability floor/F + (1 − floor)·w_f/Σw. Where it is drawn by loss, w is the mean loss of
    the family's batches, smoothed, and the largest of all for a family not yet seen: what is learned already comes
    less often, and never less than the floor. The draw is a function of (seed, index) and of the losses told before;
    training keeps them with its state, so that it resumes exactly.

    Args:
        families: by name, each with the same batch.
        by: ``"uniform"``, ``"loss"``, or a weight for each family, such as those of ``diversity.leverages``.
        floor: share of the draws that is uniform.
        seed: of the draws.

    Raises:
        BadInput: no family, batches that differ, a floor or weights out of range.
    """

    def __init__(
        self,
        families: Mapping[str, Tasks],
        by: Literal["uniform", "loss"] | Mapping[str, float] = "uniform",
        floor: float = 0.2,
        seed: int = 0,
    ):
        if not families:
            raise BadInput("families: none given; give one or more samplers by name")
        if not isinstance(families, Mapping):
            raise BadInput(f"families: a {type(families).__name__} given; give samplers by name, as a dict")
        for name, tasks in families.items():
            if not hasattr(tasks, "tasks"):
                raise BadInput(f"family {name!r}: {type(tasks).__name__} given; give a sampler, such as TaskSampler")
        batches = {name: tasks.batch for name, tasks in families.items()}
        if len(set(batches.values())) > 1:
            raise BadInput(f"families: their batches differ ({batches}); give them the same")
        if not 0 <= floor <= 1:
            raise BadInput(f"floor {floor}: needs to be from 0 to 1")
        self.names, self._tasks = tuple(families), tuple(families.values())
        self.batch, self.seed, self.floor, self.by = self._tasks[0].batch, seed, floor, by
        self.way, self.shot, self.query = (self._common(name) for name in ("way", "shot", "query"))
        self.losses = torch.full((len(self.names),), torch.nan, dtype=torch.float64)
        self._given = None if isinstance(by, str) else torch.tensor([_weight(by, name) for name in self.names])
        if isinstance(by, str) and by not in ("uniform", "loss"):
            raise BadInput(f"by {by!r}: choose 'uniform', 'loss', or give a weight for each family")

    def probabilities(self) -> Tensor:
        """How often each family is drawn now ``(F,)``."""
        total = len(self.names)
        weight = torch.ones(total, dtype=torch.float64) if self._given is None else self._given
        if self.by == "loss" and not self.losses.isnan().all():
            weight = self.losses.nan_to_num(float(self.losses[~self.losses.isnan()].max())).clamp_min(0)
        share = weight / weight.sum() if weight.sum() > 0 else torch.full_like(weight, 1 / total)
        return self.floor / total + (1 - self.floor) * share

    def family(self, batch: int) -> int:
        """Which family the batch with that index is of."""
        drawn = uniform(derive(torch.from_numpy(keys(self.seed, np.array([batch]))), 5), 0.0, 1.0)
        ends = self.probabilities().cumsum(0)
        return min(int(torch.searchsorted(ends, drawn.double(), right=True)), len(self.names) - 1)

    def tasks(self, start: int, stop: int) -> Task:
        """The tasks ``start`` to ``stop - 1``, which must lie in one batch."""
        batch = start // self.batch
        if stop > (batch + 1) * self.batch:
            raise BadInput(f"tasks {start} to {stop}: reach over batches of {self.batch}, whose families differ")
        return self._tasks[self.family(batch)].tasks(start, stop)

    def tell(self, families: Sequence[int], losses: Sequence[float]) -> None:
        """The family and the mean loss of each batch of a step, before the next is drawn."""
        for family, loss in zip(families, losses, strict=True):
            old = float(self.losses[family])
            self.losses[family] = loss if old != old else SMOOTHING * old + (1 - SMOOTHING) * loss

    def _common(self, name: str) -> Any:
        """What all families have; by family where they differ."""
        values = [getattr(tasks, name) for tasks in self._tasks]
        same = all(value == values[0] for value in values)
        return values[0] if same else dict(zip(self.names, values, strict=True))


def domain_sources(source: Source) -> dict[str, Source]:
    """The classes of each domain as a source of its own; domains of a single class, which make no task, together.

    Raises:
        BadInput: no domains, or none of two classes.
    """
    if source.domains is None:
        raise BadInput(
            f"{source.name}: it has no domains to balance; name the column that says them (--domain), or leave the "
            "balance out"
        )
    found: dict[str, list[int]] = {}
    for c, domain in sorted(enumerate(source.domains), key=lambda pair: pair[1]):
        found.setdefault(domain, []).append(c)
    alone = [classes[0] for classes in found.values() if len(classes) == 1]
    found = {domain: classes for domain, classes in found.items() if len(classes) > 1}
    if not found:
        raise BadInput(f"{source.name}: no domain has two classes; leave the balance out")
    if len(alone) == 1:
        min(found.values(), key=len).extend(alone)
    elif alone:
        found["others"] = alone
    return {domain: source.subset(classes) for domain, classes in found.items()}


def _weight(weights: Mapping[str, float], name: str) -> float:
    if name not in weights or not 0 <= weights[name] < float("inf"):
        raise BadInput(f"weight {weights.get(name)} of family {name!r}: needs a number that is not negative")
    return float(weights[name])
