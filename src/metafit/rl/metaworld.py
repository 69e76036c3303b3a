"""Meta-World (Yu et al., 2020, arXiv:1910.10897; version 3): a robot's arm, its tasks, and goals that are not shown.

Needs ``pip install 'metafit[metaworld]'``, which brings the version of mujoco that Meta-World asks for; these adapters
ran with metaworld 3.1.1 and mujoco 3.3.0. An agent sees 39 numbers and acts by four. The reward function is pinned to
Meta-World's second, ``v2``, which is not the one of its first publication (McLean et al., 2025, arXiv:2505.11289):
figures of the two cannot be compared.

The environments are made from Meta-World's classes and not with ``gymnasium.make_vec``: there, as of 3.1.1, the names
``Meta-World/ML1-train`` and ``Meta-World/ML1-test`` both give the goals of the test.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metafit.data.randomness import below, derive
from metafit.errors import BadInput, unknown
from metafit.rl.gym import GymFamily, Numbers, imported

REWARD = "v2"
SUITES = ("ML10", "ML25", "ML45")
SPLITS = ("train", "test")


def ml1(
    task: str = "reach-v3", split: str = "train", seed: int = 0, horizon: int = 500, episodes: int = 2, workers: int = 0
) -> GymFamily:
    """One of the arm's 50 tasks, with 50 goals for training and 50 others for the test.

    The parameters ``(N, 2)`` are the index of the task, here always 0, and that of the goal.

    Args:
        task: as Meta-World calls it, ``push-v3`` for one.
        split: ``train`` or ``test``.
        seed: of the goals; those of the test are made from the seed after it.

    Raises:
        BadInput: metaworld is missing, or it has no such task.
    """
    known = imported("metaworld", "metaworld").ML1.ENV_NAMES
    if task not in known:
        raise unknown("task", task, known)
    return _family(task, split, seed, horizon, episodes, workers)


def ml(
    suite: str = "ML10", split: str = "train", seed: int = 0, horizon: int = 500, episodes: int = 2, workers: int = 0
) -> GymFamily:
    """Many of the arm's tasks, each with 50 goals, and 5 other tasks for the test.

    The parameters ``(N, 2)`` are the indices of the task, in Meta-World's order, and of its goal. A simulator keeps the
    robot of every task that it ever was given: with ML45 that is much memory a simulator.

    Args:
        suite: ``ML10``, ``ML25`` or ``ML45``.
        split, seed: see ``ml1``.

    Raises:
        BadInput: metaworld is missing, or the suite is none of these.
    """
    imported("metaworld", "metaworld")
    if suite not in SUITES:
        raise unknown("suite", suite, SUITES)
    return _family(suite, split, seed, horizon, episodes, workers)


def _family(name: str, split: str, seed: int, horizon: int, episodes: int, workers: int) -> GymFamily:
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    longest = imported("metaworld.sawyer_xyz_env", "metaworld").SawyerXYZEnv.max_path_length
    if horizon > longest:
        raise BadInput(f"horizon {horizon}: Meta-World's episodes end after {longest} steps")
    goals = [len(each) for _, each in _tasks(name, split, seed)]

    def draw(key: Tensor) -> Tensor:
        task = below(derive(key, 0), len(goals))
        goal = below(derive(key, 1), torch.tensor(goals)[task])
        return torch.stack([task, goal], -1).to(torch.get_default_dtype())

    make = functools.partial(_made, name, split, seed)
    return GymFamily(make, draw, _put, horizon, episodes, f"{name}-{split}", workers=workers)


@functools.cache
def _tasks(name: str, split: str, seed: int) -> list[tuple[type, list[Any]]]:
    """Each task's class, and its goals."""
    metaworld = imported("metaworld", "metaworld")
    benchmark = getattr(metaworld, name)(seed=seed) if name in SUITES else metaworld.ML1(name, seed=seed)
    classes, goals = getattr(benchmark, f"{split}_classes"), getattr(benchmark, f"{split}_tasks")
    return [(each, [goal for goal in goals if goal.env_name == task]) for task, each in classes.items()]


def _made(name: str, split: str, seed: int) -> Any:
    return _arm()(_tasks(name, split, seed))


def _put(env: Any, params: Numbers) -> None:
    env.choose(int(params[0]), int(params[1]))


@functools.cache
def _arm() -> type:
    """Made when it is first needed, as the package may be missing."""
    gymnasium = imported("gymnasium")

    class Arm(gymnasium.Env):  # type: ignore[name-defined]
        """One environment that can be any of the tasks; each one's robot is made when it is first chosen."""

        def __init__(self, tasks: list[tuple[type, list[Any]]]):
            self.tasks, self.robots = tasks, dict[int, Any]()
            self.choose(0, 0)
            self.action_space = self.robot.action_space
            seen = self.robot.reset()[0]
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, seen.shape, np.float64)

        def choose(self, task: int, goal: int) -> None:
            kind, goals = self.tasks[task]
            if task not in self.robots:
                self.robots[task] = kind(reward_function_version=REWARD)
            self.robot = self.robots[task]
            self.robot.set_task(goals[goal])

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            return self.robot.reset()  # all chance is in the goal; it does not take the seed

        def step(self, action: Any) -> Any:
            return self.robot.step(action)

    return Arm
