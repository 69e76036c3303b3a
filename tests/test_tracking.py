"""What a run leaves in its folder: each step once whatever interrupted it, and lists and comparisons of runs."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from metafit.cli import app as cli
from metafit.cli.runs import compared, differences, listed, listing
from metafit.data import Sinusoids
from metafit.environment import alive, process
from metafit.errors import BadInput
from metafit.learners import build
from metafit.training import logs, meta_train, track
from metafit.training.logs import Events


def train(steps: int, folder: Path | None, watch: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    learner = build("maml", dim=8, way=None, body=nn.Sequential(nn.Linear(1, 8), nn.Tanh()))
    tasks, validation = Sinusoids(shot=5, seed=0, batch=4), Sinusoids(shot=5, seed=1, batch=4)
    options = {"validate_every": 2, "validation_tasks": 4, "backend": "loop", **options}
    return meta_train(learner, tasks, validation, steps=steps, out=folder, watch=watch, show_progress=False, **options)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The event files as TensorBoard reads them: checksums hold, and a start voids what was logged from its step on."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found: list[tuple[str, int, float]] = []
    for path in sorted(folder.glob(Events.FILES)):
        content, at = path.read_bytes(), 0
        while at < len(content):
            length = content[at : at + 8]
            (size,), (checked,) = struct.unpack("<Q", length), struct.unpack("<I", content[at + 8 : at + 12])
            record, end = content[at + 12 : at + 12 + size], content[at + 12 + size : at + 16 + size]
            assert (checked, *struct.unpack("<I", end)) == (masked_crc32c(length), masked_crc32c(record))
            event, first = Event.FromString(record), at == 0
            at += 16 + size
            assert (event.file_version == "brain.Event:2") == first
            if event.HasField("session_log"):
                found = [entry for entry in found if entry[1] < event.step]
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return {tag: [entry[1:] for entry in found if entry[0] == tag] for tag in dict.fromkeys(e[0] for e in found)}


def each_step_once(folder: Path, history: list[dict[str, Any]]) -> None:
    steps = [row["step"] for row in history]
    assert [int(row["step"]) for row in table(folder)] == steps
    assert [float(row["validation"]) for row in table(folder)] == [row["validation"] for row in history]
    assert scalars(folder)["validation"] == [(row["step"], pytest.approx(row["validation"])) for row in history]


class Stop:
    """Stops a training at the look of a step: as a watcher before the others, its row is saved and not logged."""

    def __init__(self, step: int, error: BaseException):
        self.step, self.error = step, error

    def __call__(self, row: Mapping[str, Any]) -> None:
        if row["step"] == self.step:
            raise self.error


def test_a_run_writes_down_what_it_is_and_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        return subprocess.run(["git", *identity, *words], capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    Path("script.py").write_text("1")
    git("add", "."), git("commit", "-qm", "first")
    folder = tmp_path / "run"
    config = {"learner": "maml", "seed": 5, "rate": float("nan"), "where": Path("x")}
    with track(folder, config, command="mine", lower=True) as run:
        assert about(folder)["status"] == "running"
        training = train(4, folder, [run])
    made = about(folder)
    assert made["command"] == "mine" and made["status"] == "finished" and made["seed"] == 5 and made["error"] is None
    assert made["config"] == {"learner": "maml", "seed": 5, "rate": None, "where": "x"}
    assert (folder / "config.yaml").read_text() == "learner: maml\nseed: 5\nrate: null\nwhere: x\n"
    assert made["best"] == training.best == min(row["validation"] for row in training.history) and made["steps"] == 4
    assert made["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    assert made["environment"]["torch"] == torch.__version__ and made["started"] <= made["ended"]
    each_step_once(folder, training.history)
    Path("script.py").write_text("2")
    with track(tmp_path / "later"):
        pass
    assert about(tmp_path / "later")["git"]["dirty"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("power"), BadInput("diverged")])
def test_how_a_run_ended_is_told(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), track(tmp_path) as run:
        train(8, tmp_path, [run, Stop(4, error)])
    made = about(tmp_path)
    assert made["status"] == ("stopped" if isinstance(error, KeyboardInterrupt) else "failed") and made["steps"] == 4
    assert made["error"] in (None, "RuntimeError: power", "BadInput: diverged")


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize("at", [0, 4])
def test_a_resumed_run_has_each_step_once(at: int, lost: bool, tmp_path: Path) -> None:
    """Stopped between the state and the logs, and with logs that are ahead of the state."""
    with pytest.raises(KeyboardInterrupt), track(tmp_path) as run:
        train(10, tmp_path, [Stop(at, KeyboardInterrupt()), run] if lost else [run, Stop(at, KeyboardInterrupt())])
    started = about(tmp_path)["started"]
    if not lost:  # what was logged after the state that is gone on from
        assert len(table(tmp_path)) == at // 2 + 1
        run({"step": at + 2, "loss": 9.0, "validation": 9.0})
        run({"step": at + 4, "loss": 9.0, "validation": 9.0, "extra": 1})
    with track(tmp_path, resume=True) as run:
        history = train(10, tmp_path, [run], resume=True).history
    each_step_once(tmp_path, history)
    made = about(tmp_path)
    assert made["status"] == "finished" and made["started"] == started and len(made["resumed"]) == 1
    assert made["best"] == max(row["validation"] for row in history) and made["steps"] == 10
    assert made["seconds"] > 0


def test_a_new_run_in_an_old_folder_starts_afresh(tmp_path: Path) -> None:
    for steps in (6, 2):
        with track(tmp_path) as run:
            history = train(steps, tmp_path, [run]).history
    each_step_once(tmp_path, history)
    assert about(tmp_path)["resumed"] == [] and len(list(tmp_path.glob(Events.FILES))) == 1
    with track(tmp_path / "new", resume=True) as run:
        history = train(2, tmp_path / "new", [run], resume=True).history
    each_step_once(tmp_path / "new", history)


def test_rows_of_other_columns(tmp_path: Path) -> None:
    rows = [{"step": 0, "loss": 1.5}, {"step": 1, "rate": 0.1, "loss": None, "by": {"a": 1}, "ok": True}]
    with track(tmp_path) as run:
        for row in [*rows, {"learner": "maml", "step": 1, "loss": float("inf")}]:
            run(row)
    assert table(tmp_path) == [
        {"step": "0", "loss": "1.5", "rate": "", "by": "", "ok": "", "learner": ""},
        {"step": "1", "loss": "", "rate": "0.1", "by": '{"a": 1}', "ok": "True", "learner": ""},
        {"step": "1", "loss": "inf", "rate": "", "by": "", "ok": "", "learner": "maml"},
    ]
    found = scalars(tmp_path)
    assert found == {"loss": [(0, 1.5)], "rate": [(1, pytest.approx(0.1))], "maml/loss": [(1, float("inf"))]}
    assert about(tmp_path)["figures"] == {"loss": None}


def test_a_refused_run_leaves_the_folder_alone(tmp_path: Path) -> None:
    with pytest.raises(BadInput), track(tmp_path):
        raise BadInput("no")
    assert not list(tmp_path.iterdir())


def test_of_several_processes_the_first_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with track(tmp_path) as run:
        run({"step": 0})
        run.tell(1.0, "test accuracy")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with track(tmp_path) as run, pytest.raises(BadInput, match="the disk is full"), monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        run({"step": 0, "loss": 1.0})


class FakeMLflow(types.ModuleType):
    """What of MLflow is used, with its signatures."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list[tuple[Any, ...]] = []

    def start_run(self, run_id: str | None = None, run_name: str | None = None) -> Any:
        self.calls.append(("start", run_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "r1"))

    def log_params(self, params: dict[str, Any]) -> None:
        self.calls.append(("params", params))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if metrics.get("loss") == 13:
            raise ConnectionError("no server")
        self.calls.append(("metrics", metrics, step))

    def end_run(self, status: str = "FINISHED") -> None:
        self.calls.append(("end", status))


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(BadInput, match="MLflow is not installed; pip install mlflow"), track(tmp_path, also=["mlflow"]):
        pass
    with (
        pytest.raises(BadInput, match="unknown tracker 'mlfow': did you mean 'mlflow'"),
        track(tmp_path, also=["mlfow"]),
    ):
        pass
    assert not list(tmp_path.iterdir())

    monkeypatch.setitem(sys.modules, "mlflow", fake := FakeMLflow())
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), track(folder, {"way": 5}, also=["mlflow"]) as run:
        train(8, folder, [run, Stop(2, KeyboardInterrupt())], validation_tasks=4)
    kinds = [call[0] for call in fake.calls]
    assert kinds == ["start", "params", "metrics", "metrics", "metrics", "end"]
    assert fake.calls[:2] == [("start", None, "run"), ("params", {"way": 5})]
    assert fake.calls[3][2] == 2 and set(fake.calls[3][1]) >= {"loss", "validation", "seconds"}
    assert fake.calls[-1] == ("end", "KILLED") and about(folder)["mlflow"] == "r1"

    fake.calls.clear()
    with track(folder, {"way": 5}, also=["mlflow"], resume=True) as run:
        train(4, folder, [run], resume=True)
        run({"step": 5, "loss": 13.0})
    assert fake.calls[0] == ("start", "r1", "run") and [call[2] for call in fake.calls if call[0] == "metrics"] == [4]
    assert "no server" in capsys.readouterr().err and int(table(folder)[-1]["step"]) == 5
    assert fake.calls[-1] == ("end", "FINISHED")

    monkeypatch.setattr(logs, "mlflow", lambda: types.SimpleNamespace())  # one that takes no run
    with pytest.raises(BadInput, match="MLflow takes no run"), track(tmp_path / "other", also=["mlflow"]) as run:
        run({"step": 0})


