"""Simulators as families: gymnasium's environments, MuJoCo's robots, MiniGrid's rooms, Meta-World's arm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metafit.data.randomness import derive, keys, uniform
from metafit.errors import BadInput
from metafit.rl import Actions, Experience, Family, GradientAgent, RecurrentAgent, act, drawn
from metafit.rl.families import Changing
from metafit.rl.gym import GymFamily, told
from metafit.training import meta_train

gymnasium = pytest.importorskip("gymnasium")


def lengths(key: Tensor) -> Tensor:
    """Half the length of the pole, and gravity."""
    return torch.stack([uniform(derive(key, 0), 0.3, 0.7), uniform(derive(key, 1), 5.0, 15.0)], -1)


def put(env: Any, params: Any) -> None:
    cart = env.unwrapped
    cart.length, cart.gravity = float(params[0]), float(params[1])
    cart.polemass_length = cart.masspole * cart.length


def carts(**options: Any) -> GymFamily:
    return GymFamily(lambda: gymnasium.make("CartPole-v1"), lengths, put, **{"horizon": 20, "name": "carts", **options})


def robots() -> dict[str, Callable[[], GymFamily]]:
    from metafit.rl import mujoco

    return {
        "direction": lambda: mujoco.half_cheetah_direction(5),
        "velocity": lambda: mujoco.half_cheetah_velocity(5),
        "crippled": lambda: mujoco.half_cheetah_crippled(5, joints=(1, 4)),
        "ant": lambda: mujoco.ant_direction(5),
    }


def rooms() -> dict[str, Callable[[], GymFamily]]:
    from metafit.rl import minigrid

    return {"room": minigrid.room, "maps": lambda: minigrid.maps("MiniGrid-SimpleCrossingS9N1-v0", 20)}


def made(name: str) -> GymFamily:
    if name in ("room", "maps"):
        pytest.importorskip("minigrid")
        return rooms()[name]()
    if name != "carts":
        pytest.importorskip("mujoco")
        return robots()[name]()
    return carts()


def followed(family: Family, params: Tensor, seed: int = 0, steps: int | None = None) -> tuple[Tensor, Tensor]:
    """What is seen, and the rewards, of one episode whose actions row i draws by itself."""
    generator = torch.Generator().manual_seed(seed)
    state, seen = family.reset(params, generator)
    seens, rewards = [seen], []
    for step in range(steps or family.horizon):
        place = derive(keys(seed, torch.arange(len(params)))[:, None], torch.arange(family.actions.size)) + step
        noise = uniform(derive(place, 1), -1.5, 1.5)
        action = noise.argmax(-1) if family.actions.discrete else noise
        state, seen, reward = family.step(params, state, action, generator)
        seens.append(seen)
        rewards.append(reward)
    return torch.stack(seens, 1), torch.stack(rewards, 1)


@pytest.mark.parametrize("name", ["carts", "direction", "velocity", "crippled", "ant", "room", "maps"])
def test_an_environment_is_a_function_of_its_key_whoever_asks_and_with_how_many_others(name: str) -> None:
    family, other = made(name), made(name)
    key = keys(3, torch.arange(5))
    params = family.draw(key)
    torch.testing.assert_close(other.draw(key[[4, 2]]), params[[4, 2]], rtol=0, atol=0)
    assert len(params.unique(dim=0)) > 1
    seen, reward = followed(family, params, steps=5)
    assert seen.shape == (5, 6, family.observations) and seen.dtype == reward.dtype == torch.get_default_dtype()
    again = followed(family, params, steps=5)  # the same simulators, used again
    few = followed(other, params[:2], steps=5)  # others, and fewer
    assert torch.equal(again[0], seen) and torch.equal(again[1], reward)
    assert torch.equal(few[0], seen[:2]) and torch.equal(few[1], reward[:2])


def by_hand(env: Any, seed: int, actions: np.ndarray) -> tuple[np.ndarray, list[float], list[dict[str, Any]]]:
    """What gymnasium itself gives: observations, rewards, infos."""
    seen = [env.reset(seed=seed)[0]]
    rewards, infos = [], []
    for action in actions:
        observation, reward, _, _, info = env.step(action)
        seen.append(observation)
        rewards.append(float(reward))
        infos.append(info)
    return np.array(seen), rewards, infos


@pytest.mark.parametrize("name", ["direction", "velocity", "crippled", "ant"])
def test_a_robot_s_numbers_are_those_of_gymnasium_stepped_by_hand(
    name: str, double: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)  # where MuJoCo leaves what it warns of
    family = robots()[name]()
    params = family.draw(keys(0, torch.arange(4)))
    actions = 3 * torch.rand(4, 5, family.actions.size, generator=torch.Generator().manual_seed(5)) - 1.5
    generator = torch.Generator().manual_seed(9)
    seeds = torch.randint(1 << 31, (4,), generator=torch.Generator().manual_seed(9)).tolist()
    state, first = family.reset(params, generator)
    seen, rewards = [first], []
    for step in range(5):
        state, observation, reward = family.step(params, state, actions[:, step], generator)
        seen.append(observation)
        rewards.append(reward)
    env = gymnasium.make("Ant-v5" if name == "ant" else "HalfCheetah-v5")
    clipped = actions.clamp(-1, 1).numpy().astype(np.float32)
    for i in range(4):
        if name == "crippled":
            env.unwrapped.model.actuator_gear[:, 0] = np.array([120, 90, 60, 120, 60, 30]) * params[i].numpy()
        observed, own, infos = by_hand(env, seeds[i], clipped[i])
        speed = np.array([info["x_velocity"] for info in infos])
        cost = np.square(clipped[i].astype(np.float64)).sum(-1)
        p = float(params[i, 0])
        expected = {
            "direction": p * speed - 0.05 * cost,
            "velocity": -abs(speed - p) - 0.05 * cost,
            "crippled": speed - 0.05 * cost,
            "ant": np.array(own) + (p - 1) * speed,
        }[name]
        np.testing.assert_allclose(torch.stack(seen, 1)[i], observed, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(torch.stack(rewards, 1)[i], expected, rtol=1e-6, atol=1e-6)


def test_a_crippled_joint_has_no_torque_and_is_one_of_those_named() -> None:
    pytest.importorskip("mujoco")
    family = robots()["crippled"]()
    params = family.draw(keys(0, torch.arange(40)))
    assert (params == 0).sum(-1).tolist() == [1] * 40 and set(params.argmin(-1).tolist()) == {1, 4}
    state, _ = family.reset(params[:3], torch.Generator())
    family.step(params[:3], state, torch.ones(3, 6), torch.Generator())
    for row, env in zip(params, family._simulators.environments, strict=False):  # type: ignore[union-attr]
        np.testing.assert_array_equal(env.data.actuator_force != 0, row.numpy() != 0)


def test_an_environment_that_ends_early_starts_again_in_the_same_slot() -> None:
    family = carts(horizon=60)
    params = family.draw(keys(0, torch.arange(2)))
    generator, twin = (torch.Generator().manual_seed(1) for _ in range(2))
    env = gymnasium.make("CartPole-v1")
    put(env, params[1])
    expected = [env.reset(seed=int(torch.randint(1 << 31, (2,), generator=twin)[1]))[0]]
    state, seen = family.reset(params, generator)
    seens, ends = [seen[1]], 0
    for _ in range(60):
        state, seen, reward = family.step(params, state, torch.tensor([1, 1]), generator)
        observation, own, ended, cut, _ = env.step(1)
        ends += ended
        expected.append(env.reset()[0] if ended or cut else observation)
        seens.append(seen[1])
        assert reward[1] == own
    assert ends > 3
    torch.testing.assert_close(torch.stack(seens), torch.from_numpy(np.array(expected)))


def test_an_environment_that_ends_with_its_slot_is_not_started_twice() -> None:
    class Short(gymnasium.Env):  # type: ignore[misc, name-defined]
        observation_space, action_space = gymnasium.spaces.Box(0, 9, (1,)), gymnasium.spaces.Discrete(2)
        starts = 0

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.starts += 1
            return np.array([self.starts], np.float32), {}

        def step(self, action: Any) -> Any:
            return np.zeros(1, np.float32), 1.0, False, True, {}

    family = GymFamily(Short, lambda key: torch.zeros(len(key), 1), lambda env, params: None, 2, 3)
    agent = RecurrentAgent(1, family.actions, width=4)
    trial, _ = act(agent, family, family.draw(torch.arange(1)), agent.begin(1), 3, torch.Generator())
    assert trial.x[0, :, 0].tolist() == [1, 2, 3, 4, 5, 6]


def test_agents_train_on_an_environment_that_this_was_not_written_for() -> None:
    family = carts()
    torch.manual_seed(0)
    agent = RecurrentAgent(family.observations, family.actions, width=8)
    before = [p.detach().clone() for p in agent.parameters()]
    experience = Experience(agent, family, 4, 2, seed=0)
    trained = meta_train(agent, experience, None, steps=4, rate=1e-2, backend="vmap", show_progress=False)
    assert np.isfinite(trained.history[-1]["loss"])
    assert all(not torch.equal(a, b) for a, b in zip(before, agent.parameters(), strict=True))
    params, generator = drawn(family, 1, 0, 3)
    assert agent.live(family, params, 2, generator).returns.tolist() == [[20.0, 20.0]] * 3  # 1 a step, come what may
    gradient = GradientAgent(family.observations, family.actions, width=8, rounds=2)
    experience = Experience(gradient, family, 2, 1, seed=0)
    meta_train(gradient, experience, None, steps=1, rate=1e-2, backend="vmap", show_progress=False)


def test_processes_simulate_the_same() -> None:
    here, spread = carts(), carts(workers=2)
    params = here.draw(keys(0, torch.arange(5)))
    for count in (5, 1):
        mine, theirs = followed(here, params[:count]), followed(spread, params[:count])
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
    with pytest.raises(RuntimeError, match="IndexError"):
        spread.reset(params[:, :1], torch.Generator())
    assert torch.equal(followed(spread, params)[0], followed(here, params)[0]), "answers of a failed call are left over"


def test_a_changing_family_changes_its_simulators() -> None:
    family = Changing(carts(horizon=4), episodes=4)
    params = family.draw(keys(0, torch.arange(3)))
    agent = RecurrentAgent(family.observations, family.actions, width=4)
    simulated = family.family._simulators.environments  # type: ignore[attr-defined]
    for episodes, part in ((1, "before"), (4, "after")):
        act(agent, family, params, agent.begin(3), episodes, torch.Generator())
        assert [env.unwrapped.length for env in simulated] == pytest.approx(params[part][:, 0].tolist())


def test_parameters_that_change_within_an_episode_are_put_in() -> None:
    family = carts()
    params = family.draw(keys(0, torch.arange(2)))
    state, _ = family.reset(params, torch.Generator())
    family.step(params.flip(0), state, torch.tensor([0, 1]), torch.Generator())
    envs = family._simulators.environments  # type: ignore[union-attr]
    assert [env.unwrapped.length for env in envs] == pytest.approx(params[:, 0].flip(0).tolist())


def test_vectors_are_clipped_and_stretched_to_their_bounds() -> None:
    bounds = np.array([[-2.0, 0.0, -1.0], [-np.inf, 1.0, -np.inf]]), np.array([[2.0, 10.0, 1.0], [np.inf, np.inf, 3.0]])
    actions, stretched = told(gymnasium.spaces.Box(*bounds, dtype=np.float64))
    assert actions == Actions(6, discrete=False)
    given = torch.tensor([[0.5, 0.5, -4.0, 7.0, -7.0, -7.0], [-3.0, -3.0, 0.25, -7.0, 7.0, 7.0]], dtype=torch.float64)
    expected = [[[1.0, 7.5, -1.0], [7.0, 1.0, -7.0]], [[-2.0, 0.0, 0.25], [-7.0, 7.0, 3.0]]]
    np.testing.assert_allclose(stretched(given), expected)
    actions, numbered = told(gymnasium.spaces.Discrete(3, start=-1))
    assert actions == Actions(3) and numbered(torch.tensor([0, 2])) == [-1, 1]


def test_a_dictionary_of_observations_is_flattened() -> None:
    class Dictionary(gymnasium.Env):  # type: ignore[misc, name-defined]
        observation_space = gymnasium.spaces.Dict(
            {"a": gymnasium.spaces.Discrete(3), "b": gymnasium.spaces.Box(0, 1, (2, 2))}
        )
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return {"a": 1, "b": np.array([[0.0, 0.25], [0.5, 1.0]], np.float32)}, {}

    family = GymFamily(Dictionary, lambda key: torch.zeros(len(key), 0), lambda env, params: None)
    _, seen = family.reset(family.draw(torch.arange(2)), torch.Generator())
    assert seen.tolist() == [[0, 1, 0, 0, 0.25, 0.5, 1]] * 2


def test_a_room_s_goal_is_where_its_parameters_say_and_a_map_stays() -> None:
    pytest.importorskip("minigrid")
    room, maps = (make() for make in rooms().values())
    params = room.draw(keys(0, torch.arange(200)))
    assert len(params.unique(dim=0)) == 15 and not (params == 1).all(-1).any()
    room.reset(params[:3], torch.Generator())
    for (column, row), env in zip(params.tolist(), room._simulators.environments, strict=False):  # type: ignore[union-attr]
        assert env.unwrapped.grid.get(int(column), int(row)).type == "goal"
    params, layouts = maps.draw(keys(0, torch.arange(3))), []
    for seed in (0, 1):  # of two episodes
        maps.reset(params, torch.Generator().manual_seed(seed))
        layouts.append([env.unwrapped.pprint_grid() for env in maps._simulators.environments])  # type: ignore[union-attr]
    assert layouts[0] == layouts[1] and len(set(layouts[0])) == 3


def test_reaching_the_goal_of_a_room_is_rewarded_and_goes_on() -> None:
    pytest.importorskip("minigrid")
    room = rooms()["room"]()
    params = torch.tensor([[3.0, 1.0]])
    state, start = room.reset(params, torch.Generator())
    rewards = []
    for _ in range(4):
        state, seen, reward = room.step(params, state, torch.tensor([2]), torch.Generator())
        rewards.append(reward.item())
    assert rewards == pytest.approx([0.0, 1 - 0.9 * 2 / 50, 0.0, 1 - 0.9 * 2 / 50])
    assert torch.equal(seen, start) and start.min() >= 0 and start.max() <= 1


def test_meta_world_has_its_goals_by_key_and_its_pinned_reward() -> None:
    metaworld = pytest.importorskip("metaworld")
    from metafit.rl import metaworld as arms

    family = arms.ml1("reach-v3", horizon=5)
    params = family.draw(keys(0, torch.arange(3)))
    seen, rewards = followed(family, params)
    goals = metaworld.ML1("reach-v3", seed=0).train_tasks
    for i in range(3):
        env = metaworld.ML1("reach-v3", seed=0).train_classes["reach-v3"](reward_function_version="v2")
        env.set_task(goals[int(params[i, 1])])
        expected = [env.reset()[0]]
        for step in range(5):
            place = derive(keys(0, torch.arange(3))[:, None], torch.arange(4)) + step
            observation, reward, *_ = env.step(uniform(derive(place, 1), -1.5, 1.5)[i].clamp(-1, 1).numpy())
            expected.append(observation)
            assert rewards[i, step].item() == pytest.approx(reward, rel=1e-5)
        np.testing.assert_allclose(seen[i], np.array(expected), rtol=1e-5, atol=1e-6)
    test = arms.ml1("reach-v3", "test", horizon=5)
    assert not torch.equal(followed(test, params)[1], rewards), "the goals of the test are those of training"
    with pytest.raises(BadInput, match="did you mean 'reach-v3'"):
        arms.ml1("reach-v2")
    with pytest.raises(BadInput, match="horizon 501"):
        arms.ml1(horizon=501)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(BadInput, match="horizon 0"):
        carts(horizon=0)
    wrong = GymFamily(lambda: gymnasium.make("CartPole-v1"), lambda key: torch.zeros(len(key)), put)
    with pytest.raises(BadInput, match=r"gave \(3,\) for 3 keys; give a tensor \(3, P\)"):
        wrong.draw(torch.arange(3))
    for space in (gymnasium.spaces.MultiDiscrete([2, 3]), gymnasium.spaces.Box(0, 9, (2,), np.int64)):
        with pytest.raises(BadInput, match="neither Discrete nor a Box of real numbers"):
            told(space)
    family = carts()
    params = family.draw(keys(0, torch.arange(2)))
    state, _ = family.reset(params, torch.Generator())
    family.reset(params, torch.Generator())
    with pytest.raises(BadInput, match="another trial took these simulators"):
        family.step(params, state, torch.tensor([0, 0]), torch.Generator())


def test_text_in_an_observation_is_said() -> None:
    env = gymnasium.make("CartPole-v1").unwrapped
    env.observation_space = gymnasium.spaces.Sequence(gymnasium.spaces.Discrete(2))
    with pytest.raises(BadInput, match="not a fixed number of numbers"):
        GymFamily(lambda: env, lengths, put)


@pytest.mark.parametrize(("package", "extra"), [("gymnasium", "rl"), ("minigrid", "rl"), ("mujoco", "rl")])
def test_a_missing_package_is_said_with_the_command_that_brings_it(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metafit.rl import minigrid, mujoco

    monkeypatch.setitem(sys.modules, package, None)
    make = {"gymnasium": carts, "minigrid": minigrid.maps, "mujoco": mujoco.ant_direction}[package]
    with pytest.raises(BadInput, match=rf"{package}: .*pip install 'metafit\[{extra}\]'"):
        make()
