"""Nothing on disk is ever half-written: write aside, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from metafit.errors import BadInput


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file beside ``path``; on a clean exit it is flushed to disk and renamed to ``path``.

    Raises:
        BadInput: the folder is read-only, missing, or the disk is full; ``path`` keeps its old content.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    with atomic(path) as file:
        file.write(content)


def append_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Adds to the end of a file, for records that tell by themselves whether they are whole.

    Raises:
        BadInput: the folder is read-only, missing, or the disk is full.
    """
    try:
        with open(path, "ab") as file:
            file.write(content)
    except OSError as error:
        raise _explain(error, Path(path)) from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes strict JSON (NaN is refused, not written as a word that parsers reject)."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Makes the folder and proves that it can be written to, so that long work does not end in an error.

    Raises:
        BadInput: it is a file, or read-only, or the disk is full.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise BadInput(f"output folder {path}: it is a file; name a folder that exists or can be made")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"metafit")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise _explain(error, path) from error
    return path


def cache_folder(*parts: str) -> Path:
    """The user's cache: ``$METAFIT_CACHE``, else ``$XDG_CACHE_HOME/metafit``, else ``~/.cache/metafit``."""
    root = os.environ.get("METAFIT_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metafit"
    return base.joinpath(*parts)


def _explain(error: OSError, path: Path) -> BadInput:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BadInput(f"cannot write {path}: the disk is full; free some space or name another folder")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return BadInput(f"cannot write {path}: the folder is read-only for this user; name another folder")
    return BadInput(f"cannot write {path}: {error.strerror or error}; name another folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot fsync a folder; the file itself is safe
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
