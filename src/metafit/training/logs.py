"""Where the rows of a run's history are logged to: a table, TensorBoard's event files, MLflow."""

from __future__ import annotations

import csv
import io
import json
import platform
import re
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from metafit.disk import append_bytes, write_bytes
from metafit.errors import BadInput
from metafit.progress import say

Row = Mapping[str, Any]


class Table:
    """``metrics.csv``: a line a row. It is written whole each time, for a row may bring columns that none had before.

    Args:
        path: the file. Lines of steps that the history does not have are left out: a resumed run takes them again.
        history: the rows so far, where a run is resumed.

    Attributes:
        lost: the rows of the history from the first on that the file does not have.
    """

    def __init__(self, path: Path, history: Sequence[Row]):
        self.path = path
        written = {row["step"]: row for row in _lines(path)} if history else {}
        known = takewhile(lambda row: str(row["step"]) in written, history)
        self.rows: list[Row] = [written[str(row["step"])] for row in known]
        self.lost = history[len(self.rows) :]
        if history:
            self._write()
        else:
            path.unlink(missing_ok=True)

    def __call__(self, row: Row) -> None:
        self.rows.append({name: json.dumps(v) if isinstance(v, dict | list) else v for name, v in row.items()})
        self._write()

    def _write(self) -> None:
        text = io.StringIO()
        columns = dict.fromkeys(name for row in self.rows for name in row)
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_bytes(self.path, text.getvalue().encode())


class Events:
    """TensorBoard: the numbers of each row as scalars. A resumed run adds a file, and voids what it takes again.

    Args:
        folder: of the files; those of an earlier run are removed, but where a run is resumed.
        resumed: the step that a resumed run is at.
    """

    FILES = "events.out.tfevents.*.metafit"

    def __init__(self, folder: Path, resumed: int | None):
        for old in folder.glob(self.FILES) if resumed is None else ():
            old.unlink()
        self.path = folder / self.FILES.replace("*", f"{time.time():.6f}.{platform.node()}")
        self.resumed = resumed

    def __call__(self, row: Row) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        records = []
        if not self.path.exists():
            records.append(Event(file_version="brain.Event:2"))
            if self.resumed is not None:
                records.append(Event(step=self.resumed, session_log=SessionLog(status=SessionLog.START)))
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers(row).items()]
        records.append(Event(step=row["step"], summary=Summary(value=values)))
        for record in records:
            record.wall_time = time.time()
        append_bytes(self.path, b"".join(_framed(record.SerializeToString()) for record in records))


class MLflow:
    """A run of MLflow, wherever its own settings say that they are kept.

    A server that stops answering does not stop the run: it is told, and the rows are in the other logs.

    Args:
        name: of the run; ``config``: its parameters.
        identity: of the run to go on with.

    Raises:
        BadInput: MLflow takes no run.
    """

    def __init__(self, name: str, config: Mapping[str, Any], identity: str | None):
        self.mlflow = mlflow()
        try:
            self.identity = self.mlflow.start_run(run_id=identity, run_name=name).info.run_id
            if identity is None:
                self.mlflow.log_params(dict(config))
        except Exception as error:
            raise BadInput(f"MLflow takes no run: {error}; see MLFLOW_TRACKING_URI, or track without it") from None

    def __call__(self, row: Row) -> None:
        self._send(lambda: self.mlflow.log_metrics(_allowed(numbers(row)), step=row["step"]))

    def end(self, status: str, figures: Row) -> None:
        named = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self._send(lambda: self.mlflow.log_metrics(_allowed(numbers(figures))))
        self._send(lambda: self.mlflow.end_run(named[status]))

    def _send(self, what: Any) -> None:
        try:
            what()
        except Exception as error:
            say(f"MLflow: not logged: {error}")


def _allowed(figures: dict[str, float]) -> dict[str, float]:
    """By names that MLflow takes: a family may be called anything."""
    return {re.sub(r"[^\w\-. /]", "_", name): value for name, value in figures.items()}


def mlflow() -> Any:
    """The package.

    Raises:
        BadInput: it is not installed.
    """
    try:
        import mlflow
    except ImportError:
        raise BadInput("track mlflow: MLflow is not installed; pip install mlflow, or track without it") from None
    return mlflow


def numbers(row: Row) -> dict[str, float]:
    """The figures of a row by their names, below the learner's where the row names one."""
    prefix = f"{row['learner']}/" if "learner" in row else ""
    kept = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool) and k != "step"}
    return {prefix + name: float(value) for name, value in kept.items()}


def _lines(path: Path) -> Iterator[dict[str, str]]:
    """The lines of the file; none where it is missing or was edited beyond reading."""
    try:
        lines = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, csv.Error):
        return
    yield from (line for line in lines if "step" in line and None not in line)


def _framed(record: bytes) -> bytes:
    """As TensorBoard reads them: length, checksum, record, checksum (the TFRecord format)."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(record))
    return length + struct.pack("<I", masked_crc32c(length)) + record + struct.pack("<I", masked_crc32c(record))
