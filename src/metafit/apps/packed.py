"""Tasks of texts without their padding, for a network that is trained."""

from __future__ import annotations

from torch import nn

from metafit.backbones import pack
from metafit.data.sampler import Tasks, TaskSampler
from metafit.task import Task


class Packed:
    """The sampler's tasks, their texts packed; rows of ``x`` are then no longer examples, for ``y`` nothing changes."""

    def __init__(self, sampler: TaskSampler):
        self.sampler, self.batch, self.seed = sampler, sampler.batch, sampler.seed
        self.way, self.shot, self.query = sampler.way, sampler.shot, sampler.query

    def tasks(self, start: int, stop: int) -> Task:
        return Task(*(part._replace(x=pack(part.x)) for part in self.sampler.tasks(start, stop)))


def packed(sampler: TaskSampler, body: nn.Module | None) -> Tasks:
    """Packed where the network reads packed texts; the sampler itself where not."""
    return Packed(sampler) if getattr(body, "packs", False) else sampler
