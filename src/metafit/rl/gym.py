"""Any gymnasium environment with a distribution of parameters, as a task family.

Three functions say what the family is: ``make`` gives one environment, ``draw`` the parameters of the environments with
given keys, ``apply`` puts one row of them into one environment. Poles on a cart, under a gravity that is not told:

>>> import gymnasium, torch
>>> from metafit.data.randomness import derive, keys, uniform
>>> from metafit.rl import Experience, RecurrentAgent, drawn
>>> from metafit.rl.gym import GymFamily
>>> from metafit.training import meta_train
>>> def draw(key):
...     return uniform(derive(key, 0), 5.0, 15.0)[:, None]
>>> def apply(env, params):
...     env.unwrapped.gravity = float(params[0])
>>> carts = GymFamily(lambda: gymnasium.make("CartPole-v1"), draw, apply, horizon=30, episodes=2, name="carts")
>>> carts.observations, carts.actions
(4, Actions(size=2, discrete=True))
>>> carts.draw(keys(0, torch.arange(3)))
tensor([[8.3805],
        [6.3871],
        [6.8384]])

Every agent of ``metafit.rl`` acts in it and trains on it as in the families that are simulated in batches:

>>> agent = RecurrentAgent(carts.observations, carts.actions, width=8)
>>> experience = Experience(agent, carts, batch=4, epochs=2, seed=0)
>>> trained = meta_train(agent, experience, None, steps=4, rate=1e-3, backend="vmap", show_progress=False)
>>> params, generator = drawn(carts, 1, 0, 5)  # five other carts
>>> agent.live(carts, params, 2, generator).returns.shape  # of two episodes each
torch.Size([5, 2])

An episode is a slot of ``horizon`` steps, as everywhere in ``metafit.rl``: an environment that ends before starts again
at once, in the same slot, and the agent sees it by the observation alone. Where an end should hurt, the reward has to
say so. An environment that ends later is left where it is.

The simulators are slow to make and are used again: for every batch as many as it has environments, the most that any
batch had are kept. With ``workers`` they are spread over as many processes; ``make`` and ``apply`` may be lambdas there
too, but a script must guard its own work with ``if __name__ == "__main__"``, as these processes import it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from metafit.errors import BadInput
from metafit.rl.actions import Actions
from metafit.rl.family import Family

Numbers = NDArray[np.float64]


def imported(package: str, extra: str = "rl") -> ModuleType:
    """The package.

    Raises:
        BadInput: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise BadInput(f"{package}: cannot be imported ({error}); pip install 'metafit[{extra}]'") from error


class Running(NamedTuple):
    """The state of a family of simulators: they hold their own, and only the latest reset can be stepped on.

    Attributes:
        reset: which one it was, from 1.
        params: that the simulators have.
    """

    reset: int
    params: Tensor