def test_a_process_is_told_from_others() -> None:
    mine = process()
    assert alive(mine) and alive({**mine, "host": "elsewhere"}) is None
    if mine["born"] is not None:
        assert alive({**mine, "born": mine["born"] + 1}) is False, "the number was given again"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert alive({**mine, "pid": ended.pid}) is False
    assert alive({**mine, "born": None}) and alive({"host": mine["host"], "pid": ended.pid, "born": None}) is False


def finished(folder: Path, started: str, best: float | None, config: dict[str, Any], **more: Any) -> None:
    """A run whose end is known."""
    with track(folder, config, command="train") as run:
        run({"step": 10, "loss": 0.5, "validation": best})
    made = {**about(folder), "started": f"2026-01-0{started}T10:00:00+00:00", **more}
    (folder / "run.json").write_text(json.dumps(made))


def test_runs_are_listed_and_compared(tmp_path: Path) -> None:
    config = {"data": "digits", "learner": "anil", "option": {"rate": 0.1, "steps": 3}}
    finished(tmp_path / "a", "2", 0.7, config)
    finished(tmp_path / "b" / "deep", "3", 0.6, {**config, "option": {"rate": 0.2, "steps": 3}})
    finished(tmp_path / "c", "1", None, config, status="running", process={**process(), "pid": 2**22 + 1, "born": 1})
    (tmp_path / "old").mkdir()
    metrics = {"accuracy": {"mean": 0.9, "ci95": 0.1}, "loss": {"mean": 0.3, "ci95": 0.1}}
    result = {"metafit": "0.1.0", "created": "2025-12-01T10:00:00+00:00", "learner": {"name": "knn"}, "backbone": None}
    result |= {"source": {"name": "tables"}, "protocol": {"way": 2}, "metrics": metrics, "history": []}
    (tmp_path / "old" / "result.json").write_text(json.dumps({**result, "environment": {"python": "3.0"}}))
    (tmp_path / "harmed").mkdir()
    (tmp_path / "harmed" / "run.json").write_text('{"status": "fin')
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "run.json").write_text("{}")

    rows = listing(tmp_path)
    assert [Path(row["folder"]).name for row in rows] == ["deep", "a", "c", "old", "harmed"]
    assert [row["status"] for row in rows] == ["finished", "finished", "died", "finished", "damaged"]
    assert rows[1]["learner"] == "anil" and rows[1]["data"] == "digits" and rows[1]["best"] == 0.7
    assert rows[3]["learner"] == "knn" and rows[3]["metric"] == "test accuracy" and rows[3]["best"] == 0.9
    by_best = [Path(row["folder"]).name for row in listing(tmp_path, "best")]
    assert by_best[:3] == ["old", "a", "deep"]
    assert "0.7000 validation" in listed(rows)[1]
    assert [row["folder"] for row in listing(tmp_path / "a")] == [str(tmp_path / "a")]

    told = differences([tmp_path / "a", tmp_path / "b" / "deep"])
    assert told["configuration"] == {"option.rate": [0.1, 0.2]} and told["environment"] == {}
    assert told["figures"]["best"] == [0.7, 0.6] and told["figures"]["loss"] == [0.5, 0.5]
    assert ("option.rate", "0.1", "0.2") in compared(told)
    wide = differences([tmp_path / "a", tmp_path / "old", tmp_path / "c"])
    assert wide["figures"]["accuracy"] == [None, 0.9, None] and wide["configuration"]["data"][1] == "tables"

    with pytest.raises(BadInput, match="unknown order 'bst': did you mean 'best'"):
        listing(tmp_path, "bst")
    with pytest.raises(BadInput, match="is not a folder"):
        listing(tmp_path / "none")
    with pytest.raises(BadInput, match="holds no run"):
        differences([tmp_path / "a", tmp_path / "b"])


