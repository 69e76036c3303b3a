"""What is known to act well: exact or classical ways for bandits and tabular MDPs, which agents are held against.

All of them know the family that environments are drawn from, as a meta-trained agent does, and not the environment.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from metafit.rl.families import Bernoulli, Tabular
from metafit.rl.trial import Acts


def bayes_optimal(arms: int, pulls: int) -> float:
    """The most that a trial of a Bernoulli bandit with uniform arms can bring on average, by dynamic programming.

    A state is how often each arm gave 1 and 0; arms are alike, so their order does not matter. 5 arms and 10 pulls are
    14,000 states; the number grows like pulls to the power of twice the arms.

    >>> round(bayes_optimal(2, 2), 4)  # ½, then 2/3 after a success, ½ on the other arm after a failure
    1.0833
    """

    @cache
    def value(state: tuple[tuple[int, int], ...], left: int) -> float:
        if left == 0:
            return 0.0
        best = 0.0
        for i, (ones, zeros) in enumerate(state):
            if i and state[i] == state[i - 1]:
                continue  # the same arm again
            p = (ones + 1) / (ones + zeros + 2)
            rest = state[:i] + state[i + 1 :]
            won, lost = (tuple(sorted((*rest, arm))) for arm in ((ones + 1, zeros), (ones, zeros + 1)))
            best = max(best, p * (1 + value(won, left - 1)) + (1 - p) * value(lost, left - 1))
        return best

    return value(((0, 0),) * arms, pulls)


class _Counts(NamedTuple):
    """What a bandit's trial has shown: of each arm, how many rewards, and their sum ``(n, arms)``."""

    pulls: Float[Tensor, "n arms"]
    won: Float[Tensor, "n arms"]


class _BanditOracle(Acts):
    """Reads the last arm and its reward off the percept, and gives each arm a score: the greatest is pulled."""

    def __init__(self, family: Bernoulli, seed: int = 0):
        self.arms, self.trial = family.actions.size, family.episodes
        self.generator = torch.Generator().manual_seed(seed)

    def begin(self, n: int) -> _Counts:
        return _Counts(torch.zeros(n, self.arms), torch.zeros(n, self.arms))

    def read(self, memory: _Counts, x: Tensor) -> tuple[Tensor, Tensor, _Counts]:
        pulled, reward = x[:, : self.arms], x[:, self.arms : self.arms + 1]
        counts = _Counts(memory.pulls + pulled, memory.won + pulled * reward)
        best = self.scores(counts).argmax(-1)
        outputs = torch.full_like(pulled, -torch.inf).scatter(-1, best[:, None], 0.0)
        return outputs, torch.zeros(len(x)), counts

    def scores(self, counts: _Counts) -> Float[Tensor, "n arms"]:
        raise NotImplementedError


class Thompson(_BanditOracle):
    """Pulls the arm that is best in a draw of the posterior (Thompson, 1933)."""

    def scores(self, counts: _Counts) -> Tensor:
        alpha, beta = counts.won + 1, counts.pulls - counts.won + 1
        draws = [torch._standard_gamma(part, self.generator) for part in (alpha, beta)]
        return draws[0] / (draws[0] + draws[1])


class UCB(_BanditOracle):
    """Pulls the arm with the greatest mean plus c·√(log t / pulls); each arm once first (UCB1, Auer et al., 2002).

    Args:
        exploration: c; UCB1's √2 explores far too much in short trials.
    """

    def __init__(self, family: Bernoulli, seed: int = 0, exploration: float = 0.5):
        super().__init__(family, seed)
        self.exploration = exploration

    def scores(self, counts: _Counts) -> Tensor:
        time = counts.pulls.sum(-1, keepdim=True).clamp_min(1.0)
        bonus = self.exploration * (time.log() / counts.pulls).sqrt()
        return (counts.won / counts.pulls + bonus).nan_to_num(torch.inf, torch.inf, torch.inf)


class Gittins(_BanditOracle):
    """Pulls the arm with the greatest Gittins index, for a discount of 1 − 1/pulls of the trial (Gittins, 1979).

    The index of an arm is the certain reward a step that is as good as it: found by dynamic programming over what the
    arm may still show, for a grid of such rewards.
    """

    def __init__(self, family: Bernoulli, seed: int = 0):
        super().__init__(family, seed)
        self.table = torch.from_numpy(gittins_indices(self.trial, 1 - 1 / max(2, self.trial)))

    def scores(self, counts: _Counts) -> Tensor:
        ones, zeros = counts.won.long(), (counts.pulls - counts.won).long()
        noise = 1e-6 * torch.rand(ones.shape, generator=self.generator)  # between equal arms
        return self.table[ones, zeros].float() + noise


