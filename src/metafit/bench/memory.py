"""The peak memory of one call."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROCESS = Path("/proc/self")


def peak(call: Callable[[], Any]) -> int | None:
    """Bytes that a call needs at its worst moment, above what the process holds before it.

    On a GPU in use, of its memory. On Linux, of the process: the kernel's high-water mark is reset, after what the C
    library holds in reserve is given back. Elsewhere ``None``.
    """
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    if not _reset():
        return None
    before = status("VmRSS")
    call()
    return max(0, status("VmHWM") - before)


def _reset() -> bool:
    """Sets the high-water mark to the present; false where the system has none."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):  # no Linux, no glibc, or a sandbox that forbids it
        return False
    return True


def status(field: str) -> int:
    """Bytes of a field of ``/proc/self/status``, as ``VmRSS``."""
    found = re.search(rf"{field}:\s+(\d+) kB", (PROCESS / "status").read_text())
    assert found is not None
    return int(found[1]) * 1024
