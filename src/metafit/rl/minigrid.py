"""MiniGrid (Chevalier-Boisvert et al., 2023, arXiv:2306.13831): rooms seen through a window of 7 × 7 cells.

An agent sees 151 numbers: of each cell of the window what it holds, its colour and its state, each scaled to [0, 1],
and one-hot which way the agent looks. Its actions are MiniGrid's seven: left, right, forward, pick up, drop, toggle,
done. The reward is 1 − 0.9·t/horizon where it reaches the goal at step t, else 0; it starts again at once, so that an
episode may reach the goal more than once. Needs ``pip install 'metafit[rl]'``.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metafit.data.randomness import below, derive
from metafit.errors import BadInput
from metafit.rl.gym import GymFamily, Numbers, imported

SCALE = np.array([10.0, 5.0, 2.0])  # the largest numbers that MiniGrid has for an object, a colour and a state
SEEDS = 1 << 24  # of maps: as many as are exact in single precision


def room(size: int = 6, horizon: int = 50, episodes: int = 3, workers: int = 0) -> GymFamily:
    """An empty room with a goal in one of its cells, the parameters ``(N, 2)``: column and row, from 1.

    The agent starts in the corner (1, 1), looking to the right; the goal is not there.

    Args:
        size: cells of a side, with the walls.
    """
    if size < 4:
        raise BadInput(f"size {size}: needs at least 4, two cells between two walls")
    inside = size - 2

    def draw(key: Tensor) -> Tensor:
        cell = 1 + below(derive(key, 0), inside * inside - 1)  # 0 is the corner that the agent starts in
        return 1 + torch.stack([cell % inside, cell // inside], -1).to(torch.get_default_dtype())

    make = functools.partial(_room, size, horizon)
    return GymFamily(make, draw, _put_goal, horizon, episodes, "minigrid-room", workers=workers)


def maps(
    environment: str = "MiniGrid-FourRooms-v0", horizon: int = 100, episodes: int = 3, workers: int = 0
) -> GymFamily:
    """Any of MiniGrid's environments, with its walls, doors, objects and the agent's start as one seed places them.

    The parameter ``(N, 1)`` is that seed, the same in all episodes of a trial: what an agent found in one it finds
    again in the next.

    Args:
        environment: its name in gymnasium.

    Raises:
        BadInput: minigrid or the environment is missing.
    """
    make = functools.partial(_mapped, environment, horizon)

    def draw(key: Tensor) -> Tensor:
        return below(derive(key, 0), SEEDS).to(torch.get_default_dtype())[:, None]

    return GymFamily(make, draw, _put_map, horizon, episodes, environment, workers=workers)


def _put_goal(env: Any, params: Numbers) -> None:
    env.unwrapped.goal = int(params[0]), int(params[1])


def _put_map(env: Any, params: Numbers) -> None:
    env.seed = int(params[0])


def _room(size: int, horizon: int) -> Any:
    return _as_numbers(_rooms()(size=size, max_steps=horizon))


def _mapped(environment: str, horizon: int) -> Any:
    imported("minigrid")
    gymnasium = imported("gymnasium")
    try:
        env = gymnasium.make(environment, max_steps=horizon, disable_env_checker=True)
    except gymnasium.error.UnregisteredEnv as error:
        raise BadInput(f"environment {environment!r}: {error}") from error
    return _one_map()(_as_numbers(env))


def _as_numbers(env: Any) -> Any:
    """The environment without its text."""
    gymnasium = imported("gymnasium")
    image = env.observation_space["image"].shape

    def numbers(seen: dict[str, Any]) -> Numbers:
        return np.concatenate([(seen["image"] / SCALE).ravel(), np.eye(4)[seen["direction"]]])

    space = gymnasium.spaces.Box(0.0, 1.0, (int(np.prod(image)) + 4,), np.float64)
    return gymnasium.wrappers.TransformObservation(env, numbers, space)


# Classes of packages that may be missing are made when they are first needed.


@functools.cache
def _rooms() -> type:
    empty = imported("minigrid.envs").EmptyEnv
    objects, grids = imported("minigrid.core.world_object"), imported("minigrid.core.grid")

    class Room(empty):  # type: ignore[misc, valid-type]
        goal = (2, 2)

        def _gen_grid(self, width: int, height: int) -> None:
            self.grid = grids.Grid(width, height)
            self.grid.wall_rect(0, 0, width, height)
            self.put_obj(objects.Goal(), *self.goal)
            self.agent_pos, self.agent_dir = (1, 1), 0

    return Room


@functools.cache
def _one_map() -> type:
    class OneMap(imported("gymnasium").Wrapper):  # type: ignore[misc]
        seed = 0

        def reset(self, **given: Any) -> Any:
            return self.env.reset(**{**given, "seed": self.seed})

    return OneMap
