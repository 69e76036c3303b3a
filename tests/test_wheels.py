from __future__ import annotations

import concurrent.futures
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from metafit import wheels
from metafit.errors import BadInput

WHEEL = "chatterbot-corpus"


@pytest.fixture(scope="module")
def original():
    """The verified wheel in the user's own cache."""
    return wheels.fetch(WHEEL)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wheels"


@pytest.fixture
def offline(monkeypatch):
    """pip is told to use no index and no folder of wheels."""
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", ""), ("CONFIG_FILE", "/dev/null"), ("EXTRA_INDEX_URL", "")):
        monkeypatch.setenv(f"PIP_{name}", value)


@pytest.fixture
def downloads(monkeypatch, original):
    """Stands for pip: copies the verified wheel, and counts."""
    calls: list[str] = []

    def copy(wheel: str, folder: Path) -> None:
        calls.append(wheel)
        shutil.copy(original, folder)

    monkeypatch.setattr(wheels, "_pip", copy)
    return calls


def test_fetch_and_read_members():
    path = wheels.fetch(WHEEL)
    assert path == wheels.location(WHEEL)
    assert path.stat().st_size == wheels.PINS[WHEEL].size
    names = wheels.members(WHEEL, "chatterbot_corpus/data/english/*.yml")
    assert len(names) == 21
    assert names == sorted(names)
    assert wheels.member(WHEEL, names[0]).startswith(b"categories:")


def test_pip_downloads_into_an_empty_cache(empty_cache, capfd):
    path = wheels.fetch(WHEEL)
    assert [path] == list(empty_cache.iterdir())  # nothing temporary is left
    assert "fetching chatterbot-corpus 1.3.3 (0.3 MB)" in capfd.readouterr().err


def test_a_cached_wheel_is_not_downloaded_again(empty_cache, downloads):
    assert wheels.fetch(WHEEL) == wheels.fetch(WHEEL)
    assert downloads == [WHEEL]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + b"!", lambda b: b""])
def test_a_damaged_wheel_is_fetched_again(empty_cache, downloads, capfd, damage):
    path = wheels.fetch(WHEEL)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert wheels.fetch(WHEEL).read_bytes() == good
    assert "is damaged: fetching it again" in capfd.readouterr().err
    assert len(downloads) == 2


def test_a_download_that_is_not_the_pinned_file_is_refused(empty_cache, monkeypatch):
    monkeypatch.setattr(wheels, "_pip", lambda wheel, folder: (folder / "other.whl").write_bytes(b"other"))
    with pytest.raises(BadInput, match="not the pinned file"):
        wheels.fetch(WHEEL)
    assert list(empty_cache.iterdir()) == []


def test_offline_says_what_to_do(empty_cache, offline):
    with pytest.raises(BadInput, match="connect to the network once, or set METAFIT_CACHE") as caught:
        wheels.fetch(WHEEL)
    assert "\n" not in str(caught.value)
    assert list(empty_cache.iterdir()) == []


def test_offline_with_a_full_cache_works(empty_cache, downloads, offline):
    wheels.fetch(WHEEL)
    program = f"from metafit import wheels; print(wheels.fetch({WHEEL!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(wheels.location(WHEEL))


def test_two_at_once_leave_one_whole_file(empty_cache, downloads):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(wheels.fetch, [WHEEL] * 8))
    assert len(paths) == 1
    assert list(empty_cache.iterdir()) == list(paths)


def test_unknown_names():
    with pytest.raises(BadInput, match="did you mean 'chatterbot-corpus'"):
        wheels.fetch("chaterbot-corpus")
    with pytest.raises(BadInput, match="file in the wheel"):
        wheels.member(WHEEL, "chatterbot_corpus/data/english/aii.yml")


def test_where_pip_looks_is_left_to_the_user(empty_cache, monkeypatch):
    seen: list[str] = []

    def refuse(command, **_):
        seen.extend(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(KeyboardInterrupt):
        wheels.fetch(WHEEL)
    assert {"download", "--no-deps", "--only-binary=:all:", "chatterbot-corpus==1.3.3"} <= set(seen)
    assert not any("index" in word or "http" in word or "find-links" in word for word in seen)
