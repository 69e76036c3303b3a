"""The benchmark's harness: its arithmetic by a clock of our own, its peers by their numbers. No test asserts a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metafit.bench import COLUMNS, QUICK, WORKLOADS, Settings, maml, run, table
from metafit.bench.memory import peak
from metafit.bench.peers import loop
from metafit.bench.peers.per_item import PerItemSampler
from metafit.bench.problem import Problem, distance
from metafit.bench.race import Contender, race
from metafit.bench.roofline import beside_roofline
from metafit.bench.timing import interleave
from metafit.cli import app as cli
from metafit.data import Source, TaskSampler
from metafit.errors import BadInput


class Clock:
    """Time that passes only where a contender works."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.seconds

    def worker(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        def work() -> None:
            self.seconds += seconds(self.calls.count(name))
            self.calls.append(name)

        return work


def test_ratios_are_of_calls_in_turn() -> None:
    clock = Clock()
    ours, slow, slower = (clock.worker(name, lambda _, s=s: s) for name, s in (("a", 1.0), ("b", 3.0), ("c", 5.0)))
    duels = interleave(ours, {"b": slow, "c": slower}, rounds=4, seconds=1000, least=0, clock=clock)
    assert duels["b"].ratio == (3.0, 3.0, 3.0) and duels["c"].ratio.median == 5.0
    assert (duels["b"].ours, duels["b"].peer, duels["b"].rounds) == (1.0, 3.0, 4)
    assert "".join(clock.calls) == "abc" + "abac" + "baca" + "abac" + "baca"


def test_a_slow_moment_of_the_machine_is_both_sides() -> None:
    """Twice as slow from the third round on: the medians of times differ, the ratio does not."""
    clock = Clock()
    ours, peer = (clock.worker(name, lambda n, s=s: s * (1 if n < 3 else 2)) for name, s in (("a", 1.0), ("b", 4.0)))
    duel = interleave(ours, {"b": peer}, rounds=9, seconds=1000, least=0, clock=clock)["b"]
    assert duel.ratio == (4.0, 4.0, 4.0) and duel.peer == 8.0


def test_measuring_ends_in_time_and_short_calls_are_repeated() -> None:
    clock = Clock()
    ours, peer = (clock.worker(name, lambda _: 0.5) for name in "ab")
    assert interleave(ours, {"b": peer}, rounds=100, seconds=10, least=0, clock=clock)["b"].rounds == 11
    clock = Clock()
    ours, peer = clock.worker("a", lambda _: 0.25), clock.worker("b", lambda _: 2.0)
    duel = interleave(ours, {"b": peer}, rounds=2, seconds=0, least=1.0, clock=clock)["b"]
    assert duel.ratio.median == 8.0 and duel.ours == 0.25
    assert clock.calls.count("a") == 2 + 2 * 4 and clock.calls.count("b") == 2 + 2
    clock = Clock()
    ours, peer = clock.worker("a", lambda _: 0.25), clock.worker("b", lambda _: 30.0)
    interleave(ours, {"b": peer}, rounds=2, seconds=0, least=1.0, clock=clock)
    assert clock.calls.count("b") == 1 + 2, "what takes long is warmed up once"


def test_a_row_is_beside_the_fastest_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("metafit.bench.timing.now", clock)
    peers = [
        Contender("slow", clock.worker("b", lambda _: 8.0), memory=lambda: 10),
        Contender("in parts", clock.worker("c", lambda _: 0.5), scale=10, memory=lambda: 40),
        Contender("absent", None, "not installed"),
    ]
    ours = Contender("metafit", clock.worker("a", lambda _: 1.0), memory=lambda: 20)
    row = race("w", "title", 4, ours, peers, replace(QUICK, rounds=3), data="none", extra=1)
    assert (row["peer"], row["ratio"], row["reached"], row["memory_ratio"]) == ("in parts", 5.0, True, 0.5)
    assert [figures["ratio"] for figures in row["contenders"]] == [None, 8.0, 5.0, None]
    assert [figures["seconds"] for figures in row["contenders"]] == [1.0, 8.0, 5.0, None]
    greedy = race("w", "title", 4, ours, peers, QUICK, data="none", memory_target=0.4)
    assert greedy["ratio"] == 5.0 and greedy["reached"] is False
    assert row["extra"] == 1 and row["contenders"][3]["note"] == "not installed"
    alone = race("w", "title", 4, ours, peers[2:], QUICK, data="none")
    assert alone["ratio"] is alone["reached"] is None and alone["seconds"] == 1.0


def test_memory_sees_a_large_allocation() -> None:
    if peak(lambda: None) is None:
        pytest.skip("this system has no high-water mark that can be reset")
    size = 1 << 27
    held = torch.ones(size // 4)  # what is there before does not count
    seen = peak(lambda: torch.ones(size // 4))
    assert seen is not None and size * 0.9 < seen < size * 1.5 and held.numel()
    small = peak(lambda: torch.ones(10))
    assert small is not None and small < size / 10


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Problem]:
    """The problem that a workload would time."""

    def of(workload: str) -> Problem:
        kept: list[Problem] = []
        monkeypatch.setattr(maml, "_race", lambda *given, **_: kept.append(given[4]) or {"peer": None})
        monkeypatch.setattr(maml, "beside_roofline", lambda *_: {})
        WORKLOADS[workload].rows(QUICK)
        return kept[0]

    return of


def test_the_loop_is_the_derivative(problem: Callable[[str], Problem]) -> None:
    exact = problem("sinusoid").exact()
    _, gradients = loop.step(exact)()
    name, parameter = next((n, p) for n, p in exact.network.named_parameters() if n == "head.weight")
    losses = []
    for change in (1e-5, -1e-5):
        with torch.no_grad():
            parameter[0, 3] += change
        losses.append(float(loop.step(exact)()[0]))
        with torch.no_grad():
            parameter[0, 3] -= change
    assert float(gradients[name][0, 3]) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6)


def test_the_roofline_counts_the_arithmetic_and_times_the_gradient(problem: Callable[[str], Problem]) -> None:
    this, gradients = problem("conv4-5way"), []
    step = loop.step(this)
    figures = beside_roofline(lambda: gradients.append(step()[1]), this, QUICK)
    assert all(set(found) == dict(this.network.named_parameters()).keys() for found in gradients)
    # two tasks of 5 + 5 images in a Conv4-8: forward, backward and their derivatives are some multiple of one forward
    forward = 10 * 2 * 9 * (28 * 28 * 8 + (14 * 14 + 7 * 7 + 3 * 3) * 64) / 1e9
    assert 3 * forward < figures["gflop_per_task"] < 12 * forward and figures["share"] > 0


@pytest.mark.parametrize("workload", ["sinusoid", "conv4-5way"])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "plain loop"),
        ("higher", "higher"),
        ("torchopt", "torchopt"),
        ("metalearn", "parallel-metalearn, vmap"),
        ("metalearn", "parallel-metalearn, sequential"),
        ("metalearn", "parallel-metalearn, vmap, its own batch norm"),
    ],
)
def test_peers_compute_the_same(problem: Callable[[str], Problem], workload: str, module: str, name: str) -> None:
    pytest.importorskip(module)
    this = problem(workload)
    step = maml._peers(this).get(name)
    if step is None:
        return
    contender = maml._contender(name, step, this)
    if (workload, name) == ("conv4-5way", "parallel-metalearn, vmap"):  # PyTorch's own error, see double_backward
        assert contender.call is None and "off by" in contender.note
    else:
        assert contender.call is not None and contender.differs is not None and contender.differs < maml.EXACT
        assert distance(contender.call(), loop.step(this)()) < maml.CLOSE


