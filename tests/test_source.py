from __future__ import annotations

import numpy as np
import pytest
import torch

from metafit.data import Source
from metafit.errors import BadInput


def make(count: int = 10, each: int = 3, **changes) -> Source:
    names = tuple(f"class {c:02d}" for c in range(count))
    fields = {
        "name": "toy",
        "x": torch.arange(count * each, dtype=torch.float32)[:, None],
        "y": torch.arange(count).repeat_interleave(each),
        "classes": names,
        "modality": "vector",
    }
    return Source(**{**fields, **changes})


def test_counts_and_length():
    source = make(3, y=torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2]))
    assert len(source) == 9
    assert source.counts.tolist() == [4, 3, 2]


def test_subset_reindexes_in_the_order_given_and_keeps_rows_together():
    source = make(4, each=2, domains=("a", "a", "b", "b"), raw=[f"item {i}" for i in range(8)])
    part = source.subset([3, 1])
    assert part.classes == ("class 03", "class 01")
    assert part.domains == ("b", "a")
    assert part.y.tolist() == [1, 1, 0, 0]
    assert part.x[:, 0].tolist() == [2, 3, 6, 7]
    assert part.raw == ["item 2", "item 3", "item 6", "item 7"]
    for bad in ([0, 0], [0, 4], [-1, 0]):
        with pytest.raises(BadInput, match="distinct and from 0 to 3"):
            source.subset(bad)


def test_subset_of_texts_and_of_a_pytree():
    texts = make(3, each=1, x=["a", "b", "c"], modality="text").subset([0, 2])
    assert texts.x == ["a", "c"]
    tokens = {"ids": torch.arange(6).view(3, 2), "mask": torch.ones(3, 2)}
    assert make(3, each=1, x=tokens).subset([2, 1]).x["ids"].tolist() == [[2, 3], [4, 5]]


def test_split_is_the_documented_permutation():
    source = make(20, each=1)
    order = np.random.default_rng(7).permutation(20)
    train, validation, test = source.split(seed=7)
    assert [len(part.classes) for part in (train, validation, test)] == [12, 3, 5]
    expected = [source.classes[i] for i in order]
    assert [*train.classes, *validation.classes, *test.classes] == expected


def test_split_depends_on_names_not_on_their_order():
    source = make(20, each=1)
    shuffled = source.subset(np.random.default_rng(1).permutation(20).tolist())
    for a, b in zip(source.split(), shuffled.split(), strict=True):
        assert a.classes == b.classes


@pytest.mark.parametrize(("classes", "sizes"), [(77, [46, 12, 19]), (43, [26, 6, 11]), (200, [120, 30, 50])])
def test_split_sizes_of_the_benchmarks(classes, sizes):
    assert [len(part.classes) for part in make(classes, 1).split()] == sizes


def test_split_by_domain_takes_sorted_domains_whole():
    domains = tuple(f"domain {c % 10}" for c in range(150))
    train, validation, test = make(150, 1, domains=domains).split(by_domain=True)
    assert sorted(set(train.domains)) == [f"domain {d}" for d in range(6)]
    assert set(validation.domains) == {"domain 6"}
    assert sorted(set(test.domains)) == ["domain 7", "domain 8", "domain 9"]
    with pytest.raises(BadInput, match="no domains"):
        make().split(by_domain=True)


def test_split_without_validation_and_with_too_few_classes():
    train, validation, test = make(5).split(validation=0)
    assert (len(train.classes), validation, len(test.classes)) == (3, None, 2)
    with pytest.raises(BadInput, match="5 classes split into 3 for training, 1 for validation and 1 for testing"):
        make(5).split()
    with pytest.raises(BadInput, match="leave some classes"):
        make(5).split(train=0.9, validation=0.1)


def test_with_x_keeps_what_a_person_can_look_at():
    texts = make(2, each=1, x=["hello", "bye"], modality="text")
    features = texts.with_x(torch.zeros(2, 4), "vector")
    assert (features.modality, features.raw) == ("vector", ["hello", "bye"])
    assert features.with_x(torch.ones(2, 1)).raw == ["hello", "bye"]


def test_digest_is_of_the_content(tmp_path):
    source = make()
    assert source.digest() == make(name="other name").digest()
    assert source.digest() != make(x=source.x + 1).digest()
    assert source.digest() != make(x=source.x.double()).digest()
    words = make(2, 1, x=["ab", "c"], modality="text").digest()
    assert words != make(2, 1, x=["a", "bc"], modality="text").digest()
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(b"1")
    before = make(2, 1, x=files, modality="image").digest()
    files[1].write_bytes(b"2")
    assert before != make(2, 1, x=files, modality="image").digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": torch.arange(10).repeat_interleave(3) + 1}, "class index 10 in data row 28 is not from 0 to 9"),
        ({"y": torch.zeros(30)}, "y must be int64"),
        ({"y": torch.zeros(29, dtype=torch.int64)}, "x has 30 examples and y has 29"),
        ({"raw": ["x"]}, "x has 30/1 examples"),
        ({"y": torch.zeros(30, dtype=torch.int64)}, "'class 01' has no examples"),
        ({"classes": ("only",), "y": torch.zeros(30, dtype=torch.int64)}, "1 class \\('only'\\), at least 2"),
        ({"classes": ("twice",) * 10}, "two classes are called 'twice'"),
        ({"modality": "sound"}, "modality 'sound'"),
        ({"domains": ("a",)}, "1 domains for 10 classes"),
        ({"x": torch.full((30, 2), torch.nan)}, "data row 1 is missing or infinite \\(30 such rows\\)"),
    ],
)
def test_bad_sources_are_refused(changes, message):
    with pytest.raises(BadInput, match=message) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)


def test_a_single_infinite_feature_is_named():
    x = torch.zeros(30, 3)
    x[16, 2] = torch.inf
    with pytest.raises(BadInput, match="data row 17"):
        make(x=x)
