"""Rows on disk are the rows of a tensor, whatever their number, and their files are whole or not there."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from metafit import backbones
from metafit.apps.preparing import prepare
from metafit.data import Source, TaskSampler, features, from_arrays, from_file, store
from metafit.data.rows import StoredRows, lazily
from metafit.errors import BadInput

MIB = 2**20


def resident() -> float:
    """MiB of this process in memory."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        pytest.skip("needs /proc")
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def written(path: Path, x: torch.Tensor, batch: int = 7) -> StoredRows:
    """Written in batches of scattered rows, as texts are embedded in order of their length."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    with store.writing(path, tuple(x.shape)) as room:
        for rows in order.split(batch):
            room[rows] = x[rows]
    return store.opened(path)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(120, 5, generator=torch.Generator().manual_seed(1))


def labelled(x, name: str = "toy") -> Source:
    return Source(name, x, torch.arange(120) % 12, tuple(f"class {c:02d}" for c in range(12)), "vector")


def assert_same_tasks(a: Source, b: Source) -> None:
    for ours, theirs in zip(*(TaskSampler(s, 2, 1, 3, seed=4).tasks(0, 20) for s in (a, b)), strict=True):
        for left, right in zip(ours, theirs, strict=True):
            assert torch.equal(left, right)


def test_indexing_is_that_of_a_tensor(tmp_path, x):
    rows = written(tmp_path / "x.safetensors", x)
    assert (rows.shape, rows.dtype, len(rows), rows.ndim) == (x.shape, x.dtype, 120, 2)
    for index in (torch.tensor([[5, 119], [5, 0]]), torch.tensor(3), torch.arange(0), slice(9, 90, 7), slice(None), -1):
        assert torch.equal(rows[index], x[index]), index
    for outside in (120, -121, torch.tensor([0, 120]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            rows[outside]
    assert torch.equal(load_file(tmp_path / "x.safetensors")["features"], x), "any reader of safetensors reads it"


@pytest.mark.parametrize("width", [1, 700, 3000])
def test_reading_near_and_far_rows(tmp_path, width, monkeypatch):
    monkeypatch.setattr("metafit.data.rows._SCRATCH", 400_000)  # some 25 to 100 rows
    x = torch.arange(300.0 * width).view(300, width)
    rows = written(tmp_path / "x.safetensors", x)
    index = torch.randint(0, 300, (20, 13), generator=torch.Generator().manual_seed(2))
    assert torch.equal(rows[index], x[index])


def test_rows_of_one_byte(tmp_path):
    x = np.arange(200, dtype=np.uint8)[:, None]
    np.save(tmp_path / "x.npy", x)
    rows = store.opened(tmp_path / "x.npy")
    assert rows[torch.tensor([[0, 199], [7, 0]])].tolist() == [[[0], [199]], [[7], [0]]]


def test_subsets_and_functions_are_lazy(tmp_path, x):
    rows = written(tmp_path / "x.safetensors", x)
    part = rows.subset(torch.arange(0, 120, 2)).map(lambda some: (some * 2).int()).subset(torch.tensor([3, 1]))
    assert (part.shape, part.dtype) == ((2, 5), torch.int32)
    assert torch.equal(part[:], (x[[6, 2]] * 2).int())
    assert torch.equal(lazily(torch.neg, x), lazily(torch.neg, rows)[:])
    assert torch.equal(copy.deepcopy(part)[:], part[:]), "a copy opens the file for itself"


def test_the_tasks_are_those_of_a_tensor(tmp_path, x):
    ours, theirs = labelled(written(tmp_path / "x.safetensors", x)), labelled(x)
    assert_same_tasks(ours, theirs)
    assert ours.digest() == theirs.digest()
    for a, b in zip(ours.split(seed=3), theirs.split(seed=3), strict=True):
        assert_same_tasks(a, b)
        assert torch.equal(a.x[:], b.x)


def test_a_source_names_the_row_that_is_not_finite(tmp_path, x, monkeypatch):
    monkeypatch.setattr("metafit.data.rows._PIECE", 200)
    x[[16, 100], 2] = torch.nan
    np.save(tmp_path / "x.npy", x.numpy())
    for rows in (x, store.opened(tmp_path / "x.npy")):
        with pytest.raises(BadInput, match=r"toy: .* data row 17 is missing or infinite \(2 such rows\)"):
            labelled(rows)
    with pytest.raises(BadInput, match="rows: a number in data row 17 is missing or infinite"):
        written(tmp_path / "y.safetensors", x, batch=120)
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize("small", [True, False])
def test_from_file(tmp_path, x, small, monkeypatch):
    if not small:
        monkeypatch.setattr(store, "IN_MEMORY", 100)
    y = np.arange(120) % 12
    np.save(tmp_path / "x.npy", x.double().numpy())
    np.save(tmp_path / "y.npy", y)
    save_file({"anything": x}, tmp_path / "x.safetensors")
    expected = from_arrays(x, y)
    for file in ("x.npy", "x.safetensors"):
        for labels in (tmp_path / "y.npy", y, y.tolist()):
            source = from_file(tmp_path / file, labels)
            assert isinstance(source.x, torch.Tensor) is small
            assert (source.name, source.classes, source.modality) == ("x", expected.classes, "vector")
            assert torch.equal(source.x[:], x) and torch.equal(source.y, expected.y)
    images = np.random.default_rng(0).integers(0, 255, (120, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    source = from_file(tmp_path / "images.npy", y)
    assert source.modality == "image" and source.x.shape == (120, 3, 4, 4) and source.x.dtype == torch.uint8
    assert torch.equal(source.x[:], torch.from_numpy(images).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (np.array([["a", "b"]]), "holds <U1 of shape"),
        (np.array([[{}]]), "not a readable array"),
        (np.asfortranarray(np.zeros((3, 2))), "in C order"),
        (b"\x93NUMPY but no more", "not a readable array"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "x.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(BadInput, match=message) as caught:
        from_file(path, [0, 1])
    assert "\n" not in str(caught.value)


def test_from_file_of_labels_that_do_not_fit(tmp_path, x):
    np.save(tmp_path / "x.npy", x.numpy())
    with pytest.raises(BadInput, match="x has 120 examples and y has 3 labels"):
        from_file(tmp_path / "x.npy", np.arange(3))
    with pytest.raises(BadInput, match=r"no\.npy: not a readable array"):
        from_file(tmp_path / "x.npy", tmp_path / "no.npy")
    with pytest.raises(BadInput, match="all 120 examples have the label '1'"):
        from_file(tmp_path / "x.npy", np.ones(120, dtype=int))


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "header", "empty"])
def test_damage_is_told(tmp_path, x, damage):
    path = tmp_path / "x.safetensors"
    written(path, x)
    content = path.read_bytes()
    damaged = {"cut": content[:-4], "longer": content + b"1234", "header": b"\xff" * 9, "empty": b""}
    damaged["flipped"] = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes(damaged[damage])
    with pytest.raises(BadInput, match="damaged"):
        store.opened(path)


def test_a_large_file_is_checked_in_blocks(tmp_path, x, monkeypatch):
    monkeypatch.setattr(store, "IN_MEMORY", 512)
    monkeypatch.setattr(store, "_BLOCK", 64)
    path = tmp_path / "x.safetensors"
    written(path, x)
    content = bytearray(path.read_bytes())
    for at in (-1, -x.nbytes):  # the first and the last block are always among them
        content[at] ^= 1
        path.write_bytes(content)
        with pytest.raises(BadInput, match="damaged"):
            store.opened(path)
        content[at] ^= 1
    path.write_bytes(content)
    assert torch.equal(store.opened(path)[:], x)


def test_a_file_cut_short_while_it_is_open(tmp_path, x):
    rows = written(tmp_path / "x.safetensors", x)
    os.truncate(rows._file.path, 1000)
    with pytest.raises(BadInput, match="shorter than when it was opened"):
        rows[:]


def interrupt(room: store.Room, x: torch.Tensor) -> None:
    raise KeyboardInterrupt


def no_space(*args: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def forget(room: store.Room, x: torch.Tensor) -> None:
    """Returns with rows that are not written."""


@pytest.mark.parametrize(
    ("fault", "expected", "message"),
    [
        (interrupt, KeyboardInterrupt, None),
        (forget, BadInput, "rows: 60 of 120 rows were not written"),
        ("pwrite", BadInput, "the disk is full"),
        ("posix_fallocate", BadInput, "the disk is full"),
    ],
)
def test_an_interrupted_write_leaves_nothing(tmp_path, x, fault, expected, message, monkeypatch):
    if isinstance(fault, str):
        monkeypatch.setattr(os, fault, no_space)
    with pytest.raises(expected, match=message), store.writing(tmp_path / "x.safetensors", (120, 5)) as room:
        room[torch.arange(60)] = x[:60]
        if callable(fault):
            fault(room, x)
    assert list(tmp_path.iterdir()) == []


def test_features_go_to_disk_as_they_are_computed(tmp_path, x, monkeypatch):
    monkeypatch.setenv("METAFIT_CACHE", str(tmp_path))
    torch.manual_seed(0)
    network = nn.Linear(5, 3)
    runs: list[int] = []
    network.register_forward_hook(lambda *_: runs.append(1))
    backbone = backbones.wrap(network, out_dim=3, name="linear")
    small = features.features(labelled(x), backbone)
    assert isinstance(small.x, torch.Tensor)
    (file,) = (tmp_path / "features").iterdir()
    file.unlink()
    monkeypatch.setattr(store, "IN_MEMORY", 100)
    large = features.features(labelled(x), backbone)
    assert isinstance(large.x, StoredRows) and torch.equal(large.x[:], small.x)
    before = len(runs)
    again = features.features(labelled(x), backbone)
    assert len(runs) == before and torch.equal(again.x[:], small.x)
    assert_same_tasks(again, small)
    # from rows on disk to features, and from a cache that is cut short
    np.save(tmp_path / "x.npy", x.numpy())
    assert torch.equal(features.features(labelled(store.opened(tmp_path / "x.npy")), backbone).x[:], small.x)
    assert len(runs) == before, "the same content has the same features"
    os.truncate(file, 200)
    stored = features.features(labelled(store.opened(tmp_path / "x.npy")), backbone)
    assert len(runs) > before and torch.equal(stored.x[:], small.x)


@pytest.mark.parametrize("fault", ["nan", "interrupt", "full"])
def test_features_that_fail_on_the_way_leave_nothing(tmp_path, x, fault, monkeypatch):
    monkeypatch.setenv("METAFIT_CACHE", str(tmp_path))
    monkeypatch.setattr(store, "IN_MEMORY", 100)
    seen = []

    def forward(some: torch.Tensor) -> torch.Tensor:
        seen.append(len(some))
        if len(seen) < 2:
            return some
        if fault == "interrupt":
            raise KeyboardInterrupt
        if fault == "full":
            monkeypatch.setattr(os, "pwrite", no_space)
        return some / 0 if fault == "nan" else some

    expected, message = {
        "nan": (BadInput, "toy: net: a number in data row 65 is missing or infinite"),
        "interrupt": (KeyboardInterrupt, None),
        "full": (BadInput, "the disk is full"),
    }[fault]
    with pytest.raises(expected, match=message):
        features.features(labelled(x), backbones.wrap(forward, name="net"))
    assert list((tmp_path / "features").iterdir()) == []


def test_meta_training_takes_rows_on_disk(tmp_path, x):
    ours = prepare(labelled(written(tmp_path / "x.safetensors", x * 7 + 3)), None)
    theirs = prepare(labelled(x * 7 + 3), None)
    assert isinstance(ours.splits.train.x, StoredRows)
    mean, scale = (torch.tensor(theirs.recipe.scaling[key]) for key in ("mean", "scale"))
    torch.testing.assert_close(torch.tensor(ours.recipe.scaling["mean"]), mean, atol=0.1, rtol=0.01)
    torch.testing.assert_close(torch.tensor(ours.recipe.scaling["scale"]), scale, atol=0, rtol=0.01)
    torch.testing.assert_close(ours.splits.test.x[:], theirs.splits.test.x, atol=0.02, rtol=0.02)


def test_drawing_tasks_holds_no_more_memory(tmp_path):
    """80 MiB of features, all of which are read, many times over."""
    rows, dim = 80 * MIB // 256, 64
    with store.writing(tmp_path / "x.safetensors", (rows, dim)) as room:
        for some in torch.arange(rows).split(20_000):
            room[some] = some[:, None].float().expand(-1, dim)
    y = torch.arange(rows) % 5000
    source = Source("large", store.opened(tmp_path / "x.safetensors"), y, tuple(map(str, range(5000))), "vector")
    train = source.split().train
    tasks = TaskSampler(train, 20, 5, 15, batch=8)
    for i in range(5):
        tasks.draw(i)
    before = resident()
    for i in range(300):
        task = tasks.draw(i)
    assert resident() - before < 10
    draw = tasks.indices(8 * i, 8 * i + 8)
    expected = torch.nonzero(torch.isin(y, torch.tensor([int(c) for c in train.classes])))[:, 0]
    assert torch.equal(task.support.x[..., 0], expected[draw.support.flatten(1)].float())


@pytest.mark.slow
def test_ten_million_rows_of_a_hundred_thousand_classes(tmp_path):
    """What ``benchmarks/input_scale.py`` reports, at full size: memory stays flat, and the tasks are right."""
    rows, classes, dim = 10_000_000, 100_000, 16
    with store.writing(tmp_path / "x.safetensors", (rows, dim)) as room:
        for some in torch.arange(rows).split(200_000):
            room[some] = some[:, None].float().expand(-1, dim)
    before = resident()
    x = store.opened(tmp_path / "x.safetensors")
    assert resident() - before < 20
    y = torch.arange(rows) % classes
    source = Source("large", x, y, tuple(f"class {c}" for c in range(classes)), "vector")
    tasks = TaskSampler(source.split().test, 5, 1, 15)
    for i in range(20):
        tasks.draw(i)
    before = resident()
    for i in range(1000):
        task = tasks.draw(i)
    assert resident() - before < 20
    draw = tasks.indices(16 * i, 16 * i + 16)
    kept = torch.isin(y, torch.tensor([int(name.split()[1]) for name in tasks.source.classes])).nonzero()[:, 0]
    assert torch.equal(task.query.x[..., 0].long(), kept[draw.query.flatten(1)]), "exact below 2²⁴"
