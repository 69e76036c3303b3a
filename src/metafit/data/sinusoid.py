"""Sinusoid regression: the few-shot regression tasks of Finn et al. (2017, arXiv:1703.03400, section 5.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from metafit.data.randomness import derive, keys, uniform
from metafit.task import Examples, Task


@dataclass(frozen=True)
class Sinusoids:
    """Tasks y = a·sin(ω·x + φ): from ``shot`` points, tell the curve. Drawn by (seed, index), as ``TaskSampler`` does.

    Args:
        shot, query: points in the support and the query set, x uniform in [-5, 5].
        amplitude, phase: intervals of a and φ, those of Finn et al.
        frequency: interval of ω; (1, 1) in Finn et al., (0.8, 1.2) in Li et al. (Meta-SGD, 2017, arXiv:1707.09835).
    """

    shot: int = 5
    query: int = 15
    batch: int = 25
    seed: int = 0
    amplitude: tuple[float, float] = (0.1, 5.0)
    phase: tuple[float, float] = (0.0, math.pi)
    frequency: tuple[float, float] = (1.0, 1.0)
    way: None = None

    def tasks(self, start: int, stop: int) -> Task:
        """The tasks ``start`` to ``stop - 1``: x and y ``(T, points, 1)``."""
        key = keys(self.seed, torch.arange(start, stop))
        amplitude, frequency, phase = (
            uniform(derive(key, i), *interval)[:, None, None]
            for i, interval in enumerate((self.amplitude, self.frequency, self.phase))
        )
        places = derive(derive(key, 3)[:, None], torch.arange(self.shot + self.query))
        x = uniform(places, -5.0, 5.0)[..., None]
        y = amplitude * torch.sin(frequency * x + phase)
        weight = torch.ones(x.shape[:2])
        support, query = (
            Examples(x[:, part], y[:, part], weight[:, part]) for part in (slice(self.shot), slice(self.shot, None))
        )
        return Task(support, query)

    def draw(self, index: int) -> Task:
        return self.tasks(index * self.batch, (index + 1) * self.batch)
