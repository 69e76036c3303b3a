"""All the workloads: run, told as they go, and shown as one table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metafit.bench.episodes import episodes
from metafit.bench.maml import conv4_5way, conv4_20way, lora, sinusoid
from metafit.bench.race import Settings, failed
from metafit.bench.sampling import sampling
from metafit.bench.startup import startup
from metafit.bench.texts import texts
from metafit.disk import write_json
from metafit.environment import environment
from metafit.errors import BadInput, unknown
from metafit.progress import say

COLUMNS = ("workload", "contender", "a call", "times ours", "target", "peak memory", "note")
PEERS = ("torchopt", "higher", "parallel-metalearn", "easyfsl", "setfit")


class Workload(NamedTuple):
    name: str
    title: str
    rows: Callable[[Settings], list[dict[str, Any]]]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("sinusoid", "second-order MAML of a small network", sinusoid),
        Workload("conv4-5way", "second-order MAML of a Conv4-64, one step", conv4_5way),
        Workload("conv4-20way", "second-order MAML of a Conv4-64, five steps", conv4_20way),
        Workload("episodes", "test episodes on a frozen image backbone", episodes),
        Workload("lora", "second-order MAML of low-rank adapters in a MiniLM", lora),
        Workload("texts", "from a few labelled texts to answers", texts),
        Workload("sampling", "drawing tasks", sampling),
        Workload("startup", "import metafit, metafit --help", startup),
    )
}


def run(
    only: Sequence[str] = (),
    threads: int | None = None,
    settings: Settings | None = None,
    out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Runs the workloads and tells each row as it comes.

    Args:
        only: names of workloads; all of them where empty.
        threads: of PyTorch; as many as it has set itself where ``None``.
        settings: how long, and on what.
        out: a folder for ``speed.json``, written anew after each workload.

    Returns:
        ``{"rows", "environment"}``, as in the file; see ``race`` for a row.

    Raises:
        BadInput: an unknown workload (the nearest is named), fewer than one thread, or a device that is not here.
    """
    for name in only:
        if name not in WORKLOADS:
            raise unknown("workload", name, WORKLOADS)
    if threads is not None:
        if threads < 1:
            raise BadInput(f"threads {threads}: needs at least 1")
        torch.set_num_threads(threads)
    settings = settings or Settings()
    if settings.device != "cpu" and not (settings.device == "cuda" and torch.cuda.is_available()):
        raise BadInput(f"device {settings.device!r}: choose cpu{', or cuda' if torch.cuda.is_available() else ''}")
    about = {**environment(), "processor": _processor(), "peers": _peers()}
    told = ", ".join(f"{name} {version}" for name, version in about["peers"].items())
    say(f"{about['threads']} threads of {about['processor']}; on {settings.device}; peers: {told or 'none installed'}")
    made: dict[str, Any] = {"rows": [], "environment": about}
    for workload in WORKLOADS.values():
        if only and workload.name not in only:
            continue
        say(f"{workload.name}: {workload.title} ...")
        for row in _rows(workload, settings):
            say(f"  {row['title']}: {verdict(row)}")
            made["rows"].append(row)
        if out is not None:
            write_json(Path(out) / "speed.json", made)
    return made


def verdict(row: dict[str, Any]) -> str:
    """A row in one line."""
    if row["ratio"] is None:
        return row["note"] or "no peer could be timed"
    if row.get("memory_target") is not None and row["memory_ratio"] is not None:
        memory = f", memory {row['memory_ratio']:g} times, target {row['memory_target']:g}"
    else:
        memory = ""
    spread = f"{row['ratio']:.3g} times {row['peer']} (quartiles {row['low']:.3g} to {row['high']:.3g})"
    return f"{spread}, target {row['target']:g}{memory}: {'reached' if row['reached'] else 'missed'}"


def table(made: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each contender, ours first: see ``COLUMNS``."""
    return [
        (row["workload"] if i == 0 else "", *_line(figures, row if i == 0 else None))
        for row in made["rows"]
        for i, figures in enumerate(row["contenders"] or [{"name": "metafit"}])
    ]


def _line(figures: dict[str, Any], row: dict[str, Any] | None) -> tuple[str, ...]:
    ratio, memory, note = figures.get("ratio"), figures.get("memory"), figures.get("note", "")
    spread = "" if ratio is None else f"{ratio:.3g} ({figures['low']:.3g}-{figures['high']:.3g})"
    target = ""
    if row is not None and row["ratio"] is not None:
        target = f"{row['target']:g} {'reached' if row['reached'] else 'missed'}"
    if row is not None:
        note = "; ".join(part for part in (row["note"], note) if part)
    peak = "" if memory is None else f"{memory / 1e6:.3g} MB"
    return figures["name"], _duration(figures.get("seconds")), spread, target, peak, note


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _rows(workload: Workload, settings: Settings) -> list[dict[str, Any]]:
    try:
        return workload.rows(settings)
    except BadInput as error:  # weights or data that cannot be had here: the other workloads can
        return [failed(workload.name, workload.title, str(error))]


def _peers() -> dict[str, str]:
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The processor's own name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