def test_a_peer_that_fails_or_is_absent_says_so(problem: Callable[[str], Problem]) -> None:
    def absent(_: Problem) -> Any:
        raise ImportError

    def broken(_: Problem) -> Any:
        raise TypeError("two\nlines")

    this = problem("sinusoid")
    assert "not installed" in maml._contender("a", absent, this).note
    assert maml._contender("b", broken, this).note == "fails: TypeError: two"


def test_the_per_item_sampler_draws_tasks() -> None:
    x = torch.arange(40.0)[:, None]
    source = Source("numbers", x, torch.arange(40) // 10, tuple("abcd"), "vector")
    support, labels, query, asked = PerItemSampler(source, way=3, shot=2, query=4).batch(5)
    ours = TaskSampler(source, way=3, shot=2, query=4, batch=5).draw(0)
    assert support.shape == ours.support.x.shape and query.shape == ours.query.x.shape
    assert torch.equal(labels, ours.support.y) and torch.equal(asked, ours.query.y)
    for told, new in zip(support, query, strict=True):
        assert not set(told.flatten().tolist()) & set(new.flatten().tolist())
        assert [(told[2 * c : 2 * c + 2] // 10).unique().numel() for c in range(3)] == [1, 1, 1]


def test_json_and_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made = run(["sinusoid", "sampling"], threads=1, settings=QUICK, out=tmp_path)
    assert json.loads((tmp_path / "speed.json").read_text()) == json.loads(json.dumps(made, allow_nan=False))
    assert [row["workload"] for row in made["rows"]] == ["sinusoid", "sampling"]
    assert made["environment"]["threads"] == 1
    for row in made["rows"]:
        assert {"workload", "title", "ratio", "low", "high", "target", "reached", "peer", "seconds", "memory_ratio",
                "data", "note", "rounds", "contenders"} <= set(row)  # fmt: skip
        assert row["low"] <= row["ratio"] <= row["high"] and row["contenders"][0]["name"] == "metafit"
    lines = table(made)
    assert {len(line) for line in lines} == {len(COLUMNS)}
    assert len(lines) == sum(len(row["contenders"]) for row in made["rows"])
    out, err = capsys.readouterr()
    assert out == "" and "1 threads" in err and "per-item sampler" in err


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["episodes", "texts", "lora"])
def test_workloads_on_pretrained_models(workload: str) -> None:
    (row,) = run([workload], settings=QUICK)["rows"]
    assert row["contenders"][0]["seconds"] > 0
    assert row["peer"] or "not installed" in row["contenders"][1]["note"]
    if workload == "episodes":
        assert row["contenders"][1]["differs"] < 0.02  # accuracy of the same episodes


@pytest.mark.slow
def test_startup() -> None:
    rows = run(["startup"], settings=QUICK)["rows"]
    assert [row["workload"] for row in rows] == ["import", "help"]
    assert rows[1]["note"] == "does not import torch"


def test_what_cannot_be_had_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Settings) -> Any:
        raise BadInput("cannot fetch the weights")

    monkeypatch.setitem(WORKLOADS, "texts", WORKLOADS["texts"]._replace(rows=fails))
    made = run(["texts"], settings=QUICK)
    assert made["rows"][0]["ratio"] is None and made["rows"][0]["note"] == "cannot fetch the weights"
    assert table(made)[0][0] == "texts"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sped",), ("did you mean 'speed'",)),
        (("speed", "--only", "sinusiod"), ("did you mean 'sinusoid'",)),
        (("speed", "--only", "startup", "--threads", "0"), ("threads",)),
        (("speed", "--only", "startup", "--device", "tpu"), ("device 'tpu'", "cpu")),
    ],
)
def test_command_line_errors(
    arguments: tuple[str, ...], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["metafit", "bench", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and all(word in err for word in words)


def test_command_line_json(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("metafit.bench.Settings", lambda device: replace(QUICK, device=device))
    monkeypatch.setattr(sys, "argv", ["metafit", "bench", "speed", "--only", "sampling", "--json", "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    made = json.loads(capsys.readouterr().out)
    assert stopped.value.code in (0, None) and made["rows"][0]["target"] == 50
    assert (tmp_path / "speed.json").exists()
