"""Trainings that are killed, and go on; what ``test_kills.py`` runs in a process of its own.

    kills.py random FOLDER RUNS    killed at random moments
    kills.py writing FOLDER EVERY  killed at every so many of the calls that write a model and a state
    kills.py full FOLDER           the disk fills up in the middle; FOLDER is a file system of its own, of 2 MB

Each training is a fork of a process that has imported what it needs, and nothing else. Prints one JSON object.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning_fabric  # noqa: F401  # so that forks need not
import torch
from torch import nn

from metafit.data import Source, TaskSampler
from metafit.data.families import Families
from metafit.errors import BadInput
from metafit.learners import build
from metafit.training import Recipe, meta_train
from metafit.training.augment import MLTI
from metafit.training.store import load_folder

END = "end.txt"


def source() -> Source:
    from sklearn.datasets import load_digits

    data = load_digits()
    return Source(
        "digits", torch.tensor(data.data / 16).float(), torch.tensor(data.target), tuple("0123456789"), "vector"
    )


DIGITS = source()


def train(folder: Path, **options: Any) -> None:
    """Everything that has a state: dropout, families drawn by loss and weighed, averages, accumulated batches."""
    torch.manual_seed(0 if not (folder / "state.json").exists() else time.time_ns() % 2**31)
    body = nn.Sequential(nn.Linear(64, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 16))
    learner = build("anil", 16, 3, body, steps=1)
    sampler = {"way": 3, "shot": 1, "query": 5, "batch": 2}
    families = {name: TaskSampler(part, **sampler) for name, part in zip("ab", _halves(), strict=True)}
    training = meta_train(
        learner, Families(families, by="loss"), TaskSampler(DIGITS, **sampler, seed=1), rate=1e-2, weight_decay=0.01,
        clip=0.5, accumulate=2, ema=0.9, validate_every=4, validation_tasks=6, augment=[MLTI()], uncertainty=True,
        out=folder, recipe=Recipe(), resume=True, show_progress=False, **{"steps": 24, "save_every": 3, **options},
    )  # fmt: skip
    digest = hashlib.sha256()
    for name, value in learner.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in training.history]
    digest.update(json.dumps([rows, training.best, training.best_step]).encode())
    (folder / END).write_text(digest.hexdigest())


def _halves() -> tuple[Source, Source]:
    return DIGITS.subset(list(range(5))), DIGITS.subset(list(range(5, 10)))


def fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def finish(folder: Path, **options: Any) -> dict[str, Any]:
    """Lets the training end; its digest, and the files that it leaves."""
    status = os.waitstatus_to_exitcode(os.waitpid(fork(lambda: train(folder, **options)), 0)[1])
    assert status == 0, status
    names = sorted(path.name for path in folder.iterdir())
    return {"end": (folder / END).read_text(), "files": len(names), "aside": sum(n.endswith(".part") for n in names)}


def at_random(folder: Path, runs: int) -> dict[str, Any]:
    started = time.perf_counter()
    expected = finish(folder / "unbroken")
    duration, chance, made = time.perf_counter() - started, random.Random(runs), []
    for run in range(runs):
        here, kills, aside = folder / str(run), 0, 0
        while kills == 0 or (kills < 1 + run % 3 and not (here / END).exists()):
            if (here / END).exists():  # it was too fast
                shutil.rmtree(here)
            pid = fork(lambda here=here: train(here))
            time.sleep(chance.uniform(0, 0.8 * duration / (1 + run % 3)))
            os.kill(pid, signal.SIGKILL)
            kills += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            aside += len(list(here.glob(".*.part")))
        made.append({**finish(here), "kills": kills, "in_a_write": aside})
        shutil.rmtree(here)
    return {"unbroken": expected, "runs": made}


def while_writing(folder: Path, every: int) -> dict[str, Any]:
    """A shorter training, dead at every so many of the calls by which it changes the disk at its second look."""
    short: dict[str, Any] = {"steps": 4, "save_every": 4}
    expected, runs, first = finish(folder / "unbroken", **short), [], 13  # four files, three calls each, at its first
    while True:
        here, call = folder / str(len(runs)), first + every * len(runs)

        def work(here: Path = here, call: int = call) -> None:
            die_at(call)
            train(here, **short)

        if os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1]) == 0:
            return {"unbroken": expected, "runs": runs}
        runs.append(finish(here, **short))


def die_at(call: int) -> None:
    """The process dies at that call of those by which a file is written; before ``fsync``, half of it is there."""
    left = call

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if real is fsync and stat.S_ISREG(os.fstat(given[0]).st_mode):
                    os.ftruncate(given[0], os.fstat(given[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return wrapped

    fsync = os.fsync
    os.fsync, os.replace, os.unlink = dying(os.fsync), dying(os.replace), dying(os.unlink)


def on_a_full_disk(folder: Path) -> dict[str, Any]:
    """Something else fills the disk at step 8; the training stops, and goes on when there is room again."""
    expected = finish(folder / "unbroken")
    here, ballast = folder / "here", folder / "ballast"

    def fill(row: Any) -> None:
        if row["step"] == 8:
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))

    try:
        train(here, watch=[fill])
        message = "there was room"
    except BadInput as stop:
        message = str(stop)
    aside, state = len(list(here.glob(".*.part"))), load_folder(here, "training state", "state.json")[0]["step"]
    ballast.unlink()
    return {"unbroken": expected, "message": message, "state": state, "aside": aside, "runs": [finish(here)]}


def main() -> None:
    torch.set_num_threads(1)
    how, folder, *rest = sys.argv[1:]
    work = {"random": at_random, "writing": while_writing, "full": on_a_full_disk}[how]
    print(json.dumps(work(Path(folder), *map(int, rest))))


if __name__ == "__main__":
    main()
