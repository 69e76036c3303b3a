"""Agents that adapt by reading: their memory outlives an episode, and a trial of episodes is one sequence (RL²).

Duan et al., 2016, arXiv:1611.02779; Wang et al., 2016, arXiv:1611.05763.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metafit.context import Context
from metafit.learners import Adapted
from metafit.rl.actions import Actions
from metafit.rl.agent import Agent, Outcome, experience, standardised
from metafit.rl.family import Family
from metafit.rl.objective import ClippedObjective
from metafit.rl.trial import Trial, act, advantages, to_go, width_of
from metafit.task import Examples, Task, count, take


class InContextAgent(Agent):
    """Reads percepts with a sequence network, acts by an actor on what it has in mind, and is trained by PPO.

    A network implements ``unroll`` over a whole trial and ``remember`` over one step; both give the same numbers.

    Args:
        observations, actions: of the family.
        width: of what the network has in mind.
        discount, mixing: γ and λ of the advantages, over the whole trial.
        clip, entropy: of PPO; ``critic``: weight of the critic's squared error.
    """

    in_context = True

    def __init__(
        self,
        observations: int,
        actions: Actions,
        width: int = 64,
        discount: float = 0.99,
        mixing: float = 0.95,
        clip: float = 0.2,
        entropy: float = 0.01,
        critic: float = 0.5,
    ):
        super().__init__(None)
        self.observations, self.actions = observations, actions
        self.width, self.discount, self.mixing, self.critic_weight = width, discount, mixing, critic
        self.percepts = width_of(observations, actions)
        self.criterion = ClippedObjective(actions, clip, entropy)
        self.actor, self.critic = self._head(actions.outputs, 0.01), self._head(1, 1.0)

    def unroll(self, x: Float[Tensor, "t percept"], memory: Any) -> tuple[Float[Tensor, "t width"], Any]:
        """What it has in mind after each percept of one trial, and the memory after the last."""
        raise NotImplementedError

    def remember(self, memory: Any, x: Float[Tensor, "n percept"]) -> tuple[Float[Tensor, "n width"], Any]:
        """What it has in mind after one more percept in each of n trials, and the memory."""
        raise NotImplementedError

    def decide(self, mind: Tensor, x: Tensor) -> Tensor:
        """Outputs of what it has in mind ``(..., width)`` and the percepts ``(..., percept)``."""
        return self.actor(mind)

    def read(self, memory: Any, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        mind, memory = self.remember(memory, x)
        return self.decide(mind, x), self.critic(mind)[..., 0], memory

    def adapt(self, support: Examples) -> Adapted:
        _, memory = self.unroll(support.x, take(self.begin(1), 0))
        return memory

    def predict(self, adapted: Adapted, x: Tensor) -> Tensor:
        mind = torch.stack([self.unroll(one[None], adapted)[0][0] for one in x.unbind(0)])
        return self.decide(mind, x)

    def loss(self, task: Task) -> tuple[Tensor, dict[str, Tensor]]:
        """PPO's loss of a trial, the query set; the trial itself is what it adapts to."""
        (x, y, weight), start = task.query, take(self.begin(1), 0)
        mind, _ = self.unroll(x, start)
        assert weight is not None
        decided = self.criterion(self.decide(mind, x), y, weight, Context())
        missed = (self.critic(mind)[:, 0] - y.target).square().mean()  # type: ignore[attr-defined]
        return decided + self.critic_weight * missed, {"return": y.reward.sum().detach()}  # type: ignore[attr-defined]

    def collect(self, family: Family, params: Any, generator: torch.Generator) -> Task:
        trial = self._trial(family, params, family.episodes, generator)
        # The critic tells how much better than the other trials at the same step this one will be, in units of their
        # spread: what is left of a trial it need not count, and rewards may be of any size.
        follows = to_go(trial.reward, self.discount)
        usual = follows.mean(0)
        spread = (follows - usual).std() + 1e-8
        value = usual + spread * trial.value
        advantage = advantages(trial.reward, value, self.discount, self.mixing)
        read = experience(trial, standardised(advantage), (advantage + value - usual) / spread)
        return Task(take(read, (slice(None), slice(0))), read)

    def live(self, family: Family, params: Any, moments: int, generator: torch.Generator) -> Outcome:
        trial = self._trial(family, params, moments, generator)
        places = trial.place.unflatten(1, (moments, -1))
        return Outcome(trial.returns(moments), torch.arange(moments), places)

    def _trial(self, family: Family, params: Any, episodes: int, generator: torch.Generator) -> Trial:
        return act(self, family, params, self.begin(count(params)), episodes, generator)[0]

    def _head(self, outputs: int, gain: float) -> nn.Linear:
        """A linear map whose outputs start small, so that the first policy has no preference."""
        head = nn.Linear(self.width, outputs)
        nn.init.orthogonal_(head.weight, gain)
        nn.init.zeros_(head.bias)
        return head
