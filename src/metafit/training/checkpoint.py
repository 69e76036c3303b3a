"""The state that an interrupted training goes on from, exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metafit.errors import BadInput, some
from metafit.over_tasks import Plan
from metafit.training.ranks import everywhere, of_each_rank, own_share, whole
from metafit.training.run import Run, Since
from metafit.training.store import STATE, STATE_KIND, Recipe
from metafit.weights import load_folder, save_folder, under

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def save_state(folder: Path, run: Run, recipe: Recipe | None, how: Mapping[str, Any], fabric: Fabric) -> None:
    """Writes the state of a training, whole or not at all; for all ranks to call, of which the first writes.

    Parameters, optimizer, best parameters, averages, loss scale, what ``run.kept`` has, and the state of each rank's
    random generators.
    """
    training = run.training
    tensors = {f"learner/{name}": value for name, value in run.learner.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in run.best_state.items()}
    tensors |= {f"average/{name}": value for name, value in (run.average.values if run.average else {}).items()}
    tensors |= moments(run.outer.optimizer)
    tensors |= {f"kept/{name}": value for name, value in run.kept.items()}
    tensors = whole(tensors, fabric) | _random_states(fabric)
    about = {
        "step": run.step,
        "seconds": run.seconds,
        "since": vars(run.since),
        "history": training.history,
        "best": training.best,
        "best_step": training.best_step,
        "plan": training.plan and vars(training.plan),
        "scaler": run.outer.scaler and run.outer.scaler.state_dict(),
        "learner": getattr(run.learner, "recipe", None),
        "work": _work(recipe),
        "how": dict(how),
    }
    if fabric.is_global_zero:
        save_folder(folder, STATE_KIND, about, tensors, STATE)


def load_state(folder: Path, run: Run, recipe: Recipe | None, how: Mapping[str, Any], fabric: Fabric) -> None:
    """Restores what ``save_state`` saved, in place; nothing where the folder holds no state.

    The first rank reads it for all, whose folders need not be the same.

    Raises:
        BadInput: the state is of another training.
    """
    about: dict[str, Any] | None = None
    tensors: dict[str, Tensor] = {}
    if fabric.is_global_zero and (folder / STATE).exists():
        about, tensors = load_folder(folder, STATE_KIND, STATE)
    about = fabric.broadcast(about)
    if about is None:
        return
    _check(folder, about, run, recipe, how)
    targets = _targets(run)
    found = {name: own_share(value, targets.get(name, value)) for name, value in everywhere(tensors, fabric)}
    try:
        run.learner.load_state_dict(under("learner/", found))
    except RuntimeError:
        raise BadInput(
            f"cannot resume from {folder}: it trains a network of other shapes; use the same one, or a new folder"
        ) from None
    saved = under("kept/", found)
    if set(saved) != set(run.kept) or any(saved[name].shape != value.shape for name, value in run.kept.items()):
        raise BadInput(f"cannot resume from {folder}: it balances other task families; use the same, or a new folder")
    averages = run.average.values if run.average else {}
    with torch.no_grad():
        for prefix, own in (("kept/", run.kept), ("best/", run.best_state), ("average/", averages)):
            for name, value in under(prefix, found).items():
                own[name].copy_(value)
    restore_moments(run.outer.optimizer, found)
    if run.outer.scaler is not None:
        run.outer.scaler.load_state_dict(about["scaler"])
    _restore_random_state(found, fabric)
    training = run.training
    training.history, training.best, training.best_step = about["history"], about["best"], about["best_step"]
    training.plan = Plan(**about["plan"]) if about["plan"] else None
    run.step, run.seconds, run.since = about["step"], about["seconds"], Since(**about["since"])


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer has of each parameter, by the parameter's number."""
    return {
        f"optimizer/{i}/{name}": torch.as_tensor(value)
        for i, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in under("optimizer/", dict(tensors)).items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _check(folder: Path, about: dict[str, Any], run: Run, recipe: Recipe | None, how: Mapping[str, Any]) -> None:
    if about["learner"] != _as_json(getattr(run.learner, "recipe", None)):
        raise BadInput(
            f"cannot resume from {folder}: it trains {about['learner']}; "
            "use the same learner and options, or a new folder"
        )
    if recipe is not None:
        check_work(folder, about.get("work"), _work(recipe))
    for name, value in how.items():
        if about.get("how", {}).get(name) != value:
            raise BadInput(
                f"cannot resume from {folder}: it was trained with {name} {about.get('how', {}).get(name)}, not "
                f"{value}; use the same, or a new folder"
            )


def check_work(folder: Path, was: Any, now: Any) -> None:
    """Whether a training is of the same data and protocol as the one that left a state.

    Raises:
        BadInput: it is not; the message says what differs.
    """
    if was != now:
        raise BadInput(
            f"cannot resume from {folder}: it was trained on other data, or by another protocol "
            f"({some(list(_differences(was, now)), 3)}); use the same (steps may differ), or a new folder"
        )


def _differences(was: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two trees of JSON, by the innermost name.

    >>> list(_differences({"a": {"rate": 1, "way": 2}}, {"a": {"rate": 3, "way": 2}}))
    ['rate 3, was 1']
    """
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            yield from _differences(was.get(key), now.get(key), key)
    elif was != now:
        told = ("left out" if value is None else str(value)[:40] for value in (now, was))
        yield f"{name} {', was '.join(told)}".strip()


def _targets(run: Run) -> dict[str, Tensor]:
    """What a rank holds, or will hold, of each tensor of the state."""
    parameters = [p for group in run.outer.optimizer.param_groups for p in group["params"]]
    targets = {f"learner/{name}": value for name, value in run.learner.state_dict().items()}
    targets |= {f"best/{name}": value for name, value in run.best_state.items()}
    targets |= {f"average/{name}": value for name, value in (run.average.values if run.average else {}).items()}
    return targets | {f"optimizer/{i}/{m}": p for i, p in enumerate(parameters) for m in ("exp_avg", "exp_avg_sq")}


def _random_states(fabric: Fabric) -> dict[str, Tensor]:
    """Of torch's generators, on the host and on the device; a row for each rank."""
    states = {"random": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        states["random-cuda"] = torch.cuda.get_rng_state(fabric.device)
    return {name: of_each_rank(state, fabric) for name, state in states.items()}


def _restore_random_state(found: Mapping[str, Tensor], fabric: Fabric) -> None:
    """A rank that there was not keeps what it was seeded with."""
    if fabric.global_rank >= len(found["random"]):
        return
    own = {name: found[name][fabric.global_rank].clone() for name in ("random", "random-cuda") if name in found}
    torch.set_rng_state(own["random"])  # whose memory has to be its own: the generator does not read a row of another's
    if "random-cuda" in own and fabric.device.type == "cuda":
        torch.cuda.set_rng_state(own["random-cuda"], fabric.device)


def saved_history(folder: Path) -> list[dict[str, Any]]:
    """The history of the state in the folder; empty where it holds none that can be read."""
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8"))["history"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _work(recipe: Recipe | None) -> dict[str, Any] | None:
    """What a resumed training must share with the one that was interrupted; it may go on for longer."""
    if recipe is None:
        return None
    about = asdict(recipe)
    del about["classes"]  # they follow from the source and the seed; states of before do not name them
    for free in ("steps", "patience", "episodes"):
        about["training"].pop(free, None)
    return _as_json(about)


def _as_json(value: Any) -> Any:
    """As it comes back from disk: JSON has no tuples."""
    return json.loads(json.dumps(value))
