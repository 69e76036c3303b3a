"""Experience as tasks: what ``meta_train`` draws from, made by the agent that it trains."""

from __future__ import annotations

import torch
from torch import Tensor

from metafit.data.randomness import derive, keys
from metafit.rl.agent import Agent
from metafit.rl.family import Family, Params
from metafit.task import Task


class Experience:
    """Batches of environments that the agent has just acted in: each batch of trials is learned from ``epochs`` times.

    The environments of a batch, and all chance in them, are a function of the seed and the batch's index; so that a
    training that stops after a multiple of ``epochs`` steps goes on as if it had not.

    Args:
        agent: that acts, as it is when a batch is drawn.
        family: of the environments.
        batch: of them.
        epochs: outer steps on the same trials.
        seed: of environments and chance.
    """

    way = shot = query = None

    def __init__(self, agent: Agent, family: Family, batch: int, epochs: int = 1, seed: int = 0):
        self.agent, self.family, self.batch, self.epochs, self.seed = agent, family, batch, epochs, seed
        self._drawn: tuple[tuple[int, int], Task] | None = None

    def tasks(self, start: int, stop: int) -> Task:
        step, first = divmod(start, self.batch)
        start = step // self.epochs * self.batch + first
        stop = start + stop - (step * self.batch + first)
        if self._drawn is not None and self._drawn[0] == (start, stop):
            return self._drawn[1]
        params, generator = drawn(self.family, self.seed, start, stop)
        collected = self.agent.collect(self.family, params, generator)
        if self.epochs > 1:  # else it may be asked for again, by an agent that is another one by then
            self._drawn = (start, stop), collected
        return collected


def drawn(family: Family, seed: int, start: int, stop: int) -> tuple[Params, torch.Generator]:
    """The environments with indices ``start`` to ``stop - 1``, and a generator for chance in them."""
    key = keys(seed, torch.arange(start, stop))
    return family.draw(key), generator_of(key)


def generator_of(key: Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(int(derive(key[:1], 7)) & ((1 << 63) - 1))
