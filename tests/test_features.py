from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch import nn

from metafit import backbones
from metafit.data.features import features
from metafit.data.source import Source
from metafit.errors import BadInput

Y = torch.tensor([0, 0, 1, 1])


class Counting(nn.Module):
    """A linear map that counts how often it ran, and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.modes: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.training)
        return self.linear(x)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAFIT_CACHE", str(tmp_path))
    return tmp_path / "features"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Counting()


def backbone_of(model: nn.Module, name: str | None = "counting") -> backbones.Backbone:
    return backbones.wrap(model, out_dim=2, name=name)


def source_of(x: torch.Tensor | None = None) -> Source:
    torch.manual_seed(1)
    return Source("some", torch.randn(4, 3) if x is None else x, Y, ("a", "b"), "vector")


def test_computed_once_then_read(cache, model):
    source = source_of()
    first = features(source, backbone_of(model))
    second = features(source_of(), backbone_of(model))
    assert len(model.modes) == 1
    assert torch.equal(first.x, second.x)
    torch.testing.assert_close(first.x, model.linear(source.x).detach())
    assert first.modality == "vector"
    assert first.raw is source.x
    assert len(list(cache.iterdir())) == 1


def test_always_in_evaluation_mode(cache, model):
    backbone = backbone_of(model).train()
    features(source_of(), backbone)
    assert model.modes == [False]
    assert backbone.training
    features(source_of(), backbone.eval())
    assert model.modes == [False]


@pytest.mark.parametrize("change", ["data", "weights", "name"])
def test_anything_that_changes_features_changes_the_key(cache, model, change):
    before = features(source_of(), backbone_of(model)).x
    source = source_of()
    if change == "data":
        source = source_of(source.x + 1)
    if change == "weights":
        with torch.no_grad():
            model.linear.bias += 1
    after = features(source, backbone_of(model, "other" if change == "name" else "counting")).x
    assert len(model.modes) == 2
    assert torch.equal(before, after) is (change == "name")


def test_an_unnamed_model_is_never_cached(cache, model):
    for _ in range(2):
        features(source_of(), backbone_of(model, None))
    assert len(model.modes) == 2
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_file_is_computed_again(cache, model, damage, capsys):
    expected = features(source_of(), backbone_of(model)).x
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes({"cut": content[:-8], "flipped": content, "empty": b"", "text": b"not safetensors"}[damage])
    assert torch.equal(features(source_of(), backbone_of(model)).x, expected)
    assert len(model.modes) == 2
    assert "computing them again" in capsys.readouterr().err
    features(source_of(), backbone_of(model))
    assert len(model.modes) == 2


def test_a_cache_that_cannot_be_written_only_warns(tmp_path, monkeypatch, model, capsys):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("METAFIT_CACHE", str(blocked))
    assert features(source_of(), backbone_of(model)).x.shape == (4, 2)
    assert "the features are not kept for the next time" in capsys.readouterr().err


def test_a_feature_that_is_not_finite_names_its_example(cache):
    def logarithm(x: torch.Tensor) -> torch.Tensor:
        return x.log()

    source = source_of(torch.tensor([[1.0], [2.0], [0.0], [0.0]]))
    with pytest.raises(BadInput, match=r"some: the backbone 'log'.*for example 2, 2 such in all"):
        features(source, backbones.wrap(logarithm, name="log"))
    assert not cache.exists()


def test_without_a_backbone():
    source = source_of()
    assert features(source, None) is source
    texts = Source("words", ["a", "b", "c", "d"], Y, ("a", "b"), "text")
    with pytest.raises(BadInput, match="words: text needs a backbone"):
        features(texts, None)
    with pytest.raises(BadInput, match="its examples are text, and the backbone 'Identity' reads vector"):
        features(texts, backbones.wrap(nn.Identity()))


def test_texts(tmp_path):
    lengths = backbones.wrap(
        lambda x: x, modality="text", preprocess=lambda raw: torch.tensor([[float(len(t))] for t in raw])
    )
    source = Source("words", ["aaa", "b", "", "dd"], Y, ("a", "b"), "text")
    found = features(source, lengths)
    assert found.x.flatten().tolist() == [3, 1, 0, 2]
    assert found.raw == source.x


def _compute(cache: str, out: object) -> None:
    import os

    os.environ["METAFIT_CACHE"] = cache
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    for step in range(20):
        out.put(features(source_of(source_of().x + step), backbone_of(module)).x.tolist())  # type: ignore[attr-defined]


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    queues = [context.SimpleQueue() for _ in range(2)]
    processes = [context.Process(target=_compute, args=(str(tmp_path), queue)) for queue in queues]
    for process in processes:
        process.start()
    answers = [[queue.get() for _ in range(20)] for queue in queues]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert answers[0] == answers[1]
    names = sorted(file.name for file in (tmp_path / "features").iterdir())
    assert len(names) == 20
    assert all(name.endswith(".safetensors") and not name.startswith(".") for name in names)
