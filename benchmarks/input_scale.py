"""Drawing tasks from ten million rows on disk, beside ten thousand: `python benchmarks/input_scale.py`.

Prints one JSON row. ``ratio`` is the median time of a batch of tasks from all rows over that from ten thousand, both on
disk, drawn in turn in one process; ``ratio_in_memory`` is over ten thousand rows in a tensor. ``cpu`` has the same of
the processor's time, which other programs on the machine disturb less. Rows of a class lie together, or with
``--shuffled`` anywhere. ``growth_mib`` is how much more memory the process holds after the batches than before them,
and ``opened_mib`` what making the files and the sources, labels included, has left in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from metafit.data import Source, TaskSampler, store

SMALL, EACH = 10_000, 100  # rows of the small source; rows of a class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--shuffled", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(
            Path(folder), args.rows, args.dim, args.batches, args.way, args.shot, args.batch, args.shuffled
        )
    print(json.dumps({**vars(args), **measured}))


def measure(
    folder: Path, rows: int, dim: int, batches: int, way: int, shot: int, batch: int, shuffled: bool
) -> dict[str, Any]:
    """Times, their ratios and resident memory; the files are left in the folder."""
    before = resident()
    paths = [written(folder / f"{count}.safetensors", count, dim) for count in (SMALL, rows)]
    samplers = [TaskSampler(source(store.opened(path), shuffled), way, shot, 15, batch) for path in paths]
    samplers.append(TaskSampler(source(store.load(paths[0]), shuffled), way, shot, 15, batch))
    for index in range(20):
        for sampler in samplers:
            sampler.draw(index)
    opened = resident()
    wall: list[list[float]] = [[], [], []]
    cpu: list[list[float]] = [[], [], []]
    for index in range(batches):
        for sampler, walls, cpus in zip(samplers, wall, cpu, strict=True):
            start = time.perf_counter(), time.process_time()
            sampler.draw(index)
            walls.append(time.perf_counter() - start[0])
            cpus.append(time.process_time() - start[1])
    return {
        **ratios(wall),
        "cpu": ratios(cpu),
        "opened_mib": round(opened - before, 1),
        "growth_mib": round(resident() - opened, 1),
        "file_mib": round(paths[1].stat().st_size / 2**20),
    }


def ratios(seconds: list[list[float]]) -> dict[str, float]:
    small, large, memory = map(statistics.median, seconds)
    return {"ratio": round(large / small, 3), "ratio_in_memory": round(large / memory, 3), "ms": round(1e3 * large, 3)}


def written(path: Path, rows: int, dim: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    with store.writing(path, (rows, dim)) as room:
        for some in torch.arange(rows).split(100_000):
            room[some] = torch.randn(len(some), dim, generator=generator)
    return path


def source(x: Any, shuffled: bool) -> Source:
    classes = len(x) // EACH
    y = torch.arange(classes).repeat_interleave(EACH)
    if shuffled:
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    return Source("rows", x, y, tuple(map(str, range(classes))), "vector")


def resident() -> float:
    """MiB of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
