"""What was measured, remembered in the process and in the user's cache: so the next run chooses alike."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

from metafit import disk
from metafit._version import __version__
from metafit.errors import BadInput

_here: dict[Path, Any] = {}


def recall(key: tuple[Any, ...]) -> Any:
    """The value kept for the key, on this machine with these versions and as many threads; ``None`` for none."""
    path = _path(key)
    if path not in _here:
        try:
            _here[path] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
    return _here[path]


def keep(key: tuple[Any, ...], value: Any) -> None:
    """Keeps a value of JSON. A cache that cannot be written costs the next process a measurement."""
    path = _path(key)
    _here[path] = value
    try:
        disk.write_json(path, value)
    except BadInput:
        return


def _path(key: tuple[Any, ...]) -> Path:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    where = (__version__, torch.__version__, platform.node(), platform.machine(), gpu, torch.get_num_threads())
    return disk.cache_folder("plans") / f"{hashlib.sha256(repr((where, key)).encode()).hexdigest()}.json"
