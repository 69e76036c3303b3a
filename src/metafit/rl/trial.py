"""Trials: an agent acting in many environments at once, and what it saw."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from metafit.rl.actions import Actions
from metafit.rl.family import Family, Params
from metafit.task import count


class Decisions(NamedTuple):
    """What an agent did at each percept, and what came of it: the ``y`` of experience, where ``x`` is the percepts.

    Attributes:
        action: taken ``(T,)`` or ``(T, size)``.
        log_prob: its log-probability under the policy that took it ``(T,)``.
        reward: that it brought ``(T,)``.
        advantage: how much better it was than what the policy does on average ``(T,)``.
        target: what a critic should have said ``(T,)``.
    """

    action: Shaped[Tensor, "t ..."]
    log_prob: Float[Tensor, " t"]
    reward: Float[Tensor, " t"]
    advantage: Float[Tensor, " t"]
    target: Float[Tensor, " t"]


class Trial(NamedTuple):
    """The T steps of N trials, one after another over all their episodes; every leaf is ``(N, T, ...)``.

    Attributes:
        x: percepts (see ``percept``).
        action, log_prob, reward: see ``Decisions``; ``value``: what the agent's critic said before the step.
        place: where it was after the step, for families that have a place; else empty.
    """

    x: Float[Tensor, "n t percept"]
    action: Shaped[Tensor, "n t ..."]
    log_prob: Float[Tensor, "n t"]
    reward: Float[Tensor, "n t"]
    value: Float[Tensor, "n t"]
    place: Float[Tensor, "n t ..."]

    def returns(self, episodes: int) -> Float[Tensor, "n episodes"]:
        """The sum of rewards of each episode."""
        return self.reward.unflatten(1, (episodes, -1)).sum(-1)


class Acts(Protocol):
    """Whatever can act in a family: an agent, an oracle."""

    def read(self, memory: Any, x: Float[Tensor, "n percept"]) -> tuple[Tensor, Tensor, Any]:
        """From what was remembered and the percepts: outputs ``(n, outputs)``, values ``(n,)``, the new memory."""
        ...


def width_of(observations: int, actions: Actions) -> int:
    """How many numbers a percept is."""
    return observations + actions.size + 2


def percept(observation: Tensor, action: Tensor, reward: Tensor, first: bool) -> Float[Tensor, "n percept"]:
    """What an agent reads before it acts: the observation, its last action, the reward, whether an episode begins.

    The reward that ended an episode is read with the first observation of the next.
    """
    begins = torch.full_like(reward, float(first))
    return torch.cat([observation, action, reward[:, None], begins[:, None]], -1)


@torch.no_grad()
def act(
    agent: Acts,
    family: Family,
    params: Params,
    memory: Any,
    episodes: int,
    generator: torch.Generator,
    explore: bool = True,
    clock: int = 0,
) -> tuple[Trial, Any]:
    """Runs a trial in each of the environments.

    Args:
        agent: that acts in all of them.
        params: N environments of the family.
        memory: what the agent has in mind before the first step, of each.
        episodes: of the trial.
        generator: of actions and environments.
        explore: whether actions are drawn, or the most probable ones.
        clock: steps of the trial that are behind it, for environments that change.

    Returns:
        The trial, and what the agent has in mind after it.
    """
    n, actions = count(params), family.actions
    choose = (lambda outputs: actions.sample(outputs, generator)) if explore else actions.best
    last, reward = actions.none(n), torch.zeros(n)
    steps: list[tuple[Tensor, ...]] = []
    for step in range(episodes * family.horizon):
        now = family.at(params, clock + step)
        first = step % family.horizon == 0
        if first:
            state, observation = family.reset(now, generator)
        x = percept(observation, last, reward, first)
        outputs, value, memory = agent.read(memory, x)
        action = choose(outputs)
        log_prob = actions.log_prob(outputs, action)
        state, observation, reward = family.step(now, state, action, generator)
        place = family.place(state)
        steps.append((x, action, log_prob, reward, value, x[:, :0] if place is None else place))
        last = actions.encode(action)
    return Trial(*(torch.stack(column, 1) for column in zip(*steps, strict=True))), memory


def to_go(reward: Float[Tensor, "n t"], discount: float) -> Float[Tensor, "n t"]:
    """The return that follows each step."""
    return advantages(reward, torch.zeros_like(reward), discount, 1.0)


def advantages(
    reward: Float[Tensor, "n t"], value: Float[Tensor, "n t"], discount: float, mixing: float
) -> Float[Tensor, "n t"]:
    """Generalised advantages Σₖ (γλ)ᵏ δₜ₊ₖ with δₜ = rₜ + γ V(xₜ₊₁) − V(xₜ) (Schulman et al., 2016, arXiv:1506.02438).

    Over the whole of what is given, after which nothing is worth anything: the episodes of a trial are one stretch,
    as what an agent finds out in one is worth something in the next (Duan et al., 2016).

    Args:
        discount, mixing: γ and λ.
    """
    after = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    delta = reward + discount * after - value
    found = torch.empty_like(delta)
    running = torch.zeros_like(delta[:, 0])
    for t in range(delta.shape[1] - 1, -1, -1):
        running = delta[:, t] + discount * mixing * running
        found[:, t] = running
    return found
