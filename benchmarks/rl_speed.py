"""Environment steps a second with learning: `python benchmarks/rl_speed.py`.

RL² (a GRU, one PPO step on each batch of trials) on two of metafit's families, which are simulated in batches; beside
it the same tasks written as a ``gymnasium.Env``, with the same network as torch's own modules and the same loss:

- ``one at a time``: the plain loop, one environment, one step of the policy;
- ``gymnasium.vector``: ``SyncVectorEnv``, one step of the policy for all;
- ``torchrl``: its ``Collector`` over the same ``SyncVectorEnv`` (over its own ``SerialEnv`` it is ten times slower),
  where torchrl is installed;
- ``GymFamily``: metafit's adapter on the same ``gymnasium.Env``.

All in one process, in turn; ratios are of rounds, by the clock. With one thread, seconds of the processor tell what a
machine gives that does nothing else. One environment at a time, a tenth of the batch is enough to tell the speed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from itertools import count
from typing import Any

import gymnasium
import numpy as np
import torch
from common import RESULTS
from torch import Tensor, nn

from metafit import __version__
from metafit.data.randomness import keys
from metafit.disk import write_json
from metafit.rl import Actions, Experience, Family, RecurrentAgent, advantages
from metafit.rl.agent import standardised
from metafit.rl.families import Bernoulli, Navigation
from metafit.rl.gym import GymFamily
from metafit.rl.trial import width_of
from metafit.task import Task
from metafit.training import meta_train

TARGET = 100_000  # steps a second, with learning, on two threads
RATE, CLIP = 1e-3, 1.0


class Point(gymnasium.Env):
    """``Navigation``, as a gymnasium environment: one goal for its whole life."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, goal: Any = (0.0, 0.0)):
        self.goal = np.asarray(goal, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place = np.zeros(2, np.float32)
        return self.place, {}

    def step(self, action: Any) -> Any:
        self.place = self.place + np.clip(action, -0.1, 0.1)
        away = self.place - self.goal
        return self.place, -float(np.sqrt(away @ away)), False, False, {}


class Arms(gymnasium.Env):
    """``Bernoulli``, likewise: a pull is an episode, and nothing is seen."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (0,), np.float32)
    action_space = gymnasium.spaces.Discrete(5)

    def __init__(self, means: Any = (0.5,) * 5):
        self.goal = np.asarray(means, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(0, np.float32), {}

    def step(self, action: Any) -> Any:
        reward = float(self.np_random.random() < self.goal[action])
        return np.zeros(0, np.float32), reward, True, False, {}


class Percepts(gymnasium.Wrapper):
    """A trial as one long episode, which shows what RL² reads: the observation, the last action, its reward, whether
    an episode begins."""

    def __init__(self, env: gymnasium.Env, actions: Actions, horizon: int, episodes: int):
        super().__init__(env)
        self.actions, self.horizon, self.steps = actions, horizon, horizon * episodes
        width = width_of(env.observation_space.shape[0], actions)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32)

    def reset(self, **given: Any) -> Any:
        self.clock = 0
        observation, info = self.env.reset(**given)
        return self._percept(observation, np.zeros(self.actions.size, np.float32), 0.0), info

    def step(self, action: Any) -> Any:
        observation, reward, _, _, info = self.env.step(action)
        self.clock += 1
        if self.clock % self.horizon == 0 and self.clock < self.steps:
            observation = self.env.reset()[0]
        last = np.eye(self.actions.size, dtype=np.float32)[action] if self.actions.discrete else action
        return self._percept(observation, last, reward), reward, False, self.clock == self.steps, info

    def _percept(self, observation: Any, action: Any, reward: float) -> Any:
        begins = float(self.clock % self.horizon == 0)
        return np.concatenate([observation, action, [reward, begins]], dtype=np.float32)


class Plain(nn.Module):
    """The network of RL² from torch's own modules, and the PPO step on it that metafit takes."""

    def __init__(self, family: Family, width: int):
        super().__init__()
        self.actions, self.width = family.actions, width
        percepts = width_of(family.observations, family.actions)
        self.gru = nn.GRU(percepts, width, batch_first=True)
        self.actor, self.critic = nn.Linear(width, family.actions.outputs), nn.Linear(width, 1)
        self.optimizer = torch.optim.AdamW(self.parameters(), RATE)

    def one(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mind, state = self.gru(x[:, None], state)
        return self.actor(mind[:, 0]), self.critic(mind[:, 0])[:, 0], state

    def learn(self, x: Tensor, action: Tensor, log_prob: Tensor, reward: Tensor, value: Tensor) -> None:
        """From trials ``(N, T, ...)``: the losses and constants of ``RecurrentAgent``."""
        advantage = advantages(reward, value, 0.99, 0.95)
        mind = self.gru(x)[0]
        outputs, standard = self.actor(mind), standardised(advantage)
        ratio = (self.actions.log_prob(outputs, action) - log_prob).exp()
        gained = torch.minimum(ratio * standard, ratio.clamp(0.8, 1.2) * standard) + 0.01 * self.actions.entropy(
            outputs
        )
        missed = (self.critic(mind)[..., 0] - advantage - value).square().mean()
        self.optimizer.zero_grad()
        (0.5 * missed - gained.mean()).backward()
        nn.utils.clip_grad_norm_(self.parameters(), CLIP)
        self.optimizer.step()


class Case:
    """A family, and the same as environments of gymnasium."""

    def __init__(self, family: Family, env: type[gymnasium.Env], batch: int, width: int):
        self.family, self.env, self.batch, self.width = family, env, batch, width
        self.steps = family.horizon * family.episodes

    def trials(self, n: int) -> list[gymnasium.Env]:
        family = self.family
        goals = family.draw(keys(0, torch.arange(n))).numpy()
        return [Percepts(self.env(goal), family.actions, family.horizon, family.episodes) for goal in goals]

    def adapted(self) -> GymFamily:
        def apply(env: Any, goal: Any) -> None:
            env.goal = goal.astype(np.float32)

        return GymFamily(self.env, self.family.draw, apply, self.family.horizon, self.family.episodes, "adapted")


class Timed(Experience):
    """That knows how long its agent acted."""

    seconds = 0.0

    def tasks(self, start: int, stop: int) -> Task:
        started = time.perf_counter()
        drawn = super().tasks(start, stop)
        self.seconds += time.perf_counter() - started
        return drawn


def metafit_(case: Case, family: Family, batch: int, steps: int) -> tuple[Callable[[], None], Callable[[], float]]:
    """The work of a round, and the share of acting in all the time so far."""
    agent, rounds = RecurrentAgent(family.observations, family.actions, width=case.width), count()
    spent = []

    def work() -> None:
        started = time.perf_counter()
        experience = Timed(agent, family, batch, seed=next(rounds))  # other trials than in the round before
        options: dict[str, Any] = {"backend": "vmap", "clip": CLIP, "validate_every": steps, "show_progress": False}
        meta_train(agent, experience, None, steps=steps, rate=RATE, **options)
        spent.append((experience.seconds, time.perf_counter() - started))

    return work, lambda: sum(acting for acting, _ in spent) / sum(whole for _, whole in spent)


def one_at_a_time(case: Case, n: int) -> Callable[[], None]:
    envs, plain, generator = case.trials(n), Plain(case.family, case.width), torch.Generator().manual_seed(0)

    @torch.no_grad()
    def trial(env: gymnasium.Env) -> list[Tensor]:
        state, steps, over = torch.zeros(1, 1, case.width), [], False
        seen, _ = env.reset(seed=0)
        while not over:
            x = torch.from_numpy(seen)[None]
            outputs, value, state = plain.one(x, state)
            action = plain.actions.sample(outputs, generator)
            seen, reward, _, over, _ = env.step(action[0].numpy())
            steps.append((x, action, plain.actions.log_prob(outputs, action), torch.tensor([reward]), value))
        return [torch.cat(column) for column in zip(*steps, strict=True)]

    return lambda: plain.learn(*(torch.stack(part) for part in zip(*map(trial, envs), strict=True)))


def vectorised(case: Case, n: int) -> Callable[[], None]:
    trials, plain, generator = case.trials(n), Plain(case.family, case.width), torch.Generator().manual_seed(0)
    envs = gymnasium.vector.SyncVectorEnv([lambda env=env: env for env in trials])

    @torch.no_grad()
    def acted() -> list[Tensor]:
        state, steps = torch.zeros(1, n, case.width), []
        seen, _ = envs.reset(seed=0)
        for _ in range(case.steps):
            x = torch.from_numpy(seen)
            outputs, value, state = plain.one(x, state)
            action = plain.actions.sample(outputs, generator)
            seen, reward, _, _, _ = envs.step(action.numpy())
            log_prob = plain.actions.log_prob(outputs, action)
            steps.append((x, action, log_prob, torch.from_numpy(reward).float(), value))
        return [torch.stack(column, 1) for column in zip(*steps, strict=True)]

    return lambda: plain.learn(*acted())


def with_torchrl(case: Case, n: int) -> Callable[[], None]:
    from tensordict.nn import TensorDictModule
    from torchrl.collectors import Collector
    from torchrl.data import Unbounded
    from torchrl.envs import GymWrapper, TransformedEnv
    from torchrl.envs.transforms import TensorDictPrimer

    trials, plain, generator = case.trials(n), Plain(case.family, case.width), torch.Generator().manual_seed(0)
    disabled = gymnasium.vector.AutoresetMode.DISABLED  # the collector resets
    envs = gymnasium.vector.SyncVectorEnv([lambda env=env: env for env in trials], autoreset_mode=disabled)
    primer = TensorDictPrimer({"memory": Unbounded((n, case.width))}, default_value=0.0, expand_specs=False)

    def policy(x: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        outputs, value, state = plain.one(x, memory[None].contiguous())
        action = plain.actions.sample(outputs, generator)
        return action, plain.actions.log_prob(outputs, action), value, state[0]

    keyed = TensorDictModule(
        policy, in_keys=["observation", "memory"], out_keys=["action", "log_prob", "value", ("next", "memory")]
    )
    frames = n * case.steps
    collector = Collector(
        TransformedEnv(GymWrapper(envs, categorical_action_encoding=True), primer),
        keyed,
        frames_per_batch=frames,
        total_frames=-1,
        reset_at_each_iter=True,
        auto_register_policy_transforms=False,
        track_traj_ids=False,
    )
    batches = iter(collector)

    def work() -> None:
        got = next(batches)
        assert got.shape == (n, case.steps)
        reward = got["next", "reward"][..., 0].float()
        plain.learn(got["observation"], got["action"], got["log_prob"], reward, got["value"])

    return work


def measured(case: Case, rounds: int) -> list[dict[str, Any]]:
    """The rows of a case: steps a second, and how many times as many metafit's are, both as medians over rounds."""
    batch, few = case.batch, max(1, case.batch // 10)
    native, acting = metafit_(case, case.family, batch, 3)
    works: dict[str, tuple[int, Callable[[], None]]] = {"metafit": (3 * batch, native)}
    failed: dict[str, str] = {}
    adapter, simulating = metafit_(case, case.adapted(), batch, 1)
    works["GymFamily"] = batch, adapter
    works["gymnasium.vector"] = batch, vectorised(case, batch)
    works["one at a time"] = few, one_at_a_time(case, few)
    try:
        works["torchrl"] = batch, with_torchrl(case, batch)
        works["torchrl"][1]()
    except Exception as error:  # whatever a peer has: its row says so, the others stay
        works.pop("torchrl", None)
        failed["torchrl"] = f"{type(error).__name__}: {error}".splitlines()[0]
    speeds: dict[str, list[float]] = {name: [] for name in works}
    alone: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work[1]()
    for _ in range(rounds):
        for name, (trials, work) in works.items():
            started, processor = time.perf_counter(), time.process_time()
            work()
            speeds[name].append(trials * case.steps / (time.perf_counter() - started))
            alone[name].append(trials * case.steps / (time.process_time() - processor))
    shares = {"metafit": acting(), "GymFamily": simulating()}
    rows = []
    for name, found in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(speeds["metafit"], found, strict=True))
        row = {"contender": name, "trials": works[name][0], "steps_a_second": round(statistics.median(found))}
        row |= {"steps_a_processor_second": round(statistics.median(alone[name]))}
        row |= {"lowest": round(min(found)), "highest": round(max(found)), "metafit_is_faster": round(ratio, 2)}
        rows.append(row | ({"share_of_acting": round(shares[name], 2)} if name in shares else {}))
    return rows + [{"contender": name, "failed": why} for name, why in failed.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=32, help="of the GRU")
    parser.add_argument("--trials", type=int, default=1000, help="of bandits in a batch; of navigation a quarter")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cases = [Case(Bernoulli(), Arms, args.trials, args.width), Case(Navigation(), Point, args.trials // 4, args.width)]
    rows = []
    for case in cases:
        found = measured(case, args.rounds)
        reached = found[0]["steps_a_second"] >= TARGET
        rows.append(
            {"family": case.family.name, "steps_of_a_trial": case.steps, "reached": reached, "contenders": found}
        )
        print(json.dumps(rows[-1], indent=1), flush=True)
    made = {"schema": 1, "metafit": __version__, "command": " ".join(["python", *sys.argv]), "target": TARGET}
    made |= {"threads": args.threads, "rounds": args.rounds, "width": args.width, "versions": versions()}
    made["load"] = round(os.getloadavg()[1], 1)  # 1 a thread where the machine does nothing else
    write_json(RESULTS / "rl-speed.json", {**made, "cores": os.cpu_count(), "rows": rows})


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "gymnasium", "torchrl"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


if __name__ == "__main__":
    main()
