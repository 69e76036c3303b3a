"""Two processes train as one would, survive the death of one, and share a network that does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import two_ranks
from lightning_fabric import Fabric
from torch import nn
from torch.utils._pytree import tree_leaves

from metafit.data import TaskSampler
from metafit.training import load_model
from metafit.training.augment import MLTI, Noise
from metafit.training.meta_train import _share


def torchrun(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """What each rank found."""
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command += [two_ranks.__file__, str(out), *arguments]
    # without it, processes that are started again find the addresses of those that died (pytorch #135712)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, env=environment, timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return torchrun(folder / "two")


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def agree(found: tuple[dict[str, Any], two_ranks.Rows], learner: Any, rows: two_ranks.Rows, within: float) -> None:
    torch.testing.assert_close(found[0], dict(learner.state_dict()), rtol=within, atol=within)
    for row, expected in zip(found[1], rows, strict=True):
        assert row.keys() == expected.keys()
        for key, value in row.items():
            near = value == expected[key] or abs(value - expected[key]) <= 1e-6 * max(1, abs(value))
            assert near, (key, row, expected)


def test_two_processes_train_as_one(two: list[dict[str, Any]], double: None) -> None:
    """Each rank has half of every batch, and another random start: the first rank's is everyone's."""
    learner, rows = two_ranks.sinusoids(None)
    assert any(row["clipped"] for row in rows)
    for rank in two:
        agree(rank["sinusoids"], learner, rows, within=1e-6)


@pytest.mark.parametrize("augment", [[], [MLTI(), Noise(0.1)]])
def test_ranks_draw_the_tasks_that_one_process_would(augment: list[Any]) -> None:
    tasks = TaskSampler(two_ranks.digits(), 3, 2, 5, batch=6)

    def share(rank: int, ranks: int) -> list[torch.Tensor]:
        fabric: Any = SimpleNamespace(global_rank=rank, world_size=ranks, to_device=lambda drawn: drawn)
        return tree_leaves(_share(tasks, 4, augment, fabric))

    for one, *parts in zip(share(0, 1), share(0, 3), share(1, 3), share(2, 3), strict=True):
        assert torch.equal(one, torch.cat(parts)) and len(parts[0]) == 2


def test_a_rank_that_is_killed_changes_nothing(two: list[dict[str, Any]], folder: Path) -> None:
    """``torchrun`` starts both again, and they end in the bits of a run that nothing happened to."""
    killed = torchrun(folder / "killed", "--killed")
    for rank, unbroken in zip(killed, two, strict=True):
        assert all(torch.equal(value, rank["dropping"][name]) for name, value in unbroken["dropping"].items())
    assert torch.equal(killed[0]["dropping"]["body.0.weight"], killed[1]["dropping"]["body.0.weight"])


def test_one_process_goes_on_from_the_state_of_two(two: list[dict[str, Any]], folder: Path, double: None) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    learner = two_ranks.dropping(fabric, folder / "two" / "dropping", None)
    assert all(torch.equal(value, two[0]["dropping"][name]) for name, value in learner.state_dict().items())


@pytest.mark.parametrize("name", ["protonet", "anil"])
def test_a_sharded_network_trains_as_a_whole_one(
    name: str, two: list[dict[str, Any]], folder: Path, double: None
) -> None:
    agree(two[0][name], *two_ranks.spread(name, None, folder / name), within=1e-9)
    assert set(two[0]["halves"]) == {0.5} and len(two[0]["halves"]) == 4
    body = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 8))
    saved = load_model(folder / "two" / name, body).learner.state_dict()
    assert all(torch.equal(value, two[0][name][0][key]) for key, value in saved.items())


def test_a_sharded_training_resumes_to_the_bit(two: list[dict[str, Any]]) -> None:
    (unbroken, rows), (resumed, again) = two[0]["protonet"], two[0]["resumed"]
    assert all(torch.equal(value, resumed[name]) for name, value in unbroken.items()) and rows == again


def test_what_adapts_the_body_is_not_sharded(two: list[dict[str, Any]]) -> None:
    assert "adapts the body for each task" in two[0]["refusal"] and "metric-based learner" in two[1]["refusal"]


def test_the_command_trains_in_two_processes_as_in_one(folder: Path) -> None:
    one, two = folder / "one", folder / "two-by-command"
    words = ["train", "--data", "keel:vowel", "--way", "2", "--steps", "6", "--batch", "4", "--json"]
    words += ["--option", "dropout=0"]  # of which each process has its own
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]

    def run(how: list[str], *given: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *how, "metafit.cli.app", *given]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, timeout=280, capture_output=True, text=True)

    made = []
    for how, out in (([], one), (launch, two)):
        done = run(how, *words, "--out", str(out))
        assert done.returncode == 0, done.stderr[-3000:]
        made.append(json.loads(done.stdout))
    for ours, theirs in zip(*(m["history"][1:] for m in made), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["validation"] == pytest.approx(theirs["validation"], abs=2e-3)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    learners = [load_model(out).learner.state_dict() for out in (one, two)]
    torch.testing.assert_close(*learners, rtol=1e-4, atol=1e-5)
    assert json.loads((two / "run.json").read_text())["status"] == "finished"
    refused = run(launch, "compare", "--data", "keel:vowel", "--out", str(folder / "none"))
    assert refused.returncode != 0 and "torchrun is for metafit train" in refused.stderr
