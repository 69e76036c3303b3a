"""How much memory a batch of tasks may take."""

from __future__ import annotations

import os

import torch

from metafit.errors import BadInput

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SHARE = 0.5  # of what is free: the rest is for the model's own tensors, and for whoever else uses the machine


def budget(device: torch.device) -> int:
    """Bytes that the intermediate results of a batch of tasks may take.

    ``METAFIT_MEMORY`` (as ``2G`` or ``500M``), else half of the memory that is free on the device.

    Raises:
        BadInput: ``METAFIT_MEMORY`` is no size.
    """
    asked = os.environ.get("METAFIT_MEMORY")
    return parse(asked) if asked else int(_SHARE * free(device))


def parse(size: str) -> int:
    """
    >>> parse("1.5G")
    1610612736
    """
    number, unit = size.strip().upper().removesuffix("B").removesuffix("I"), ""
    if number[-1:] in UNITS:
        number, unit = number[:-1], number[-1:]
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise BadInput(f"METAFIT_MEMORY {size!r}: give a size, as 2G or 500M")
    return int(value * UNITS[unit])


def free(device: torch.device) -> int:
    """Bytes that are free on the device now; a container's limit counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [value for value in (_available(), _within_limit()) if value is not None]
    return min(found, default=4 << 30)  # where the system does not say


def _available() -> int | None:
    try:
        with open("/proc/meminfo") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return None


def _within_limit() -> int | None:
    """What the control group of this process leaves it."""
    try:
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as used:  # noqa: PTH123
            return max(0, int(most.read()) - int(used.read()))
    except (OSError, ValueError):  # none, or "max"
        return None
