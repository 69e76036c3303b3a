"""What a run is and what came of it, in its folder: ``run.json``, ``config.yaml``, and the logs of its history."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from metafit import processes
from metafit._version import __version__
from metafit.disk import writable_folder, write_bytes, write_json
from metafit.environment import commit, environment, process
from metafit.errors import BadInput, unknown
from metafit.training.checkpoint import saved_history
from metafit.training.logs import Events, MLflow, Row, Table, mlflow

SCHEMA = 1
RUN, CONFIG, METRICS = "run.json", "config.yaml", "metrics.csv"


@contextlib.contextmanager
def track(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    *,
    command: str = "python",
    resume: bool = False,
    lower: bool = False,
    also: Sequence[str] = (),
) -> Iterator[Run]:
    """Tracks a run; what it gives is a watcher: ``meta_train(..., watch=[run])``.

    A run that is refused (``BadInput`` before its first row) leaves the folder as it was. Of several processes, the
    first alone writes.

    Args:
        folder: of the run; that of ``out``, where there is one.
        config: what it runs with: names and plain values.
        command: what runs.
        resume: go on from the state in the folder that ``meta_train`` goes on from, each row once; start afresh where
            there is none.
        lower: whether a lower validation figure is the better one, as of squared errors.
        also: where else to log: ``"mlflow"``, to where its own settings say.

    Raises:
        BadInput: a folder that cannot be written to, or MLflow asked for and not installed.
    """
    for name in also:
        if name != "mlflow":
            raise unknown("tracker", name, ["mlflow"])
        mlflow()
    folder = writable_folder(folder)
    history = saved_history(folder) if resume else []
    run = Run(folder, command, config or {}, history, lower, bool(also))
    found = {name: _bytes(folder / name) for name in (RUN, CONFIG)}
    try:
        run.begin()
        yield run
    except BaseException as error:
        if isinstance(error, BadInput) and not run.begun:
            for name, content in found.items() if processes.first() else ():
                _restore(folder / name, content)
        else:
            stopped = isinstance(error, KeyboardInterrupt)
            run.end("stopped" if stopped else "failed", None if stopped else f"{type(error).__name__}: {error}")
        raise
    run.end("finished")


class Run:
    """A run under way: called with each row of its history, it writes the row down.

    Attributes:
        about: what ``run.json`` holds.
        begun: whether it has had a row.
    """

    def __init__(
        self,
        folder: Path,
        command: str,
        config: Mapping[str, Any],
        history: Sequence[Row] = (),
        lower: bool = False,
        to_mlflow: bool = False,
    ):
        self.folder, self.history, self.to_mlflow, self.begun = folder, history, to_mlflow, False
        self.logs: list[Callable[[Row], None]] = []
        self.mlflow: MLflow | None = None
        before = _content(folder / RUN) if history else {}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.earlier, self.clock = before.get("seconds", 0.0), time.monotonic()
        self.about: dict[str, Any] = {
            "schema": SCHEMA,
            "metafit": __version__,
            "command": command,
            "status": "running",
            "started": before.get("started", now),
            "resumed": [*before.get("resumed", []), now] if history else [],
            "ended": None,
            "seconds": self.earlier,
            "config": _plain(config),
            "seed": config.get("seed"),
            "steps": None,
            "best": None,
            "metric": None,
            "lower": lower,
            "figures": {},
            "environment": environment(),
            "git": commit(),
            "process": process(),
            "mlflow": before.get("mlflow"),
            "error": None,
        }
        for row in history:
            self._count(row)

    def begin(self) -> None:
        """Writes down what runs, and takes up the logs where a run is resumed."""
        import yaml

        self._save()
        config = yaml.safe_dump(self.about["config"], sort_keys=False, allow_unicode=True)
        if processes.first():
            write_bytes(self.folder / CONFIG, config.encode())
        if self.history:
            self._open()

    def __call__(self, row: Row) -> None:
        """Writes a row down: ``step``, and any figures, which need not be those of the row before."""
        if self.history and row["step"] <= self.history[-1]["step"]:
            return  # looked at again where the run was resumed
        self._open()
        self.begun = True
        for log in self.logs:
            log(row)
        self._count(row)
        self._save()

    def tell(self, best: float | None, metric: str, **figures: Any) -> None:
        """What came of it in the end, in place of what its rows say: its best figure, what that is, and others."""
        self._open()
        self.about.update(best=best, metric=metric, figures=_plain(figures))
        self._save()

    def end(self, status: str, error: str | None = None) -> None:
        ended = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.about.update(status=status, error=error, ended=ended)
        self._save()
        if self.mlflow is not None:
            self.mlflow.end(status, self.about["figures"])

    def _open(self) -> None:
        """Opens the logs, which then hold each row of the history once."""
        if self.logs or not processes.first():
            return
        table = Table(self.folder / METRICS, self.history)
        resumed = None
        if self.history:
            resumed = table.lost[0]["step"] if table.lost else self.history[-1]["step"] + 1
        self.logs = [Events(self.folder, resumed), table]
        if self.to_mlflow:
            self.mlflow = MLflow(self.folder.name, self.about["config"], self.about["mlflow"])
            self.about["mlflow"] = self.mlflow.identity
            self.logs.append(self.mlflow)
        for row in table.lost:
            for log in self.logs:
                log(row)

    def _count(self, row: Row) -> None:
        about, validation = self.about, row.get("validation")
        figures = {name: value for name, value in row.items() if name not in ("learner", "step", "seconds")}
        about.update(steps=max(about["steps"] or 0, row["step"]), figures=_plain(figures))
        if validation is not None:
            best = [validation] if about["best"] is None else [validation, about["best"]]
            about.update(best=min(best) if about["lower"] else max(best), metric="validation")

    def _save(self) -> None:
        self.about["seconds"] = round(self.earlier + time.monotonic() - self.clock, 3)
        if processes.first():
            write_json(self.folder / RUN, self.about)


def _plain(value: Any) -> Any:
    """As JSON can hold it: what is not finite is nothing, and what JSON does not know is its text."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def _content(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _restore(path: Path, content: bytes | None) -> None:
    if content is not None:
        write_bytes(path, content)
    else:
        path.unlink(missing_ok=True)
