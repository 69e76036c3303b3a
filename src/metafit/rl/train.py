"""Meta-training of agents, by the loop that all learners have."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from metafit.errors import BadInput
from metafit.rl.agent import Agent
from metafit.rl.catalog import TRAINING, Usual, build, entry
from metafit.rl.experience import Experience
from metafit.rl.family import Family
from metafit.training import Recipe, Training, meta_train

VALIDATION, TEST = 1, 2  # streams of environments, added to the seed that training draws from
LOOKS = 10


def train(
    name: str,
    env: str | Family,
    env_options: Mapping[str, Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    steps: int | None = None,
    rate: float | None = None,
    batch: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    seconds: float | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    watch: Sequence[Callable[[Mapping[str, Any]], None]] = (),
    show_progress: bool = True,
) -> tuple[Agent, Family, Training]:
    """Builds an agent of the catalogue and trains it on environments of a family.

    Args:
        name, env, env_options, options: see ``build``.
        steps, rate: outer steps, and their rate; ``None`` is what suits the agent and the family.
        batch: environments that are acted in at once; epochs: outer steps on what was seen there.
        seed: of the environments, all chance in them, and the initial weights.
        seconds: after which training stops.
        out: folder of the best agent, and of the state to resume from, written at each of 10 looks at environments that
            are in no training batch.
        resume: go on from the state in ``out``, exactly.
        watch: see ``meta_train``.

    Raises:
        BadInput: an unknown name or option, an agent that has nothing to learn, or a folder that cannot be used.
    """
    usual = usual_training(name, env)
    if usual is None:
        raise BadInput(f"agent {name!r} is not trained beforehand: evaluate it as it is")
    chosen = Usual(steps or usual.steps, rate or usual.rate, batch or usual.batch, epochs or usual.epochs)
    torch.manual_seed(seed)
    agent, family = build(name, env, env_options, **dict(options or {}))
    rounds = max(1, chosen.steps // chosen.epochs)
    seen = min(chosen.batch, 100)
    trained = meta_train(
        agent,
        Experience(agent, family, chosen.batch, chosen.epochs, seed),
        Experience(agent, family, seen, seed=seed + VALIDATION),
        steps=rounds * chosen.epochs,
        rate=chosen.rate,
        clip=1.0,
        validate_every=max(1, rounds // LOOKS) * chosen.epochs,  # states lie between batches, and so resume exactly
        validation_tasks=seen,
        seconds=seconds,
        backend="vmap",
        out=out,
        recipe=Recipe(training={"batch": chosen.batch, "epochs": chosen.epochs, "seed": seed}),
        resume=resume,
        watch=watch,
        show_progress=show_progress,
    )
    return agent.eval(), family, trained


def usual_training(name: str, env: str | Family) -> Usual | None:
    """How the agent is trained on the family where nothing else is asked for."""
    known = env if isinstance(env, str) else env.name
    return TRAINING.get((name, known), entry(name).usual)
