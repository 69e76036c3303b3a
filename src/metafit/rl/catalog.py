"""The catalogues of agents and of task families: adding one is a file with the algorithm and a line here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from metafit.errors import BadInput, unknown
from metafit.rl import metaworld, minigrid, mujoco
from metafit.rl.agent import Agent
from metafit.rl.associative import AssociativeAgent
from metafit.rl.attentive import AttentiveAgent
from metafit.rl.families import Bernoulli, Changing, Gaussian, Grid, Navigation, Tabular
from metafit.rl.family import Family
from metafit.rl.gradient import GradientAgent
from metafit.rl.hyper import HyperAgent
from metafit.rl.recurrent import RecurrentAgent
from metafit.rl.varibad import VariBADAgent


@dataclass(frozen=True)
class Usual:
    """How an agent is trained where nothing else is asked for.

    Attributes:
        steps, rate: outer steps, and their rate.
        batch: environments a step; epochs: steps on the same trials.
    """

    steps: int
    rate: float
    batch: int
    epochs: int


@dataclass(frozen=True)
class Entry:
    """A line of the catalogue of agents.

    Attributes:
        build: from the family's observations and actions, and the agent's own options.
        meta_trained: whether it is trained to adapt; else it is what agents that are get held against.
        usual: how it is trained; ``None`` where it is not.
    """

    name: str
    title: str
    paper: str
    build: Callable[..., Agent]
    usual: Usual | None
    meta_trained: bool = True

    def options(self) -> dict[str, Any]:
        """The options that ``build`` takes, with their defaults; those of the classes that it extends, too."""
        found: dict[str, Any] = {}
        made: Any = self.build.func if isinstance(self.build, partial) else self.build
        fixed = self.build.keywords if isinstance(self.build, partial) else {}
        for kind in made.__mro__ if inspect.isclass(made) else (made,):
            signature = inspect.signature(kind.__init__ if inspect.isclass(kind) else kind).parameters.values()
            found = {p.name: p.default for p in signature if p.default is not p.empty} | found
            if not any(p.kind is p.VAR_KEYWORD for p in signature):
                break
        return found | dict(fixed)


_DUAN = "Duan et al., 2016, arXiv:1611.02779"
_IN_CONTEXT, _BY_GRADIENT = Usual(1000, 2e-2, 300, 4), Usual(600, 1e-3, 20, 3)
_ONE_POLICY: dict[str, Any] = {
    "adapting": False,
    "clipped": True,
    "rule": "adam",
    "rate": 3e-3,
    "steps": 10,
    "later": 1.0,
}

AGENTS = {
    entry.name: entry
    for entry in (
        Entry("rl2", "RL² with a recurrent network", _DUAN, RecurrentAgent, _IN_CONTEXT),
        Entry("rl2-transformer", "RL² with a transformer", "Mishra et al., 2018, arXiv:1707.03141", AttentiveAgent, Usual(1000, 2e-3, 200, 4)),
        Entry("rl2-associative", "RL² with an associative memory", "after Schlag et al., 2021, arXiv:2102.11174", AssociativeAgent, _IN_CONTEXT),
        Entry("rl2-hyper", "RL² with a hypernetwork", "Beck et al., 2022, arXiv:2210.11348", HyperAgent, _IN_CONTEXT),
        Entry("varibad", "VariBAD", "Zintgraf et al., 2020, arXiv:1910.08348", VariBADAgent, _IN_CONTEXT),
        Entry("maml", "MAML by policy gradients", "Finn et al., 2017, arXiv:1703.03400", GradientAgent, _BY_GRADIENT),
        Entry("multi-task", "Multi-task PPO, fine-tuned by PPO", "Schulman et al., 2017, arXiv:1707.06347", partial(GradientAgent, **_ONE_POLICY), _BY_GRADIENT, False),
        Entry("scratch", "PPO from scratch", "Schulman et al., 2017, arXiv:1707.06347", partial(GradientAgent, **_ONE_POLICY), None, False),
    )
}  # fmt: skip

FAMILIES: Mapping[str, Callable[..., Family]] = {
    "bandit": Bernoulli,
    "gaussian-bandit": Gaussian,
    "tabular": Tabular,
    "navigation": Navigation,
    "grid": Grid,
    "half-cheetah-direction": mujoco.half_cheetah_direction,
    "half-cheetah-velocity": mujoco.half_cheetah_velocity,
    "half-cheetah-crippled": mujoco.half_cheetah_crippled,
    "ant-direction": mujoco.ant_direction,
    "minigrid-room": minigrid.room,
    "minigrid-maps": minigrid.maps,
    "metaworld-ml1": metaworld.ml1,
    "metaworld": metaworld.ml,
}

TRAINING: Mapping[tuple[str, str], Usual] = {  # what was found to learn a family faster
    ("rl2", "bandit"): Usual(2100, 3e-2, 1000, 4),
    ("rl2", "navigation"): Usual(1000, 1e-2, 300, 4),
    ("rl2-associative", "tabular"): Usual(600, 1e-2, 300, 4),
}
CHANGING = "changing-"


def entry(name: str) -> Entry:
    """
    Raises:
        BadInput: no such agent; the message names the nearest.
    """
    if name not in AGENTS:
        raise unknown("agent", name, AGENTS)
    return AGENTS[name]


def family(name: str, **options: Any) -> Family:
    """A task family of the catalogue; ``changing-NAME`` is one whose environments change within a trial.

    Raises:
        BadInput: an unknown family or option.

    >>> family("changing-grid", size=4).horizon
    15
    """
    changing, plain = name.startswith(CHANGING), name.removeprefix(CHANGING)
    if plain not in FAMILIES:
        raise unknown("environment", name, [*FAMILIES, *(CHANGING + known for known in FAMILIES)])
    made = FAMILIES[plain]
    known = dict(inspect.signature(made).parameters)
    for option in options:
        if option not in known and not (changing and option == "window"):
            raise unknown(f"option of environment {name!r}", option, known)
    for option, value in options.items():
        usual = known[option].default if option in known else 1  # window
        least = min(usual, 1) if isinstance(usual, int) else None
        if least is not None and option != "seed" and not (type(value) is int and value >= least):
            raise BadInput(f"option {option} {value!r} of environment {name!r}: needs a whole number, {least} or more")
    own = {k: v for k, v in options.items() if k in known and not (changing and k == "episodes")}
    try:
        plainly = made(**own)
        return (
            Changing(plainly, **{k: options[k] for k in ("episodes", "window") if k in options})
            if changing
            else plainly
        )
    except BadInput:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"environment {name!r}: options {options}: {error}; correct the value") from error


def build(
    name: str, env: str | Family, env_options: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Agent, Family]:
    """An agent of the catalogue, and the family that it is for.

    Args:
        name: of the agent.
        env: the name of a family, or a family.
        env_options: of the family, by its name.
        options: of the agent; see ``entry(name).options()``.

    Raises:
        BadInput: an unknown name, option, or value.
    """
    line = entry(name)
    for option in options:
        if option not in line.options():
            raise unknown(f"option of agent {name!r}", option, line.options())
    of = family(env, **dict(env_options or {})) if isinstance(env, str) else env
    try:
        agent = line.build(of.observations, of.actions, **options)
    except BadInput:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"agent {name!r}: options {options}: {error}; correct the value") from error
    where = {"env": env if isinstance(env, str) else of.name, "env_options": dict(env_options or {})}
    agent.recipe = {"name": name, **where, "options": options}
    return agent, of
