"""Agents that adapt by policy gradients: MAML, and what it is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metafit.context import Context
from metafit.errors import unknown
from metafit.learners import Adapted, GradientLearner
from metafit.optim import ALFA, SGD, Adam, MetaOptimizer, MetaSGD, Params
from metafit.over_tasks import over_tasks
from metafit.rl.actions import Actions
from metafit.rl.agent import Agent, Outcome, experience, standardised
from metafit.rl.family import Family
from metafit.rl.objective import ClippedObjective, PolicyGradient
from metafit.rl.trial import Trial, act, advantages, to_go
from metafit.task import Examples, Task, count, take

RULES: Mapping[str, Callable[[int, float, Params], MetaOptimizer]] = {
    "sgd": lambda steps, rate, params: SGD(rate),
    "adam": lambda steps, rate, params: Adam(rate),
    "meta-sgd": lambda steps, rate, params: MetaSGD(params, rate),
    "alfa": lambda steps, rate, params: ALFA(params, steps, rate),
}


class GradientAgent(GradientLearner, Agent):
    """A policy over observations that adapts by steps of an update rule on the policy gradient of its episodes.

    MAML (Finn et al., 2017, arXiv:1703.03400, section 5.3), with the inner objective of ProMP (Rothfuss et al., 2019,
    arXiv:1810.06784), PPO's for the outer one, and for each environment a baseline of its own. Without ``adapting`` in
    training it is multi-task PPO: one policy for all environments, which fine-tuning starts from.

    Args:
        observations, actions: of the family.
        width: of two hidden layers.
        rule: the update rule: a name of ``RULES``, or what makes one from the policy's parameters.
        rate: of its steps, at the start where it is learned.
        rounds: episodes of an environment before each update.
        steps: updates on the same episodes.
        later: how far updates after the first go, of what the rule says (half in Finn et al.).
        clipped: whether inner steps have PPO's clip, as those of a baseline that takes many of them.
        adapting: whether training adapts before it scores.
        discount, mixing: γ and λ of the advantages, within an episode.
        clip, entropy: of PPO.
    """

    def __init__(
        self,
        observations: int,
        actions: Actions,
        width: int = 64,
        rule: str | Callable[[Params], MetaOptimizer] = "sgd",
        rate: float = 0.1,
        rounds: int = 20,
        steps: int = 1,
        later: float = 0.5,
        clipped: bool = False,
        adapting: bool = True,
        discount: float = 0.99,
        mixing: float = 1.0,
        clip: float = 0.2,
        entropy: float = 0.0,
    ):
        body = nn.Sequential(
            _Seen(observations), nn.Linear(observations, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        head = _Outputs(width, actions)
        if isinstance(rule, str):
            if rule not in RULES:
                raise unknown("rule", rule, RULES)
            rule = partial(RULES[rule], steps, rate)
        inner = ClippedObjective(actions, clip) if clipped else PolicyGradient(actions)
        super().__init__(body, head, None, "all", rule, inner, steps=steps)
        self.observations, self.actions, self.rounds, self.meta_trains = observations, actions, rounds, adapting
        self.later, self.discount, self.mixing = later, discount, mixing
        self.criterion = ClippedObjective(actions, clip, entropy)

    def begin(self, n: int) -> Adapted:
        """The policy's parameters, and what the rule remembers from update to update."""
        parameters = {name: p.detach().expand(n, *p.shape) for name, p in self.initial().items()}
        return {"parameters": parameters, "state": over_tasks(self.optimizer.init, parameters)}

    def read(self, memory: Adapted, x: Tensor) -> tuple[Tensor, Tensor, Adapted]:
        each = x.unflatten(0, (count(memory), -1))
        outputs = torch.vmap(self.predict)(memory, each).flatten(0, 1)
        return outputs, outputs.new_zeros(len(outputs)), memory

    def score(self, outputs: Tensor, query: Examples) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.criterion(outputs, query.y, query.weight, Context())
        return loss, {"return": query.y.reward.sum().detach() / self.rounds}  # type: ignore[attr-defined]

    def loss(self, task: Task) -> tuple[Tensor, dict[str, Tensor]]:
        if self.meta_trains:
            return super().loss(task)
        return self.score(self.predict({"parameters": self.initial()}, task.query.x), task.query)

    def collect(self, family: Family, params: Any, generator: torch.Generator) -> Task:
        before = self._round(family, params, self.begin(count(params)), generator)
        if not self.meta_trains:
            return Task(take(before, (slice(None), slice(0))), before)
        with torch.no_grad():
            adapted = over_tasks(self.adapt, before)
        return Task(before, self._round(family, params, adapted, generator))

    @torch.no_grad()
    def live(self, family: Family, params: Any, moments: int, generator: torch.Generator) -> Outcome:
        memory, returns, places = self.begin(count(params)), [], []
        for moment in range(moments):
            seen, place = self._acted(family, params, memory, generator, moment)
            returns.append(seen.y.reward.sum(-1) / self.rounds)  # type: ignore[attr-defined]
            places.append(place)
            if moment < moments - 1:
                memory = over_tasks(partial(self.onward, moment), (memory, seen))
        episodes = torch.arange(moments) * self.rounds
        return Outcome(torch.stack(returns, 1), episodes, torch.stack(places, 1))

    def learn(self, memory: Adapted, episodes: Trial, real: Tensor, rounds: int) -> Adapted:
        return over_tasks(partial(self.onward, rounds), (memory, self._lessons(episodes, real)))

    def onward(self, rounds: int, known: tuple[Adapted, Examples]) -> Adapted:
        """From what it has in mind after so many rounds, and the experience of one more."""
        memory, support = known
        params, state = memory["parameters"], memory["state"]
        start, given = params, (support.x, None, support.y, support.weight, None)
        taken, share = rounds * self.steps, self.later if rounds else 1.0
        for step in range(taken, taken + self.steps):
            params, state = self._step(params, state, start, Context(step, taken + self.steps), given)
        moved = {name: start[name] + share * (p - start[name]) for name, p in params.items()}
        return {"parameters": moved, "state": state}

    def _round(self, family: Family, params: Any, memory: Adapted, generator: torch.Generator) -> Examples:
        return self._acted(family, params, memory, generator)[0]

    def _acted(
        self, family: Family, params: Any, memory: Adapted, generator: torch.Generator, moment: int = 0
    ) -> tuple[Examples, Tensor]:
        """As many episodes as a round has, side by side, as one task's experience ``(N, rounds · horizon)``; and where
        the agent went in the first of them."""
        each = tree_map(lambda leaf: leaf.repeat_interleave(self.rounds, 0), params)
        trial, _ = act(self, family, each, memory, 1, generator, clock=moment * family.horizon)
        trial = tree_map(lambda leaf: leaf.unflatten(0, (-1, self.rounds)), trial)
        return self._lessons(trial), trial.place[:, 0]

    def _lessons(self, episodes: Trial, real: Tensor | None = None) -> Examples:
        """Episodes ``(n, m, T, ...)`` as experience ``(n, m · T)``; of one environment they may differ in length, and
        only the steps that are ``real`` ``(1, m, T)`` are kept."""
        value = linear_baseline(episodes.x[..., : self.observations], episodes.reward, self.discount, real)
        found = advantages(episodes.reward.flatten(0, 1), value.flatten(0, 1), self.discount, self.mixing)
        found = found.view_as(value)

        def rows(leaf: Tensor) -> Tensor:
            return leaf.flatten(1, 2) if real is None else leaf[real][None]

        return experience(tree_map(rows, episodes), standardised(rows(found), -1), rows(found + value))


