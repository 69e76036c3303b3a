"""The state that an interrupted training goes on from, exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metafit.errors import BadInput
from metafit.over_tasks import Plan
from metafit.training.store import Recipe
from metafit.weights import load_folder, save_folder, under

INDEX = "state.json"


def save_state(
    folder: Path,
    step: int,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
    training: Any,
    recipe: Recipe | None,
    kept: Mapping[str, Tensor],
) -> None:
    """Writes parameters, optimizer state, best parameters, the random state and ``kept``, whole or not at all."""
    tensors = {f"learner/{name}": value for name, value in learner.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in best.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors["random"] = torch.get_rng_state()
    tensors |= {f"kept/{name}": value for name, value in kept.items()}
    about = {
        "step": step,
        "history": training.history,
        "best": training.best,
        "best_step": training.best_step,
        "plan": training.plan and vars(training.plan),
        "learner": getattr(learner, "recipe", None),
        "work": _work(recipe),
    }
    save_folder(folder, "training state", about, tensors, INDEX)


def load_state(
    folder: Path,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
    training: Any,
    recipe: Recipe | None,
    kept: Mapping[str, Tensor],
) -> tuple[int, list[dict[str, Any]]]:
    """Restores what ``save_state`` saved, in place; step 0 where the folder holds no state.

    Returns:
        The step to go on from, and the history so far.
    """
    if not (folder / INDEX).exists():
        return 0, []
    about, tensors = load_folder(folder, "training state", INDEX)
    if about["learner"] != _as_json(getattr(learner, "recipe", None)):
        raise BadInput(
            f"cannot resume from {folder}: it trains {about['learner']}; "
            "use the same learner and options, or a new folder"
        )
    if recipe is not None and about.get("work") != _work(recipe):
        raise BadInput(
            f"cannot resume from {folder}: it was trained on other data, or by another protocol; "
            "use the same (steps may differ), or a new folder"
        )
    try:
        learner.load_state_dict(under("learner/", tensors))
    except RuntimeError:
        raise BadInput(
            f"cannot resume from {folder}: it trains a network of other shapes; use the same one, or a new folder"
        ) from None
    saved = under("kept/", tensors)
    if set(saved) != set(kept) or any(saved[name].shape != value.shape for name, value in kept.items()):
        raise BadInput(f"cannot resume from {folder}: it balances other task families; use the same, or a new folder")
    for name, value in kept.items():
        value.copy_(saved[name])
    for name, value in under("best/", tensors).items():
        best[name].copy_(value)
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in under("optimizer/", tensors).items():
        index, _, name = key.partition("/")
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    torch.set_rng_state(tensors["random"])
    training.best, training.best_step = about["best"], about["best_step"]
    training.plan = Plan(**about["plan"]) if about.get("plan") else None
    return about["step"], about["history"]


def _work(recipe: Recipe | None) -> dict[str, Any] | None:
    """What a resumed training must share with the one that was interrupted; it may go on for longer."""
    if recipe is None:
        return None
    about = asdict(recipe)
    for free in ("steps", "patience"):
        about["training"].pop(free, None)
    return _as_json(about)


def _as_json(value: Any) -> Any:
    """As it comes back from disk: JSON has no tuples."""
    return json.loads(json.dumps(value))
