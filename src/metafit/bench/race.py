"""A row: ours beside its peers, in time and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from metafit.bench.memory import peak
from metafit.bench.timing import Call, Duel, interleave


@dataclass(frozen=True)
class Settings:
    """How long to measure, and on what.

    Attributes:
        rounds, seconds, least: see ``interleave``; ``seconds`` is for one workload.
        quick: sizes that only show that everything runs.
        device: where the gradient-based workloads run.
        steps: outer steps that are to come after what is timed: of a training, in which compiling repays itself.
    """

    rounds: int = 15
    seconds: float = 60.0
    least: float = 0.05
    quick: bool = False
    device: str = "cpu"
    steps: int = 10**6


QUICK = Settings(rounds=2, seconds=0.0, least=0.0, quick=True, steps=1)


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        call: does the work; ``None`` where it is not run, and ``note`` says why.
        scale: a call does one part in ``scale`` of the workload.
        differs: how far its numbers are from the reference, relative.
        memory: its own way to tell the peak memory, in bytes.
    """

    name: str
    call: Call | None = None
    note: str = ""
    scale: float = 1.0
    differs: float | None = None
    memory: Callable[[], int | None] | None = None


def race(
    workload: str,
    title: str,
    target: float,
    ours: Contender,
    peers: Sequence[Contender],
    settings: Settings,
    *,
    data: str,
    note: str = "",
    memory_target: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Times ours against each peer in turn and makes the row.

    Returns:
        ``ratio`` is how many times the fastest peer's time is ours, the median over rounds, with its quartiles ``low``
        and ``high``; ``memory_ratio`` our peak memory over that peer's, which a target may bound too; ``contenders``
        all of them, ours first.
    """
    assert ours.call is not None
    calls = {peer.name: peer.call for peer in peers if peer.call is not None}
    alone = {ours.name: ours.call}  # where no peer runs: its own time, at least
    duels = interleave(ours.call, calls or alone, settings.rounds, settings.seconds, settings.least)
    scales = {peer.name: peer.scale for peer in peers}
    figures = [_figures(ours, None), *(_figures(peer, duels.get(peer.name)) for peer in peers)]
    best = min(calls, key=lambda name: duels[name].ratio.median * scales[name], default=ours.name)
    duel = duels[best]
    figures[0]["seconds"] = duel.ours
    timed = {"contenders": figures, "memory_target": memory_target, "seconds": duel.ours, "rounds": duel.rounds}
    row = _row(workload, title, target, data, note, **timed, **more)
    if not calls:
        return row
    fastest = next(figure for figure in figures if figure["name"] == best)
    mine, theirs = figures[0]["memory"], fastest["memory"]
    memory = round(mine / theirs, 3) if mine is not None and theirs else None
    return {
        **row,
        **{key: fastest[key] for key in ("ratio", "low", "high")},
        "reached": fastest["ratio"] >= target and (memory_target is None or memory is None or memory <= memory_target),
        "peer": best,
        "memory_ratio": memory,
    }


def failed(workload: str, title: str, reason: str) -> dict[str, Any]:
    """The row of a workload that could not be run here."""
    return _row(workload, title, None, "", reason, contenders=[])


def _row(workload: str, title: str, target: float | None, data: str, note: str, **more: Any) -> dict[str, Any]:
    unknown = dict.fromkeys(("ratio", "low", "high", "reached", "peer", "seconds", "memory_ratio"))
    about = {"workload": workload, "title": title, "target": target, "data": data, "note": note, "rounds": 0}
    return {**about, **unknown, **more}


def _figures(contender: Contender, duel: Duel | None) -> dict[str, Any]:
    ratio = (None, None, None) if duel is None else tuple(round(contender.scale * part, 3) for part in duel.ratio)
    memory = None
    if contender.call is not None:
        memory = peak(contender.call) if contender.memory is None else contender.memory()
    return {
        "name": contender.name,
        "seconds": None if duel is None else contender.scale * duel.peer,
        "ratio": ratio[0],
        "low": ratio[1],
        "high": ratio[2],
        "memory": memory,
        "differs": contender.differs,
        "note": contender.note,
    }
