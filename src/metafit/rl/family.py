"""The interface of task families: similar but different environments, all of them stepped at once."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from metafit.rl.actions import Actions

Params = Any
State = Any


class Family:
    """Environments that differ in their parameters; N of them are simulated side by side, without a loop over them.

    A family is pure functions of tensors whose leading dimension counts environments, and so has no state of its own.
    Which environment has index i is a function of the seed and i alone, whoever asks for it and with how many others.

    Attributes:
        name: in the catalogue.
        observations: numbers that an agent sees.
        actions: what it may do.
        horizon: steps of an episode; all episodes are as long.
        episodes: of a trial, in which the environment is the same one, unless it ``changes``.
    """

    name: str
    observations: int
    actions: Actions
    horizon: int
    episodes: int

    def draw(self, key: Int64[Tensor, " n"]) -> Params:
        """The parameters of the environments with these keys (``data.randomness.keys``), a pytree of tensors."""
        raise NotImplementedError

    def reset(self, params: Params, generator: torch.Generator) -> tuple[State, Float[Tensor, "n observations"]]:
        """The state that an episode starts in, and what is seen of it."""
        raise NotImplementedError

    def step(
        self, params: Params, state: State, action: Shaped[Tensor, "n ..."], generator: torch.Generator
    ) -> tuple[State, Float[Tensor, "n observations"], Float[Tensor, " n"]]:
        """The next state, what is seen of it, and the reward."""
        raise NotImplementedError

    def at(self, params: Params, clock: int) -> Params:
        """The parameters at a step of the trial, from 0: an environment that changes is another one later."""
        return params

    def place(self, state: State) -> Float[Tensor, "n 2"] | None:
        """Where the agent is, for pictures of its way; ``None`` where there is no such place."""
        return None

    def goal(self, params: Params) -> Float[Tensor, "n 2"] | None:
        """Where it should be."""
        return None
