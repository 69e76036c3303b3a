"""Work whose memory goes back to the system as soon as it is free."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

from metafit.over_tasks.threads import own_threads

Result = TypeVar("Result")

BLOCK = 512 << 10  # bytes; for smaller ones the page faults would cost more than they give back
MOST = 32 << 20  # bytes: where the C library's own moving threshold ends
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of mallopt


def thriftily(run: Callable[[], Result]) -> Result:
    """Calls ``run`` in a thread of its own, whose heap never grows by a large block.

    glibc keeps what is freed, as holes of which the next tensor may fit none: the process holds twice what is alive.
    With another C library this is ``run()``.
    """
    mallopt = _mallopt()
    if mallopt is None:
        return run()
    threads = torch.get_num_threads()
    mallopt(MMAP_THRESHOLD, BLOCK)
    try:
        return _worker().submit(_on_threads, threads, run).result()
    finally:
        mallopt(MMAP_THRESHOLD, MOST)
        mallopt(TRIM_THRESHOLD, 2 * MOST)


def _on_threads(threads: int, run: Callable[[], Result]) -> Result:
    own_threads(threads)
    return run()


@cache
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "metafit-thrift")


@cache
def _mallopt() -> Callable[[int, int], int] | None:
    try:
        library = ctypes.CDLL("libc.so.6")
        found: Callable[[int, int], int] = library.mallopt
    except (OSError, AttributeError):  # no glibc
        return None
    return found
