"""Rows of numbers that stay on disk: written piece by piece, read when they are asked for.

Rows are read by positioned reads, not through a memory mapping. A mapping is faster once all of it is resident, but
the kernel maps up to 2 MiB around each row that is touched, so the resident memory of a process that draws tasks grows
to the size of the file, and dropping the pages again costs several times what a read does. And where a file is cut
short while it is in use, a read fails with a message; a mapping ends the process.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from metafit.errors import BadInput

_GAP = 4096  # bytes: rows nearer than that are fetched by one read
_SCRATCH = 32 * 2**20  # bytes fetched before the rows among them are put in place
_PIECE = 16 * 2**20  # bytes that a walk over all rows holds


class StoredRows:
    """Rows ``(N, ...)`` in a file, in place of a tensor as ``Source.x``: ``rows[index]`` reads those rows alone.

    Resident memory does not depend on N, except that a subset, and so a split of the classes, holds 8 bytes for each of
    its rows; it copies none.

    Args:
        file: where the rows are.

    Attributes:
        shape, dtype, device: as a tensor of these rows would have them.
        finite: whether every number is known to be finite; a source walks over the rows where it is not.
    """

    device = torch.device("cpu")

    def __init__(self, file: RowFile):
        self._file = file
        self._chosen: Int64[Tensor, " n"] | None = None
        self._function: Callable[[Tensor], Tensor] = _same
        self.shape = torch.Size(file.shape)
        self.dtype = torch.from_numpy(np.empty(0, file.dtype)).dtype
        self.finite = file.dtype.kind != "f"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"StoredRows({str(self._file.path)!r}: {self.dtype} {tuple(self.shape)})"

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """The rows at an index, as a tensor on its device: ``(*index.shape, ...)``.

        Raises:
            IndexError: there is no such row.
            BadInput: the file has become shorter, or cannot be read any more.
        """
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self)))
        if not isinstance(index, Tensor):
            return self[torch.tensor(range(len(self))[index])]
        rows = index.cpu() if self._chosen is None else self._chosen[index.cpu()]
        found = self._function(torch.from_numpy(self._file.read(rows.flatten().numpy())))
        return found.reshape(*index.shape, *found.shape[1:]).to(index.device)

    def subset(self, keep: Int64[Tensor, " n"]) -> StoredRows:
        """Some of the rows, in the order given."""
        part = copy.copy(self)
        part._chosen = keep if self._chosen is None else self._chosen[keep]
        part.shape = torch.Size((len(keep), *self.shape[1:]))
        return part

    def map(self, function: Callable[[Tensor], Tensor]) -> StoredRows:
        """The rows as a function of a batch of them ``(n, ...)`` gives them, when they are read."""
        mapped, inner = copy.copy(self), self._function
        mapped._function = lambda rows: function(inner(rows))
        like = mapped[:1]
        mapped.shape, mapped.dtype = torch.Size((len(self), *like.shape[1:])), like.dtype
        return mapped


class RowFile:
    """An open file that holds rows of one size, one after the other.

    Args:
        path: the file.
        offset: where the first row begins, in bytes.
        shape: of all rows together, ``(N, ...)``.
        dtype: of the numbers.

    Raises:
        BadInput: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int, shape: tuple[int, ...], dtype: np.dtype):
        self.path, self.offset, self.shape, self.dtype = Path(path), offset, shape, dtype
        self.row_bytes = dtype.itemsize * int(np.prod(shape[1:]))
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
        weakref.finalize(self, os.close, self.descriptor)
        if hasattr(os, "posix_fadvise"):  # a row is asked for alone: reading on behind it would be wasted
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowFile, (self.path, self.offset, self.shape, self.dtype)  # another process opens it for itself

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The rows of those numbers, ``(n, ...)``."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.shape[0]):
            raise IndexError(f"{self.path}: row numbers must be from 0 to {self.shape[0] - 1}")
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        step = max(1, _SCRATCH // (self.row_bytes + _GAP))
        for start in range(0, len(rows), step):
            self._read_into(out[start : start + step], rows[start : start + step])
        return out

    def _read_into(self, out: np.ndarray, rows: np.ndarray) -> None:
        """Reads runs of rows that lie near each other, and takes from them the rows that are asked for."""
        size = self.row_bytes
        order = rows.argsort()
        ordered = rows[order]
        begins = np.flatnonzero(np.diff(ordered, prepend=-2 * _GAP) * size >= _GAP + size)
        first, last = ordered[begins], ordered[np.append(begins[1:], len(rows)) - 1]
        length = last - first + 1
        reads = map(os.pread, repeat(self.descriptor), (length * size).tolist(), (self.offset + first * size).tolist())
        try:
            content = b"".join(reads)
        except OSError as error:
            raise BadInput(f"{self.path}: cannot be read ({error.strerror})") from error
        if len(content) != int(length.sum()) * size:
            raise BadInput(f"{self.path}: the file is shorter than when it was opened; make it again")
        moved = np.repeat(length.cumsum() - length - first, np.diff(begins, append=len(rows)))
        place = np.empty_like(order)
        place[order] = ordered + moved
        np.frombuffer(content, self.dtype).reshape(-1, *self.shape[1:]).take(place, axis=0, out=out, mode="clip")


def lazily(function: Callable[[Any], Any], x: Any) -> Any:
    """``function(x)``; of stored rows, when they are read."""
    return x.map(function) if isinstance(x, StoredRows) else function(x)


def pieces(x: Tensor | StoredRows) -> Iterator[Tensor]:
    """All rows, in order, some at a time, in bounded memory."""
    row = x.dtype.itemsize * x.shape[1:].numel()
    step = max(1, _PIECE // max(1, row))
    for start in range(0, x.shape[0], step):
        yield x[start : start + step]


def _same(rows: Tensor) -> Tensor:
    return rows
