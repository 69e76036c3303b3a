"""Agents on environments that none of them was trained in: returns by episode, with and without meta-training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metafit._version import __version__
from metafit.disk import writable_folder
from metafit.environment import environment
from metafit.errors import BadInput
from metafit.evaluation import write_result
from metafit.evaluation.statistics import interval
from metafit.progress import progress
from metafit.rl.agent import Agent, Outcome
from metafit.rl.catalog import build, entry, family
from metafit.rl.experience import drawn
from metafit.rl.family import Family
from metafit.rl.report import write_report
from metafit.rl.store import load_agent
from metafit.rl.train import TEST
from metafit.task import take

BATCH = 100  # environments at a time
PICTURED = 4


@dataclass
class Contender:
    """An agent and what it did in the test environments."""

    name: str
    agent: Agent
    outcome: Outcome
    history: Sequence[Mapping[str, Any]] = field(default_factory=list)

    def about(self) -> dict[str, Any]:
        line = entry(self.agent.recipe["name"])
        return {
            "title": line.title if self.history or line.usual is None else f"{line.title}, untrained",
            "family": "model" if self.agent.in_context else "gradient",
            "paper": line.paper,
            "options": self.agent.recipe["options"],
            "parameters": sum(p.numel() for p in self.agent.parameters() if p.requires_grad),
            "meta_trained": bool(self.history) and line.meta_trained,
            "transductive": "",
        }

    def measured(self) -> dict[str, Any]:
        returns = self.outcome.returns
        metrics = {"return": interval(returns[:, -1]), "first": interval(returns[:, 0])}
        if self.agent.in_context:  # others learn from more episodes between two moments than they are measured on
            metrics["total"] = interval(returns.sum(-1))
        steps = self.outcome.episodes.tolist()
        curve = [{"step": step, "return": interval(returns[:, i])} for i, step in enumerate(steps)]
        return {"metrics": metrics, "curve": curve, "history": list(self.history)}


def evaluate(
    agent: Agent, of: Family, tasks: int, moments: int, seed: int, title: str = "evaluate", show: bool = True
) -> Outcome:
    """What the agent does in the environments with indices 0 to ``tasks - 1`` of the seed.

    Args:
        moments: episodes of a trial; of an agent that adapts by gradients, one more than its updates.

    Raises:
        BadInput: fewer than two environments, or no episode.
    """
    if tasks < 2 or moments < 1:
        raise BadInput(f"episodes {tasks}, moments {moments}: needs at least 2 environments and one episode in each")
    agent.eval()
    parts = []
    with progress(title, tasks, "environments", show) as advance:
        for start in range(0, tasks, BATCH):
            stop = min(start + BATCH, tasks)
            params, generator = drawn(of, seed, start, stop)
            parts.append(agent.live(of, params, moments, generator))
            advance(stop - start)
    returns, places = (torch.cat([getattr(part, name) for part in parts]) for name in ("returns", "places"))
    return Outcome(returns, parts[0].episodes, places)


def result(contenders: Sequence[Contender], of: Family, seed: int, env: str) -> dict[str, Any]:
    """The result of the first contender against the others in the same environments, as every evaluation writes it."""
    first, *others = contenders
    tasks = len(first.outcome.returns)
    return {
        "schema": 1,
        "metafit": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "learner": {"name": first.name, **first.about()},
        "backbone": None,
        "source": {"name": env, "modality": "environment", "classes": {}, "examples": {}},
        "protocol": {"episodes": tasks, "horizon": of.horizon, "seed": seed, "transductive": ""},
        **first.measured(),
        "gallery": _ways(contenders, of, seed),
        "against": [
            {
                "learner": other.name,
                **other.about(),
                **other.measured(),
                "paired_difference": {
                    "metric": "return",
                    **interval(first.outcome.returns[:, -1] - other.outcome.returns[:, -1]),
                },
            }
            for other in others
        ],
        "environment": environment(),
    }


def evaluate_one(
    env: str,
    model: str | os.PathLike[str] | None,
    learner: str | None,
    env_options: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    against: Sequence[str | os.PathLike[str]] = (),
    tasks: int = 600,
    moments: int | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Evaluates a model folder, or an untrained agent, in environments of a family, and writes result and report.

    Beside it are the same agent as it was before training, and what other folders hold.

    Args:
        env, env_options: the family.
        model, learner, options: a folder, or an untrained agent and its options.
        against: other model folders, of the same family.
        tasks, moments, seed: see ``evaluate``; where ``moments`` is ``None``, the family's episodes.
        out: folder for ``result.json`` and ``report.html``.

    Raises:
        BadInput: a folder that cannot be used, or an agent that sees or does other things than the family has.
    """
    folder = None if out is None else writable_folder(out)
    of = family(env, **dict(env_options or {}))
    moments = moments or of.episodes
    agents: dict[str, tuple[Agent, Sequence[Mapping[str, Any]]]] = {}
    if model is not None:
        for where in (model, *against):
            agent, _, history = load_agent(where)
            _check(agent, of, where)
            name = agent.recipe["name"]
            agents[name if name not in agents else f"{name} ({Path(where).name})"] = (agent, history)
        first = next(iter(agents.values()))[0]
        torch.manual_seed(seed)
        untrained = build(first.recipe["name"], of, None, **first.recipe["options"])[0]
        agents[f"{first.recipe['name']}, untrained"] = (untrained, ())
    else:
        torch.manual_seed(seed)
        agents[str(learner)] = (build(str(learner), of, None, **dict(options or {}))[0], ())
    contenders = [
        Contender(name, agent, evaluate(agent, of, tasks, moments, seed + TEST, f"evaluate {name}"), history)
        for name, (agent, history) in agents.items()
    ]
    made = result(contenders, of, seed, env)
    if folder is not None:
        write_result(made, folder)
        write_report(made, folder / "report.html")
    return made


def _check(agent: Agent, of: Family, where: str | os.PathLike[str]) -> None:
    if (agent.observations, agent.actions) != (of.observations, of.actions):
        raise BadInput(
            f"model folder {where}: its agent sees {agent.observations} numbers and has {agent.actions.size} actions, "
            f"environment {of.name!r} shows {of.observations} and has {of.actions.size}; name the one that it was "
            f"trained in, {agent.recipe['env']!r}"
        )


def _ways(contenders: Sequence[Contender], of: Family, seed: int) -> list[dict[str, Any]]:
    """Where each contender went in the first and the last episode in a few environments, where there are places."""
    params, _ = drawn(of, seed + TEST, 0, PICTURED)
    episodes = (0, contenders[0].outcome.returns.shape[1] - 1)
    goals = [of.goal(of.at(params, episode * of.horizon)) for episode in episodes]
    if goals[0] is None or goals[1] is None or not contenders[0].outcome.places.numel():
        return []
    pictures = []
    for i in range(min(PICTURED, len(contenders[0].outcome.places))):
        both = {c.name: (c.outcome.places[i, 0], c.outcome.places[i, -1]) for c in contenders}
        ways = {name: {"first": _listed(first), "last": _listed(last)} for name, (first, last) in both.items()}
        pictures.append({"goals": [_listed(take(goal, i)[None])[0] for goal in goals], "ways": ways})
    return pictures


def _listed(places: Tensor) -> list[list[float]]:
    return [[round(float(v), 4) for v in place] for place in places]
