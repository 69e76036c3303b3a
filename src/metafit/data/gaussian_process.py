"""Regression tasks drawn from Gaussian processes: the usual test of neural processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from metafit.data.randomness import below, derive, keys, normal, uniform
from metafit.errors import unknown
from metafit.task import Examples, Task

Kernel = Literal["rbf", "matern", "periodic"]


@dataclass(frozen=True)
class GaussianProcesses:
    """Tasks y = f(x) + noise with f from a Gaussian process of random length and scale, on one dimension.

    The protocol of Nguyen and Grover (2022, arXiv:2207.04179, section 5.1, and their code): x uniform in [-2, 2],
    length ℓ uniform in [0.1, 0.6], scale s in [0.1, 1], a period in [0.1, 0.5], noise 0.02; 3 to 46 support points, 3
    or more query points, 49 in all at most. Sets are padded to 46, so that tasks of every size share a batch.

    Args:
        kernel: ``"rbf"`` s²·exp(−d²/2ℓ²); ``"matern"`` with ν = 5/2; ``"periodic"`` s²·exp(−2·sin²(πd/p)/ℓ²).
        most: points of a task, support and query together, and one more.
        noise: its standard deviation.
    """

    kernel: Kernel = "rbf"
    batch: int = 16
    seed: int = 0
    most: int = 50
    noise: float = 0.02
    way: None = None

    def __post_init__(self) -> None:
        if self.kernel not in get_args(Kernel):
            raise unknown("kernel", self.kernel, get_args(Kernel))

    @property
    def shot(self) -> int:
        """Support points at most."""
        return self.most - 4

    @property
    def query(self) -> int:
        """Query points at most."""
        return self.most - 4

    def tasks(self, start: int, stop: int) -> Task:
        """The tasks ``start`` to ``stop - 1``: x and y ``(T, most - 4, 1)``."""
        key = keys(self.seed, torch.arange(start, stop))
        size = self.shot
        support = 3 + below(derive(key, 0), self.most - 6)
        query = 3 + below(derive(key, 1), self.most - support - 3)
        places = torch.arange(2 * size)
        x = uniform(derive(derive(key, 2)[:, None], places), -2.0, 2.0)
        covariance = self._covariance(x.double(), key)
        y = (torch.linalg.cholesky(covariance) @ normal(derive(key, 3), 2 * size)[..., None])[..., 0].to(x.dtype)
        sets = []
        for part, count in ((slice(size), support), (slice(size, None), query)):
            weight = (torch.arange(size) < count[:, None]).to(x.dtype)
            sets.append(Examples(x[:, part, None], y[:, part, None], weight))
        return Task(*sets)

    def draw(self, index: int) -> Task:
        return self.tasks(index * self.batch, (index + 1) * self.batch)

    def _covariance(self, x: Tensor, key: Tensor) -> Tensor:
        length, scale, period = (
            uniform(derive(key, stream), *interval).to(x.dtype)[:, None, None]
            for stream, interval in ((4, (0.1, 0.6)), (5, (0.1, 1.0)), (6, (0.1, 0.5)))
        )
        apart = (x[:, :, None] - x[:, None, :]).abs()
        if self.kernel == "rbf":
            shape = (-0.5 * (apart / length).square()).exp()
        elif self.kernel == "matern":
            far = math.sqrt(5.0) * apart / length
            shape = (1 + far + far.square() / 3) * (-far).exp()
        else:
            shape = (-2 * ((math.pi * apart / period).sin() / length).square()).exp()
        return scale.square() * shape + self.noise**2 * torch.eye(x.shape[1], dtype=x.dtype)