def gittins_indices(pulls: int, discount: float, rewards: int = 200) -> np.ndarray:
    """The index of a Bernoulli arm with a uniform prior after so many ones and zeros ``(pulls + 1, pulls + 1)``.

    Args:
        pulls: the most that an arm is asked for; the look ahead goes as far again, and 1/(1 − discount) more.
        rewards: grid points; an index is right to 1/rewards.
    """
    ahead = 2 * pulls + int(1 / (1 - discount))
    certain = (np.arange(rewards) + 0.5) / rewards
    index = np.zeros((pulls + 1, pulls + 1))
    # of an arm that is pulled from now on, or left for the certain reward for good; by the number of pulls so far
    ones = np.arange(ahead + 1)
    mean = (ones + 1) / (ahead + 2)
    retired = certain / (1 - discount)
    value = np.maximum(mean[:, None] / (1 - discount), retired)
    for n in range(ahead - 1, -1, -1):
        ones = np.arange(n + 1)
        p = ((ones + 1) / (n + 2))[:, None]
        pulled = p * (1 + discount * value[1 : n + 2]) + (1 - p) * discount * value[: n + 1]
        if n <= pulls:
            better = (pulled >= retired).sum(1)  # of certain rewards, as they grow, up to the index
            index[ones, n - ones] = better / rewards
        value = np.maximum(pulled, retired)
    return index


class _Model(NamedTuple):
    """A posterior over tabular MDPs, and the policy that acts on a draw of it.

    Attributes:
        visits: of the next state, with the prior's 1 ``(n, S, A, S)``.
        pulls, won: how many rewards, and their sum ``(n, S, A)``.
        policy: the action by step and state ``(n, horizon, S)``; state, action: the last ones; step: of the episode.
    """

    visits: Tensor
    pulls: Tensor
    won: Tensor
    policy: Int64[Tensor, "n horizon s"]
    state: Int64[Tensor, " n"]
    step: Int64[Tensor, " n"]


class PSRL(Acts):
    """Acts in each episode as is best in an MDP drawn from the posterior (Strens, 2000; Osband et al., 2013,
    arXiv:1306.0940), with the family as the prior.
    """

    def __init__(self, family: Tabular, seed: int = 0):
        self.family, self.generator = family, torch.Generator().manual_seed(seed)

    def begin(self, n: int) -> _Model:
        s, a, h = self.family.observations, self.family.actions.size, self.family.horizon
        integers = torch.zeros(n, dtype=torch.int64)
        policy = torch.zeros(n, h, s, dtype=torch.int64)
        return _Model(torch.ones(n, s, a, s), torch.zeros(n, s, a), torch.zeros(n, s, a), policy, integers, integers)

    def read(self, memory: _Model, x: Tensor) -> tuple[Tensor, Tensor, _Model]:
        s, a = self.family.observations, self.family.actions.size
        seen, acted, reward, first = x[:, :s].argmax(-1), x[:, s : s + a], x[:, s + a], bool(x[0, -1] > 0)
        n = torch.arange(len(x))
        visits, pulls, won = memory.visits.clone(), memory.pulls.clone(), memory.won.clone()
        if bool(acted.any()):
            action = acted.argmax(-1)
            pulls[n, memory.state, action] += 1
            won[n, memory.state, action] += reward
            if not first:  # what follows the last step of an episode is another episode
                visits[n, memory.state, action, seen] += 1
        policy = self._planned(visits, pulls, won) if first else memory.policy
        step = torch.zeros_like(memory.step) if first else memory.step + 1
        chosen = policy[n, step, seen]
        outputs = torch.full((len(x), a), -torch.inf).scatter(-1, chosen[:, None], 0.0)
        return outputs, torch.zeros(len(x)), _Model(visits, pulls, won, policy, seen, step)

    def _planned(self, visits: Tensor, pulls: Tensor, won: Tensor) -> Tensor:
        """The best policy in a draw: rewards are normal with prior N(1, 1) and variance 1."""
        transition = torch._standard_gamma(visits, self.generator)
        transition = transition / transition.sum(-1, keepdim=True)
        spread = (pulls + 1).rsqrt()
        reward = (1 + won) / (pulls + 1) + spread * torch.randn(pulls.shape, generator=self.generator)
        return best_policy(transition, reward, self.family.horizon)[0]


def best_policy(
    transition: Float[Tensor, "n s a s"], reward: Float[Tensor, "n s a"], horizon: int
) -> tuple[Int64[Tensor, "n horizon s"], Float[Tensor, "n s"]]:
    """The best action at each step of an episode, by state, in known MDPs; and what each first state is worth."""
    value, chosen = reward.new_zeros(reward.shape[:2]), []
    for _ in range(horizon):
        worth = reward + (transition @ value[:, None, :, None])[..., 0]
        value, action = worth.max(-1)
        chosen.append(action)
    return torch.stack(chosen[::-1], 1), value


class AtRandom(Acts):
    """Every action as likely."""

    def __init__(self, family: Any, seed: int = 0):
        self.outputs = family.actions.outputs

    def begin(self, n: int) -> Tensor:
        return torch.zeros(n, 0)

    def read(self, memory: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros(len(x), self.outputs), torch.zeros(len(x)), memory
