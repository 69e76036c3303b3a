"""Pieces of work side by side, one a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def side_by_side(run: Callable[[Piece], Result], pieces: Sequence[Piece], abreast: int) -> Iterator[Result]:
    """Runs the pieces on so many threads, each on one of torch's; results in their order.

    For work that leaves Python's lock: compiled code.
    """
    threads = torch.get_num_threads()
    if abreast == 1 or len(pieces) == 1:
        yield from map(run, pieces)
        return
    workers = _workers(abreast)
    torch.set_num_threads(1)  # what the caller does with a result must not wake threads that spin beside the workers
    try:
        yield from workers.map(run, pieces)
    finally:
        torch.set_num_threads(threads)


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    started, common = Barrier(threads + 1), torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "metafit-tasks", own_threads, (1,))
    for _ in range(threads):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(common)  # what a worker sets is also the default of threads that start later
    return pool


def own_threads(number: int) -> None:
    """Called in a thread: how many of torch's threads it has to itself."""
    torch.get_num_threads()  # a thread's first use of torch gives it the common number; then it can have its own
    torch.set_num_threads(number)
