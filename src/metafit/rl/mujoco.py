"""Locomotion in MuJoCo: running bodies that are to go one way, or at one speed, or with a joint that has no torque.

Episodes are of 200 steps, as Finn et al. have them. The bodies are gymnasium's ``HalfCheetah-v5`` and ``Ant-v5``, whose
numbers these are; all need ``pip install 'metafit[rl]'``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from metafit.data.randomness import below, derive, uniform
from metafit.errors import BadInput
from metafit.rl.gym import GymFamily, Numbers, imported

CONTROL = 0.05  # the weight of ‖a‖² in the rewards of Finn et al.; gymnasium's own is 0.1
JOINTS = 6  # with an actuator, of HalfCheetah: thigh, shin and foot of the hind leg, then of the front leg


def half_cheetah_direction(horizon: int = 200, episodes: int = 2, workers: int = 0) -> GymFamily:
    """A half-cheetah that is to run forward or backward, at random (Finn et al., 2017, arXiv:1703.03400, section 5.3).

    The parameter ``(N, 1)`` is the direction d = ±1, the reward d·v − 0.05·‖a‖² at speed v in m/s.
    """
    return _family("half-cheetah-direction", half_cheetah, _directions, _along, horizon, episodes, workers)


def half_cheetah_velocity(horizon: int = 200, episodes: int = 2, fastest: float = 3.0, workers: int = 0) -> GymFamily:
    """A half-cheetah that is to run at a speed it is not told (Finn et al., 2017, arXiv:1703.03400, section 5.3).

    The parameter ``(N, 1)`` is the speed g, the reward −|v − g| − 0.05·‖a‖² at speed v, both in m/s.

    Args:
        fastest: g is uniform from 0 to it. 3 m/s is what Rakelly et al. (2019, arXiv:1903.08254) and others after them
            take; Finn et al. took 2.
    """

    def draw(key: Tensor) -> Tensor:
        return uniform(derive(key, 0), 0.0, fastest)[:, None]

    return _family("half-cheetah-velocity", half_cheetah, draw, _at_speed, horizon, episodes, workers)


def half_cheetah_crippled(
    horizon: int = 200, episodes: int = 2, joints: Iterable[int] = range(JOINTS), workers: int = 0
) -> GymFamily:
    """A half-cheetah one of whose actuators has no torque, and that is to run forward (Nagabandi et al., 2019,
    arXiv:1803.11347, section 6).

    The parameters ``(N, 6)`` are the share of its torque that each actuator gives: 0 for one, 1 for the others. The
    reward is v − 0.05·‖a‖² at speed v in m/s; a command to a joint without torque costs what any does.

    Args:
        joints: that may be crippled, 0 to 5, so that those of training and test can be different ones.
    """
    among = torch.tensor(sorted(set(joints)), dtype=torch.int64)
    if not len(among) or among[0] < 0 or among[-1] >= JOINTS:
        raise BadInput(f"joints {among.tolist()}: name at least one, each from 0 to {JOINTS - 1}")

    def draw(key: Tensor) -> Tensor:
        crippled = among[below(derive(key, 0), len(among))]
        return 1 - torch.nn.functional.one_hot(crippled, JOINTS).to(torch.get_default_dtype())

    return GymFamily(half_cheetah, draw, cripple, horizon, episodes, "half-cheetah-crippled", _forward, workers)


def ant_direction(horizon: int = 200, episodes: int = 2, workers: int = 0) -> GymFamily:
    """An ant that is to run forward or backward, at random (Finn et al., 2017, arXiv:1703.03400, section 5.3).

    The parameter ``(N, 1)`` is the direction d = ±1. The reward is d·v, at speed v in m/s, and what ``Ant-v5`` adds to
    its own speed: for staying upright, less the costs of control and contact. An ant that falls starts again at once.
    """
    return _family("ant-direction", ant, _directions, _ant_along, horizon, episodes, workers)


def half_cheetah() -> Any:
    return _made("HalfCheetah-v5")


def ant() -> Any:
    return _made("Ant-v5")


def cripple(env: Any, share: Numbers) -> None:
    """Scales the torque of each actuator of a robot with motors: the gain of a motor is 1."""
    env.model.actuator_gainprm[:, 0] = share


def _family(name: str, make: Any, draw: Any, reward: Any, horizon: int, episodes: int, workers: int) -> GymFamily:
    return GymFamily(make, draw, _nothing, horizon, episodes, name, reward, workers)


def _made(name: str) -> Any:
    """The environment itself, without gymnasium's wrappers that check each call and count steps."""
    gymnasium, mujoco = imported("gymnasium"), imported("mujoco")
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: None)  # of every robot anew: its file has an attribute that is deprecated
    try:
        return gymnasium.make(name).unwrapped
    finally:
        mujoco.set_mju_user_warning(before)


def _nothing(env: Any, params: Numbers) -> None:
    """The parameter is in the reward alone."""


def _directions(key: Tensor) -> Tensor:
    return (2.0 * below(derive(key, 0), 2) - 1).to(torch.get_default_dtype())[:, None]


def _along(params: Numbers, action: Numbers, reward: float, info: dict[str, Any]) -> float:
    return params[0] * info["x_velocity"] - CONTROL * (action @ action)


def _forward(params: Numbers, action: Numbers, reward: float, info: dict[str, Any]) -> float:
    return info["x_velocity"] - CONTROL * (action @ action)


def _at_speed(params: Numbers, action: Numbers, reward: float, info: dict[str, Any]) -> float:
    return -abs(info["x_velocity"] - params[0]) - CONTROL * (action @ action)


def _ant_along(params: Numbers, action: Numbers, reward: float, info: dict[str, Any]) -> float:
    return params[0] * info["x_velocity"] + info["reward_survive"] + info["reward_ctrl"] + info["reward_contact"]