def linear_baseline(
    observation: Float[Tensor, "n m t o"],
    reward: Float[Tensor, "n m t"],
    discount: float,
    real: Bool[Tensor, "n m t"] | None = None,
) -> Float[Tensor, "n m t"]:
    """The value of each step of M episodes in each of N environments, by ridge regression of the returns that followed.

    Features are the observation, its squares, and time up to its cube (Duan et al., 2016, arXiv:1604.06778). Steps that
    are not real, after an episode's end, do not count, and are worth nothing.
    """
    follows = to_go(reward.flatten(0, 1), discount)
    time = torch.arange(reward.shape[-1], dtype=reward.dtype) / 100
    clock = torch.stack([time**0, time, time**2, time**3], -1).expand(*reward.shape, 4)
    features = torch.cat([observation, observation.square(), clock], -1).flatten(1, 2)
    if real is not None:
        features = features * real.flatten(1)[..., None]
    gram = features.mT @ features
    gram = gram + 1e-5 * gram.shape[-1] * torch.eye(gram.shape[-1], dtype=gram.dtype)
    weights = torch.linalg.solve(gram, features.mT @ follows.view(len(reward), -1, 1))
    return (features @ weights)[..., 0].view_as(reward)


class _Seen(nn.Module):
    """What a policy without memory reads of a percept: the observation."""

    def __init__(self, observations: int):
        super().__init__()
        self.observations = observations

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.observations]


class _Outputs(nn.Module):
    """Logits; or means, with a learned spread that is the same everywhere."""

    def __init__(self, width: int, actions: Actions):
        super().__init__()
        self.mean = nn.Linear(width, actions.size)
        nn.init.orthogonal_(self.mean.weight, 0.01)
        nn.init.zeros_(self.mean.bias)
        self.log_deviation = None if actions.discrete else nn.Parameter(torch.full((actions.size,), -0.5))

    def forward(self, features: Tensor) -> Tensor:
        mean = self.mean(features)
        return mean if self.log_deviation is None else torch.cat([mean, self.log_deviation.expand_as(mean)], -1)