def test_the_command_that_lists_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["metafit", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return out if not stopped.value.code else err

    monkeypatch.chdir(tmp_path)
    assert json.loads(told("runs", "--json")) == []
    finished(tmp_path / "a", "1", 0.7, {"seed": 0})
    finished(tmp_path / "b", "2", 0.6, {"seed": 1})
    assert [row["folder"] for row in json.loads(told("runs", "--json"))] == ["b", "a"]
    assert [row["folder"] for row in json.loads(told("runs", "--sort", "best", "--json"))] == ["a", "b"]
    assert json.loads(told("runs", "a", "b", "--json"))["configuration"] == {"seed": [0, 1]}
    assert [line.split() for line in told("runs", "a", "b").splitlines()[:2]] == [["a", "b"], ["seed", "0", "1"]]
    assert told("runs").splitlines()[1].split()[0] == "b"
    assert told("runs", "a", "c").strip() == "metafit: runs: c holds no run; `metafit runs c` lists those below it"
    words = ("train", "--data", "digits", "--backbone", "none", "--way", "2", "--track")
    assert "unknown tracker 'mlfow': did you mean 'mlflow'?" in told(*words, "mlfow")


def test_lower_is_better_for_errors(tmp_path: Path) -> None:
    for name, error in (("a", 0.5), ("b", 0.2)):
        with track(tmp_path / name, lower=True) as run:
            run({"step": 0, "validation": error})
            run({"step": 1, "validation": 1.0})
    assert [(Path(row["folder"]).name, row["best"]) for row in listing(tmp_path, "best")] == [("b", 0.2), ("a", 0.5)]


def test_a_killed_run_is_told_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL, `metafit runs`, `metafit train --resume`: each look is there once."""
    monkeypatch.chdir(tmp_path)
    words = ["train", "--data", "digits", "--backbone", "none", "--way", "2", "--query", "3", "--patience", "1000"]
    command = [sys.executable, "-m", "metafit.cli.app", *words, "--steps", "4000"]
    running = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + 120
        while not Path("model/metrics.csv").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert listing(Path())[0]["status"] == "running"
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert listing(Path())[0]["status"] == "died"
    done = json.loads(Path("model/state.json").read_text())["step"]
    monkeypatch.setattr(sys, "argv", ["metafit", *words, "--steps", str(done + 4), "--resume"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    history = json.loads(Path("model/state.json").read_text())["history"]
    each_step_once(Path("model"), history)
    made = about(Path("model"))
    assert made["status"] == "finished" and len(made["resumed"]) == 1 and made["steps"] == done + 4
