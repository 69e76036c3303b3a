"""The interface of agents: learners whose support set is experience, and whose predictor is a policy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from metafit.learners import Learner
from metafit.rl.actions import Actions
from metafit.rl.family import Family
from metafit.rl.trial import Decisions, Trial
from metafit.task import Examples, Task


class Outcome(NamedTuple):
    """What an agent did in N environments, by moment: an episode of a trial, or a round of episodes before an update.

    Attributes:
        returns: the mean return of an episode ``(N, moments)``.
        episodes: how many episodes the agent had seen before each moment ``(moments,)``.
        places: where it went in an episode of each moment ``(N, moments, horizon, 2)``; empty without places.
    """

    returns: Float[Tensor, "n moments"]
    episodes: Int64[Tensor, " moments"]
    places: Tensor


class Agent(Learner):
    """A learner over percepts ``(T, D)`` (``trial.percept``) and ``Decisions``, of one environment.

    ``adapt`` reads experience; ``predict`` gives the outputs, for ``Actions``, at percepts that follow it. ``read`` is
    the same one step at a time and for many environments at once, which is how an agent acts.

    Attributes:
        observations, actions: of the family.
        in_context: whether it adapts by reading, at every step; else by updates after rounds of episodes.
        rounds: how many episodes such a round has; 0 where it adapts by reading.
    """

    weighs = False
    in_context = False
    rounds = 0
    observations: int
    actions: Actions

    @property
    def measured_by(self) -> str:
        return "return"

    def begin(self, n: int) -> Any:
        """What it has in mind before the first step in each of n environments: a pytree, leading dimension n."""
        raise NotImplementedError

    def read(self, memory: Any, x: Float[Tensor, "n percept"]) -> tuple[Tensor, Tensor, Any]:
        """One step in n environments: outputs ``(n, outputs)``, values ``(n,)``, what it has in mind after it."""
        raise NotImplementedError

    def learn(self, memory: Any, episodes: Trial, real: Bool[Tensor, "1 m t"], rounds: int) -> Any:
        """What it has in mind after a round of M episodes in one environment, for agents that learn by rounds.

        Args:
            memory: what it had in mind in them; of one environment, as ``begin(1)``.
            episodes: side by side, ``(1, M, T, ...)``, filled up to the longest.
            real: which steps were made, and do not just fill up.
            rounds: how many it had learned from before.
        """
        raise NotImplementedError

    def collect(self, family: Family, params: Any, generator: torch.Generator) -> Task:
        """Experience of each environment to learn from, as a batch of tasks.

        The query set is what the loss is of; the support set is what the agent adapts to before it.
        """
        raise NotImplementedError

    def live(self, family: Family, params: Any, moments: int, generator: torch.Generator) -> Outcome:
        """Acts in environments that it adapts to meanwhile, for as many episodes, or updates, as ``moments``."""
        raise NotImplementedError


def experience(trial: Trial, advantage: Tensor, target: Tensor) -> Examples:
    """Trials as examples: percepts, and what was decided."""
    decided = Decisions(trial.action, trial.log_prob, trial.reward, advantage, target)
    return Examples(trial.x, decided, torch.ones_like(trial.reward))  # type: ignore[arg-type]


def standardised(values: Tensor, dim: int | None = None) -> Tensor:
    """Of mean 0 and variance 1 over a dimension, or over all of them."""
    return (values - values.mean(dim, keepdim=True)) / (values.std(dim, keepdim=True) + 1e-8)
