"""A training that is killed at any moment, or whose disk is full, goes on to the bits of one that was not."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kills
import pytest
import torch
from torch import nn

from metafit.data import Sinusoids
from metafit.errors import BadInput
from metafit.learners import build
from metafit.training import Recipe, load_model, meta_train, save_model


def run(how: str, folder: Path, *given: object, within: tuple[str, ...] = ()) -> dict[str, Any]:
    command = [*within, sys.executable, kills.__file__, how, str(folder), *map(str, given)]
    # how a batch is best run is measured once, and another plan rounds otherwise: nothing else is to write down its own
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "METAFIT_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(made: dict[str, Any]) -> None:
    """The same bits, and of a state and a model two files each, beside the file with the digest."""
    assert made["unbroken"]["files"] == 5
    for one in made["runs"]:
        assert {name: one[name] for name in made["unbroken"]} == made["unbroken"]


@pytest.mark.parametrize("runs", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(runs: int, tmp_path: Path) -> None:
    made = run("random", tmp_path, runs)
    check(made)
    assert len(made["runs"]) == runs and all(one["kills"] for one in made["runs"])
    print({name: sum(one[name] for one in made["runs"]) for name in ("kills", "in_a_write")})


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_each_call_of_a_write(every: int, tmp_path: Path) -> None:
    """Half-written files, files not yet renamed, weights whose index is not there yet, old ones not yet removed."""
    made = run("writing", tmp_path, every)
    check(made)
    assert every * len(made["runs"]) >= 14, "four files, three calls each, and two old ones to remove"


def test_a_file_system_that_is_full(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=2m none "$0" && exec "$@"'
    within = ("unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(tmp_path))
    try:
        subprocess.run([*within, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system does not let a user mount a file system")
    made = run("full", tmp_path, within=within)
    check(made)
    assert made["message"].startswith("cannot write") and "the disk is full; free some space" in made["message"]
    assert made["state"] == 6 and made["aside"] == 0


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh())


@pytest.mark.parametrize("call", [1, 3, 5, 7])
def test_a_write_that_fails_leaves_what_there_was(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any of the files of a look, as on a full disk; then a resumed training ends as an unbroken one."""
    options: dict[str, Any] = {"steps": 4, "validate_every": 2, "recipe": Recipe(), "show_progress": False}
    whole, cut, again = (build("maml", 8, None, network()) for _ in range(3))
    meta_train(whole, Sinusoids(batch=2), out=tmp_path / "whole", **options)
    fsync, left = os.fsync, 9 + call  # a probe, and four files at the first look: flushed, as is their folder

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="the disk is full; free some space or name another folder"):
        meta_train(cut, Sinusoids(batch=2), out=tmp_path / "cut", **options)
    monkeypatch.undo()
    assert load_model(tmp_path / "cut", network()).history, "the model is whole"
    assert not list((tmp_path / "cut").glob(".*.part"))
    meta_train(again, Sinusoids(batch=2), out=tmp_path / "cut", resume=True, **options)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_leftovers_go_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    learner = build("maml", 8, None, network())
    save_model(tmp_path, learner, Recipe())
    mine = {path.name for path in tmp_path.iterdir()}
    theirs = {"notes.txt", ".hidden.part", "other-0123456789ab.safetensors", "model-of-mine.safetensors"}
    left = {".state.json.x1.part", ".model-0123456789ab.safetensors.x2.part", "model-0123456789ab.safetensors",
            "state-0123456789ab.safetensors"}  # fmt: skip
    for name in theirs | left:
        (tmp_path / name).write_text("")
    with pytest.raises(KeyboardInterrupt):
        meta_train(learner, Sinusoids(batch=2), steps=2, out=tmp_path, watch=[_stop], show_progress=False)
    state = json.loads((tmp_path / "state.json").read_text())["weights"]
    assert {path.name for path in tmp_path.iterdir()} == mine | theirs | {"state.json", state}


def _stop(row: Any) -> None:
    raise KeyboardInterrupt
