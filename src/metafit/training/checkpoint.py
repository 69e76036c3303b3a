"""The state that an interrupted training goes on from, exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metafit.errors import BadInput
from metafit.learners import Learner
from metafit.training.store import load_folder, save_folder

INDEX = "state.json"


def save_state(
    folder: Path,
    step: int,
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
    training: Any,
) -> None:
    """Writes parameters, optimizer state, best parameters and the random state, whole or not at all."""
    tensors = {f"learner/{name}": value for name, value in learner.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in best.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors["random"] = torch.get_rng_state()
    about = {
        "step": step,
        "history": training.history,
        "best": training.best,
        "best_step": training.best_step,
        "learner": getattr(learner, "recipe", None),
    }
    save_folder(folder, "training state", about, tensors, INDEX)


def load_state(
    folder: Path, learner: Learner, optimizer: torch.optim.Optimizer, best: dict[str, Tensor], training: Any
) -> tuple[int, list[dict[str, Any]]]:
    """Restores what ``save_state`` saved, in place; step 0 where the folder holds no state.

    Returns:
        The step to go on from, and the history so far.
    """
    if not (folder / INDEX).exists():
        return 0, []
    about, tensors = load_folder(folder, "training state", INDEX)
    if about["learner"] != json.loads(json.dumps(getattr(learner, "recipe", None))):  # JSON has no tuples
        raise BadInput(
            f"cannot resume from {folder}: it trains {about['learner']}; "
            "use the same learner and options, or a new folder"
        )
    try:
        learner.load_state_dict(_under("learner/", tensors))
    except RuntimeError:
        raise BadInput(
            f"cannot resume from {folder}: it trains a network of other shapes; use the same one, or a new folder"
        ) from None
    for name, value in _under("best/", tensors).items():
        best[name].copy_(value)
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in _under("optimizer/", tensors).items():
        index, _, name = key.partition("/")
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    torch.set_rng_state(tensors["random"])
    training.best, training.best_step = about["best"], about["best_step"]
    return about["step"], about["history"]


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
