"""Files of rows: NumPy's ``.npy`` and safetensors, opened without being read, and written piece by piece."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from metafit import disk
from metafit.data.rows import RowFile, StoredRows
from metafit.errors import BadInput

IN_MEMORY = 256 * 2**20  # bytes: rows that are more stay on disk
_BLOCK = 2**20  # bytes
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "<u1"}


def load(path: str | os.PathLike[str]) -> Tensor | StoredRows:
    """The rows in a file: a tensor up to 256 MiB, and beyond that rows that stay on disk.

    Raises:
        BadInput: as :func:`opened`.
    """
    rows = opened(path)
    return rows[:] if fits(rows.shape, rows.dtype.itemsize) else rows


def fits(shape: Sequence[int], itemsize: int = 4) -> bool:
    """Whether rows of this shape are held in memory."""
    return math.prod(shape) * itemsize <= IN_MEMORY


def opened(path: str | os.PathLike[str]) -> StoredRows:
    """The rows in a ``.npy`` file, or in a safetensors file of one tensor; they stay on disk.

    What :func:`writing` wrote has a digest, which is compared: of the whole content up to 256 MiB, else of 256 blocks
    of 1 MiB that lie evenly over it. Any file must have the length that its header says.

    Raises:
        BadInput: no such file, damaged, of another kind, or something else than one array of numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file; check the path")
    file, digest = _npy(path) if path.suffix == ".npy" else _safetensors(path)
    rows = StoredRows(file)
    if digest is not None:
        if digest != _digest(file.descriptor, file.offset, math.prod(file.shape) * file.dtype.itemsize):
            raise BadInput(f"{path}: the content is damaged; make the file again")
        rows.finite = True
    return rows


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], shape: tuple[int, ...], what: str = "rows") -> Iterator[Room]:
    """A safetensors file of float32 rows ``(N, ...)`` that is filled in any order, never held in memory as a whole.

    The space on disk is taken first. The file appears under its name on a clean exit; an error or an interrupt leaves
    nothing.

    Args:
        path: the file.
        shape: of all rows together.
        what: what messages call the rows.

    Raises:
        BadInput: the disk is full or read-only, a number is not finite, or rows are missing at the end.
    """
    size = 4 * math.prod(shape)
    offset = len(_header(shape, ""))
    with disk.atomic(path) as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is told before the work, not after it
            os.posix_fallocate(file.fileno(), 0, offset + size)
        room = Room(file.fileno(), offset, shape, what)
        yield room
        if room.left:
            raise BadInput(f"{what}: {room.left} of {shape[0]} rows were not written; write each row once")
        _write_at(file.fileno(), _header(shape, _digest(file.fileno(), offset, size)), 0)


class Room:
    """Where rows are written: ``room[index] = rows``, each row once, in any order."""

    def __init__(self, descriptor: int, offset: int, shape: tuple[int, ...], what: str):
        self._descriptor, self._offset, self._shape, self._what = descriptor, offset, shape, what
        self.left = shape[0]

    def __setitem__(self, index: Int64[Tensor, " n"], rows: Float[Tensor, "n ..."]) -> None:
        place, content = index.numpy(), np.ascontiguousarray(rows.float().numpy(force=True))
        bad = ~np.isfinite(content).reshape(len(content), -1).all(1)
        if bad.any():
            raise BadInput(
                f"{self._what}: a number in data row {place[bad].min() + 1} is missing or infinite; drop that row"
            )
        order = place.argsort()
        for run in np.split(order, np.flatnonzero(np.diff(place[order]) != 1) + 1):  # rows that follow each other
            start = int(place[run[0]]) * 4 * math.prod(self._shape[1:])
            _write_at(self._descriptor, content[run].tobytes(), self._offset + start)
        self.left -= len(place)


def _write_at(descriptor: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def load_array(path: str | os.PathLike[str], mapped: bool = False) -> np.ndarray:
    """The array in a ``.npy`` file.

    Raises:
        BadInput: no such file, or it holds anything else than a plain array.
    """
    try:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path}: not a readable array ({reason}); write it with numpy.save") from error


def _npy(path: Path) -> tuple[RowFile, None]:
    array = load_array(path, mapped=True)  # for its header, and the check of the file's length
    assert isinstance(array, np.memmap)
    if array.dtype.kind not in "fiu" or not array.dtype.isnative or not array.flags.c_contiguous or not array.ndim:
        raise BadInput(
            f"{path}: holds {array.dtype} of shape {array.shape}; numbers are needed, rows first, in C order: "
            "save numpy.ascontiguousarray(...)"
        )
    return RowFile(path, array.offset, array.shape, array.dtype), None


def _safetensors(path: Path) -> tuple[RowFile, str | None]:
    """The one tensor of a file, and the digest in its metadata."""
    try:
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            header = json.loads(file.read(length)) if length <= size else {}
        metadata = header.pop("__metadata__", {})
        (entry,) = header.values()
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        if entry["data_offsets"] != [0, size - 8 - length] or size - 8 - length != math.prod(shape) * dtype.itemsize:
            raise ValueError("its length is not what its header says")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{path}: not a safetensors file of one tensor, or damaged ({error}); make it again") from error
    return RowFile(path, 8 + length, shape, dtype), metadata.get("sha256")


def _header(shape: tuple[int, ...], digest: str) -> bytes:
    size = 4 * math.prod(shape)
    entry: dict[str, Any] = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": {"sha256": digest.ljust(64, "0")}, "features": entry}).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the data is aligned
    return len(text).to_bytes(8, "little") + text


def _digest(descriptor: int, offset: int, size: int) -> str:
    """SHA-256 of the content; of ``IN_MEMORY`` bytes of it, in blocks that lie evenly over it, where it is larger."""
    count = min(-(-size // _BLOCK), IN_MEMORY // _BLOCK)
    digest = hashlib.sha256()
    for i in range(count):
        start = i * _BLOCK if size <= IN_MEMORY else i * (size - _BLOCK) // (count - 1)
        digest.update(os.pread(descriptor, min(_BLOCK, size - start), offset + start))
    return digest.hexdigest()
