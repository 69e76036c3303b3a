"""A trained agent as a folder, and an agent that acts step by step."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metafit.errors import BadInput
from metafit.rl.agent import Agent
from metafit.rl.catalog import CHANGING, FAMILIES, build
from metafit.rl.family import Family
from metafit.rl.trial import Trial, percept
from metafit.weights import load_folder


def load_agent(
    folder: str | os.PathLike[str], family: Family | None = None
) -> tuple[Agent, Family, list[dict[str, Any]]]:
    """The agent that a training left (or ``training.save_model``), its family, and the history of its training.

    Args:
        folder: the model folder.
        family: where it was trained on one of your own.

    Raises:
        BadInput: no such folder, damaged, of another kind, or of a family that is not in the catalogue.
    """
    about, tensors = load_folder(folder, "learner")
    made = about["learner"]
    if "env" not in made:
        raise BadInput(
            f"model folder {folder}: holds the learner {made['name']!r}, which does not act; name an agent's"
        )
    if family is None and made["env"].removeprefix(CHANGING) not in FAMILIES:
        raise BadInput(f"model folder {folder}: it acts in {made['env']!r}, a family of your own; pass it as family=")
    agent, family = build(made["name"], family or made["env"], made["env_options"], **made["options"])
    try:
        agent.load_state_dict(tensors)
    except RuntimeError:
        raise BadInput(
            f"model folder {folder}: its weights do not fit this family; pass the one that it was trained on"
        ) from None
    agent.recipe = made
    return agent.eval(), family, about["history"]


class Player:
    """An agent in one environment that somebody else runs: a robot, a game, a person.

    An agent that adapts by reading learns at every step. One that learns by rounds does so where an episode begins and
    it has seen a whole round since the last time; what it can learn from is its own drawn actions, so that with
    ``explore=False`` it stays as it is.

    >>> from metafit.rl.catalog import build
    >>> agent, family = build("rl2", "bandit")
    >>> player = Player(agent)
    >>> player.observe([], reward=0.0)  # an episode begins; there is nothing to see of a bandit
    >>> arm = player.act()
    >>> player.observe([], reward=1.0, first=True)

    Args:
        agent: of any kind.
        explore: whether actions are drawn, or the most probable ones.
        seed: of what is drawn.
    """

    def __init__(self, agent: Agent, explore: bool = True, seed: int = 0):
        self.agent, self.explore = agent.eval(), explore
        self.generator = torch.Generator().manual_seed(seed)
        self.forget()

    def forget(self) -> None:
        """Begins a trial: what is learned of an environment does not hold in another."""
        self._memory, self._last = self.agent.begin(1), self.agent.actions.none(1)
        self._outputs: Tensor | None = None
        self._begins = True
        self._episodes: list[list[Trial]] = [[]]  # of this round, each a step at a time
        self._acted: Trial | None = None  # whose reward is not known yet
        self._rounds = 0

    @torch.no_grad()
    def observe(self, observation: Any, reward: float = 0.0, first: bool = False) -> None:
        """What is seen now, and the reward of the last action.

        Args:
            observation: numbers ``(observations,)``.
            reward: of the action before; 0 before any.
            first: whether an episode begins here; that of a trial's first step is told anyway.

        Raises:
            BadInput: another number of observations, or one that is not finite.
        """
        seen = torch.as_tensor(np.asarray(observation, dtype=float), dtype=torch.get_default_dtype()).reshape(1, -1)
        if seen.shape[1] != self.agent.observations:
            raise BadInput(f"observation: {seen.shape[1]} numbers; the agent sees {self.agent.observations}")
        if not bool(seen.isfinite().all()) or not np.isfinite(reward):
            raise BadInput("observation: a number in it, or the reward, is not finite; leave such steps out")
        begins = first or self._begins
        self._note(seen.new_tensor([reward]), begins)
        self._seen = percept(seen, self._last, seen.new_tensor([reward]), begins)
        self._outputs, _, self._memory = self.agent.read(self._memory, self._seen)
        self._begins = False

    @torch.no_grad()
    def act(self) -> int | list[float]:
        """What to do now: the number of an action, or a list of numbers.

        Raises:
            BadInput: nothing was observed since the last action.
        """
        if self._outputs is None:
            raise BadInput("act: observe first; an agent acts on what it sees")
        actions = self.agent.actions
        action: Tensor = actions.sample(self._outputs, self.generator) if self.explore else actions.best(self._outputs)
        if self.agent.rounds and self.explore:
            log_prob = actions.log_prob(self._outputs, action)
            nothing = torch.zeros_like(log_prob)
            self._acted = Trial(self._seen, action, log_prob, nothing, nothing, self._seen[:, :0])
        self._last, self._outputs = actions.encode(action), None
        return int(action) if actions.discrete else action[0].tolist()

    def _note(self, reward: Tensor, begins: bool) -> None:
        """Writes down what came of the last action; where that ends a round, the agent learns from it."""
        if self._acted is not None:
            self._episodes[-1].append(self._acted._replace(reward=reward))
            self._acted = None
        if not begins or not self._episodes[-1]:
            return
        if len(self._episodes) == self.agent.rounds:
            episodes, real = _side_by_side(self._episodes)
            self._memory = self.agent.learn(self._memory, episodes, real, self._rounds)
            self._episodes, self._rounds = [], self._rounds + 1
        self._episodes.append([])


def _side_by_side(episodes: list[list[Trial]]) -> tuple[Trial, Tensor]:
    """Episodes of single steps as ``(1, M, T, ...)``, filled up with zeros, and which steps are real."""
    columns = zip(*(map(torch.cat, zip(*steps, strict=True)) for steps in episodes), strict=True)
    filled = (nn.utils.rnn.pad_sequence(list(column), batch_first=True)[None] for column in columns)
    lengths = torch.tensor([len(steps) for steps in episodes])
    return Trial(*filled), (torch.arange(int(lengths.max())) < lengths[:, None])[None]
