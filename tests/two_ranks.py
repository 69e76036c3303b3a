"""What ``test_ranks.py`` runs in one process, and under ``torchrun`` in two: ``two_ranks.py FOLDER [--killed]``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from metafit.data import Sinusoids, Source, TaskSampler
from metafit.errors import BadInput
from metafit.learners import Learner, build
from metafit.over_tasks.part import sharded
from metafit.task import Task
from metafit.training import Recipe, Training, fully_sharded, meta_train
from metafit.training.augment import MLTI
from metafit.training.ranks import whole

Rows = list[dict[str, Any]]


def rows(training: Training) -> Rows:
    """Of the history, but for the clock."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in training.history]


def sinusoids(fabric: Fabric | None) -> tuple[Learner, Rows]:
    """A gradient-based learner, whose batches are mixed, added up and averaged."""
    torch.manual_seed(0 if fabric is None else fabric.global_rank)  # all start from the first rank's parameters
    learner = build("maml", 8, None, nn.Sequential(nn.Linear(1, 8), nn.Tanh()))
    options: dict[str, Any] = {"accumulate": 2, "ema": 0.9, "clip": 0.5, "augment": [MLTI()]}
    tasks, validation = Sinusoids(batch=4), Sinusoids(seed=1, batch=4)
    options |= {"steps": 6, "rate": 1e-2, "validate_every": 2, "validation_tasks": 7, "show_progress": False}
    return learner, rows(meta_train(learner, tasks, validation, fabric=fabric, **options))


class Deadly(TaskSampler):
    """Kills the second rank of the first start when it draws the tasks of a step."""

    at: int | None = None

    def tasks(self, start: int, stop: int) -> Task:
        first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and os.environ["RANK"] == "1"
        if self.at is not None and first_start and start // self.batch == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().tasks(start, stop)


def dropping(fabric: Fabric, out: Path, at: int | None) -> Learner:
    """Each rank has its own dropout, and goes on with it after a restart."""
    torch.manual_seed(fabric.global_rank)
    body = nn.Sequential(nn.Linear(64, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 16))
    learner, tasks = build("protonet", 16, 2, body), Deadly(digits(), 2, 1, 5, batch=4)
    tasks.at = at
    meta_train(learner, tasks, steps=8, rate=1e-2, fabric=fabric, out=out, save_every=3, resume=True,
               show_progress=False)  # fmt: skip
    return learner


class Interrupted(TaskSampler):
    """Ctrl-C in the middle."""

    def tasks(self, start: int, stop: int) -> Task:
        if start >= 4 * self.batch:
            raise KeyboardInterrupt
        return super().tasks(start, stop)


def spread(name: str, fabric: Fabric | None, out: Path, tasks: type[TaskSampler] = TaskSampler) -> tuple[Learner, Rows]:
    """A learner whose body may lie on two ranks, half on each."""
    torch.manual_seed(0 if fabric is None else fabric.global_rank)
    body = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 8))
    learner = build(name, 8, 2, body)
    source, sampler = digits(), {"way": 2, "shot": 2, "query": 5, "batch": 4}
    training = meta_train(
        learner, tasks(source, **sampler), TaskSampler(source, **sampler, seed=1), steps=6, rate=1e-2, weight_decay=0.1,
        clip=0.05, ema=0.9, validate_every=2, validation_tasks=6, fabric=fabric, out=out, recipe=Recipe(), resume=True,
        show_progress=False,
    )  # fmt: skip
    return learner, rows(training)


def digits() -> Source:
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.get_default_dtype())
    return Source("digits", x, torch.tensor(data.target), tuple("0123456789"), "vector")


def main(out: Path, killed: bool) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    found: dict[str, Any] = {"dropping": dropping(fabric, out / "dropping", 5 if killed else None).state_dict()}
    if not killed:
        learner, history = sinusoids(fabric)
        found["sinusoids"] = (dict(learner.state_dict()), history)
        shards = Fabric(accelerator="cpu", devices=2, strategy=fully_sharded(nn.Linear))
        for name in ("protonet", "anil"):
            learner, history = spread(name, shards, out / name)
            found[name] = (whole(learner.state_dict(), shards), history)
            found["halves"] = [p.to_local().numel() / p.numel() for p in learner.parameters() if sharded(p)]  # type: ignore[attr-defined]
        try:
            spread("protonet", shards, out / "cut", Interrupted)
        except KeyboardInterrupt:
            learner, history = spread("protonet", shards, out / "cut")
            found["resumed"] = (whole(learner.state_dict(), shards), history)
        try:
            spread("maml", shards, out / "refused")
        except BadInput as refusal:
            found["refusal"] = str(refusal)
    torch.save(found, out / f"{fabric.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--killed" in sys.argv)