class GymFamily(Family):
    """Simulators with a ``gymnasium.Env``'s interface, one for each environment of a batch.

    Observations are flattened as ``gymnasium.spaces.flatten`` does: a choice is one-hot, the parts of a dictionary one
    after another. Actions are a choice (``Discrete``) or a vector (``Box``, flattened). An agent's vector is clipped to
    [-1, 1] and then stretched to the bounds of the box, element by element; an element without two finite bounds is
    only clipped to the one it has.

    All chance in an environment is seeded at each reset from the generator that is given there.

    Args:
        make: gives a new environment; all of them have the same spaces.
        draw: the parameters ``(N, P)`` of the environments with keys ``(N,)``, each row a function of its key alone
            (``metafit.data.randomness``).
        apply: puts one row ``(P,)``, a numpy array, into an environment, before each of its resets, and within an
            episode where a family changes (``Family.at``); an environment is given many different rows in its life.
        horizon: steps of an episode.
        episodes: of a trial.
        name: in the catalogue.
        reward: of a step, from the row of parameters, the action as the environment got it, the environment's own
            reward and its ``info``; else the environment's own.
        workers: processes that simulate; 0 simulates in this one.

    Raises:
        BadInput: gymnasium is missing, or a space is neither of the above.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        draw: Callable[[Tensor], Tensor],
        apply: Callable[[Any, Numbers], None],
        horizon: int = 200,
        episodes: int = 2,
        name: str = "gym",
        reward: Callable[[Numbers, Any, float, dict[str, Any]], float] | None = None,
        workers: int = 0,
    ):
        imported("gymnasium")
        if min(horizon, episodes) < 1 or workers < 0:
            raise BadInput(f"horizon {horizon}, episodes {episodes}, workers {workers}: need 1, 1 and 0 at least")
        self.name, self.horizon, self.episodes, self._draw = name, horizon, episodes, draw
        here = Simulators(make, apply, reward, horizon)
        self.observations = here.observations
        self.actions, self._told = told(here.environments[0].action_space)
        self._simulators = _Workers(workers, (make, apply, reward, horizon)) if workers else here
        self._resets = 0

    def draw(self, key: Int64[Tensor, " n"]) -> Float[Tensor, "n p"]:
        params = self._draw(key)
        if not isinstance(params, Tensor) or params.dim() != 2 or len(params) != len(key):
            got = tuple(params.shape) if isinstance(params, Tensor) else type(params).__name__
            raise BadInput(f"draw of {self.name}: gave {got} for {len(key)} keys; give a tensor ({len(key)}, P)")
        return params

    def reset(self, params: Tensor, generator: torch.Generator) -> tuple[Running, Float[Tensor, "n observations"]]:
        seeds = torch.randint(1 << 31, (len(params),), generator=generator)
        seen = self._simulators.reset(params.numpy(), seeds.tolist())
        self._resets += 1
        return Running(self._resets, params), _floating(seen)

    def step(
        self, params: Tensor, state: Running, action: Shaped[Tensor, "n ..."], generator: torch.Generator
    ) -> tuple[Running, Float[Tensor, "n observations"], Float[Tensor, " n"]]:
        """
        Raises:
            BadInput: the family was reset after this state.
        """
        if state.reset != self._resets:
            raise BadInput(
                f"{self.name}: another trial took these simulators in reset {self._resets}, and this state is of reset "
                f"{state.reset}; finish a trial before the next begins, or make a family for each"
            )
        if params is not state.params and not torch.equal(params, state.params):
            self._simulators.change(params.numpy())
        seen, reward = self._simulators.step(self._told(action))
        return Running(state.reset, params), _floating(seen), _floating(reward)


class Simulators:
    """As many environments as were ever needed at once, in this process; all lists and arrays lead with them.

    Args:
        make, apply, reward, horizon: see ``GymFamily``.
    """

    def __init__(
        self, make: Callable[[], Any], apply: Callable[..., None], reward: Callable[..., float] | None, horizon: int
    ):
        self.make, self.apply, self.reward, self.horizon = make, apply, reward, horizon
        self.environments = [make()]
        self.observations, self._flat = flattened(self.environments[0].observation_space)

    def reset(self, params: Numbers, seeds: list[int]) -> Numbers:
        """What is seen at the start of an episode, ``(N, observations)``."""
        while len(self.environments) < len(params):
            self.environments.append(self.make())
        self.change(params)
        self.left = self.horizon
        seen = np.empty((len(params), self.observations))
        for i, (seed, env) in enumerate(zip(seeds, self.environments, strict=False)):
            seen[i] = self._flat(env.reset(seed=seed)[0])
        return seen

    def change(self, params: Numbers) -> None:
        """Other parameters, from the next step on."""
        self.params = params
        for row, env in zip(params, self.environments, strict=False):
            self.apply(env, row)

    def step(self, actions: list[Any] | NDArray[Any]) -> tuple[Numbers, Numbers]:
        """What is seen next, and rewards ``(N,)``."""
        seen, rewards = np.empty((len(actions), self.observations)), np.empty(len(actions))
        self.left -= 1
        for i, (action, env) in enumerate(zip(actions, self.environments, strict=False)):
            observation, reward, ended, cut, info = env.step(action)
            rewards[i] = reward if self.reward is None else self.reward(self.params[i], action, reward, info)
            again = (ended or cut) and self.left > 0  # after the last step of an episode all are reset in any case
            seen[i] = self._flat(env.reset()[0] if again else observation)
        return seen, rewards


class _Workers:
    """The same over processes, each with a share of the environments."""

    def __init__(self, count: int, parts: tuple[Any, ...]):
        context = multiprocessing.get_context("spawn")  # a fork of a process in which torch has threads can hang
        packed = imported("cloudpickle").dumps(parts)
        self.pipes = []
        for _ in range(count):
            here, there = context.Pipe()
            context.Process(target=_serve, args=(there, packed), daemon=True).start()
            there.close()  # so that a process that dies is noticed, and one whose family is gone ends
            self.pipes.append(here)

    def reset(self, params: Numbers, seeds: list[int]) -> Numbers:
        return np.concatenate(self._all("reset", params, seeds))

    def change(self, params: Numbers) -> None:
        self._all("change", params)

    def step(self, actions: list[Any] | NDArray[Any]) -> tuple[Numbers, Numbers]:
        seen, rewards = zip(*self._all("step", actions), strict=True)
        return np.concatenate(seen), np.concatenate(rewards)

    def _all(self, method: str, *given: Any) -> list[Any]:
        """What each process answers to its share of every list."""
        size = -(-len(given[0]) // len(self.pipes))
        starts = range(0, len(given[0]), size)
        busy = self.pipes[: len(starts)]
        for pipe, start in zip(busy, starts, strict=True):
            pipe.send((method, [part[start : start + size] for part in given]))
        answers = [pipe.recv() for pipe in busy]  # of all, before one raises: none is left for the next call
        for well, answer in answers:
            if not well:
                raise RuntimeError(f"a simulator failed in its process:\n{answer}")
        return [answer for _, answer in answers]


def _serve(pipe: Any, packed: bytes) -> None:
    """The life of a process of simulators: answers until the other end of the pipe is gone."""
    simulators = None
    while True:
        try:
            method, given = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            simulators = simulators or Simulators(*imported("cloudpickle").loads(packed))
            pipe.send((True, getattr(simulators, method)(*given)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def flattened(space: Any) -> tuple[int, Callable[[Any], Numbers]]:
    """How many numbers an observation is, and the function that makes them of it."""
    spaces = imported("gymnasium").spaces
    if isinstance(space, spaces.Box):
        return int(np.prod(space.shape)), np.ravel
    try:
        return spaces.flatdim(space), lambda seen: spaces.flatten(space, seen)
    except (NotImplementedError, ValueError) as error:
        raise BadInput(
            f"observation space {space}: is not a fixed number of numbers; wrap the environment in "
            "gymnasium.wrappers.TransformObservation, with a Box"
        ) from error


def told(space: Any) -> tuple[Actions, Callable[[Tensor], Any]]:
    """The actions of an agent, and the function that makes a batch of the space's own of them."""
    spaces = imported("gymnasium").spaces
    if isinstance(space, spaces.Discrete):
        return Actions(int(space.n)), lambda action: (action + int(space.start)).tolist()
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise BadInput(
            f"action space {space}: is neither Discrete nor a Box of real numbers; wrap the environment in "
            "gymnasium.wrappers.TransformAction, with one of them"
        )
    low, high = (torch.as_tensor(bound).double().flatten() for bound in (space.low, space.high))
    bounded = low.isfinite() & high.isfinite()
    middle, half = torch.where(bounded, (low + high) / 2, 0.0), torch.where(bounded, (high - low) / 2, 1.0)

    def stretched(action: Tensor) -> NDArray[Any]:
        inside = torch.where(bounded, action.clamp(-1, 1), action)
        within = torch.minimum(torch.maximum(middle + half * inside, low), high)
        return within.numpy().astype(space.dtype).reshape(-1, *space.shape)

    return Actions(len(low), discrete=False), stretched


def _floating(numbers: Numbers) -> Tensor:
    return torch.from_numpy(numbers).to(torch.get_default_dtype())
