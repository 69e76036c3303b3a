"""Where code runs: versions and machine, commit, process."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def commit() -> dict[str, Any] | None:
    """The commit of the current directory, and whether a file that git knows differs from it; ``None`` without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    alone = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=alone).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": told.removesuffix("-dirty"), "dirty": told.endswith("-dirty")}


def process() -> dict[str, Any]:
    """What tells this process from every other, for ``alive``."""
    return {"host": platform.node(), "pid": os.getpid(), "born": _born(os.getpid())}


def alive(process: Mapping[str, Any]) -> bool | None:
    """Whether the process still runs; ``None`` where that cannot be told: it is another machine's."""
    if process["host"] != platform.node():
        return None
    if process["born"] is not None:  # a number may be given again, with another birth
        return _born(process["pid"]) == process["born"]
    if os.name != "posix":
        return None
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _born(pid: int) -> int | None:
    """When it began, in ticks since the machine did; ``None`` where there is no such process, or no ``/proc``."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(fields[18])
