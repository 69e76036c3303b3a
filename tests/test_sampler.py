"""Tasks are drawn fairly, and the task of a (seed, index) is always the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from metafit.data import Sinusoids, Source, TaskSampler
from metafit.data.randomness import below, derive, keys, mix, sample_distinct, uniform
from metafit.errors import BadInput
from metafit.task import Task

ALMOST_NEVER = 1e-4  # the tests are seeded: a p-value below it is a fault, not bad luck


def source_of(counts: Sequence[int] = (20,) * 10, dtype: torch.dtype = torch.float32) -> Source:
    """Each example's feature is its row number; classes are interleaved."""
    y = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    y = y[torch.from_numpy(np.random.default_rng(0).permutation(len(y)))]
    x = torch.arange(len(y), dtype=dtype)[:, None]
    return Source("numbers", x, y, tuple(f"class {c}" for c in range(len(counts))), "vector")


def uniformly(counts: torch.Tensor) -> bool:
    return bool(chisquare(counts.double().flatten().numpy()).pvalue > ALMOST_NEVER)


# -- the same numbers, by plain Python integers

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def slow_mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def slow_derive(key: int, stream: int) -> int:
    return slow_mix((key + (stream + 1) * GOLDEN) & MASK)


def slow_key(seed: int, index: int) -> int:
    return slow_mix((slow_mix((seed * GOLDEN + GOLDEN) & MASK) + index * GOLDEN) & MASK)


def slow_below(key: int, n: int) -> int:
    return (key >> 33) * n >> 31


def slow_distinct(key: int, n: int, k: int) -> list[int]:
    chosen: list[int] = []
    for i, top in enumerate(range(n - min(n, k), n)):
        drawn = slow_below(slow_derive(key, 2 * i), top + 1)
        chosen.append(top if drawn in chosen else drawn)
    order = sorted(range(len(chosen)), key=lambda i: slow_derive(key, 2 * i + 1) >> 1)
    return [chosen[i] for i in order]


def test_splitmix_matches_its_reference() -> None:
    """The first outputs of SplitMix64 from state 0, in the authors' C code."""
    state, outputs = 0, []
    for _ in range(3):
        state = (state + GOLDEN) & MASK
        outputs.append(slow_mix(state))
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    states = torch.tensor([GOLDEN * i & MASK for i in (1, 2, 3)], dtype=torch.uint64).view(torch.int64)
    assert [v & MASK for v in mix(states).tolist()] == outputs


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (0, 7), (12345, 1), (-3, 99), (2**62, 10**9)])
def test_a_draw_by_hand(seed: int, index: int) -> None:
    counts = [9, 4, 30, 6, 12]
    source, (way, shot, query) = source_of(counts), (3, 2, 4)
    draw = TaskSampler(source, (2, way), (1, shot), query, seed=seed, balanced=False).indices(index, index + 1)
    key = slow_key(seed, index)
    classes = slow_distinct(slow_derive(key, 0), 5, way)
    assert draw.classes[0].tolist() == classes
    ways = 2 + slow_below(slow_derive(key, 1), 2)
    for slot, c in enumerate(classes):
        own = slow_derive(slow_derive(key, 2), slot)
        shots = 1 + slow_below(slow_derive(own, 3), 2)
        picks = slow_distinct(slow_derive(own, 4), counts[c], shot + query)
        rows = [int(torch.nonzero(source.y == c)[p, 0]) for p in picks]
        there = len(picks) - shot
        assert draw.support[0, slot].tolist() == rows[:shot]
        assert draw.query[0, slot, :there].tolist() == rows[shot:]
        assert draw.in_support[0, slot].tolist() == [slot < ways and i < shots for i in range(shot)]
        assert draw.in_query[0, slot].tolist() == [slot < ways and i < there for i in range(query)]


@settings(max_examples=200, deadline=None)
@given(key=st.integers(-(2**63), 2**63 - 1), n=st.integers(0, 40), k=st.integers(1, 30))
def test_distinct_samples(key: int, n: int, k: int) -> None:
    values, exists = sample_distinct(torch.tensor([key]), n, k)
    there = values[exists].tolist()
    assert len(there) == min(n, k) == len(set(there)) and all(0 <= v < n for v in there)
    assert exists[0, : min(n, k)].all(), "those that exist come first"
    assert not values[~exists].any()
    assert there == slow_distinct(key & MASK, n, k)


@settings(max_examples=100, deadline=None)
@given(key=st.integers(-(2**63), 2**63 - 1), n=st.integers(1, 2**31 - 1), stream=st.integers(0, 10**6))
def test_hashes_match_plain_integers(key: int, n: int, stream: int) -> None:
    tensor = torch.tensor([key])
    assert int(derive(tensor, stream)) & MASK == slow_derive(key & MASK, stream)
    assert int(derive(tensor, torch.tensor([stream]))) & MASK == slow_derive(key & MASK, stream)
    assert int(below(tensor, n)) == slow_below(key & MASK, n) < n
    assert float(uniform(tensor, 0.0, 1.0)) == ((key & MASK) >> 40) / 2**24 < 1


@pytest.mark.parametrize(("n", "k"), [(5, 2), (5, 5), (9, 4)])
def test_samples_are_uniform_over_ordered_choices(n: int, k: int) -> None:
    """Every ordered choice is as likely as any other: values, pairs and positions at once."""
    values = torch.from_numpy(sample_distinct(keys(3, np.arange(60_000)), n, k)[0])
    code = (values * n ** torch.arange(k)).sum(-1)
    seen, counts = code.unique(return_counts=True)
    assert len(seen) == math.perm(n, k) and uniformly(counts)


# -- tasks


def parts(sampler: TaskSampler, start: int, stop: int) -> list[torch.Tensor]:
    task = sampler.tasks(start, stop)
    return [leaf for part in task for leaf in part]


def test_the_task_of_a_seed_and_index_is_always_the_same() -> None:
    source = source_of()
    samplers = [TaskSampler(source, (2, 5), (1, 3), 4, batch=b, seed=5) for b in (1, 4, 16)]
    whole = parts(samplers[0], 0, 16)
    for sampler in samplers:
        batches = [sampler.draw(i) for i in range(16 // sampler.batch)]
        joined = [torch.cat([b[p][f] for b in batches]) for p in range(2) for f in range(3)]
        assert all(torch.equal(a, b) for a, b in zip(whole, joined, strict=True))
    assert all(torch.equal(a[7:9], b) for a, b in zip(whole, parts(samplers[1], 7, 9), strict=True))
    other = parts(TaskSampler(source, (2, 5), (1, 3), 4, seed=6), 0, 16)
    assert not torch.equal(whole[0], other[0])


def test_seeds_and_indices_do_not_overlap() -> None:
    """Seed s and index i + 1 is not seed s + 1 and index i: a validation stream does not repeat the training's."""
    all_keys = torch.cat([keys(seed, torch.arange(1000)) for seed in range(20)])
    assert len(all_keys.unique()) == len(all_keys)


def test_labels_match_and_no_example_comes_twice() -> None:
    source = source_of([7, 12, 30, 9, 8, 15])
    task = TaskSampler(source, (2, 4), (1, 3), 5, seed=1, balanced=False).tasks(0, 500)
    draw = TaskSampler(source, (2, 4), (1, 3), 5, seed=1, balanced=False).indices(0, 500)
    for t in range(500):
        rows = []
        for part in task:
            kept = part.weight[t] > 0
            rows += part.x[t, kept, 0].long().tolist()
            assert torch.equal(source.y[part.x[t, kept, 0].long()], draw.classes[t, part.y[t, kept]])
        assert len(rows) == len(set(rows)), "support and query share no example"
        assert task.support.y[t][task.support.weight[t] > 0].unique().tolist() == list(
            range(int(draw.in_support[t].any(-1).sum()))
        ), "classes that are present are numbered from 0"


def test_classes_examples_and_positions_are_uniform() -> None:
    source = source_of((12,) * 8)
    draw = TaskSampler(source, 3, 2, 3, seed=2).indices(0, 20_000)
    for slot in range(3):
        assert uniformly(draw.classes[:, slot].bincount(minlength=8))
    pairs = draw.classes[:, 0] * 8 + draw.classes[:, 1]
    assert uniformly(pairs.bincount(minlength=64).view(8, 8)[~torch.eye(8, dtype=torch.bool)])
    for rows in (draw.support, draw.query):
        for position in range(rows.shape[-1]):
            assert uniformly(rows[..., position].flatten().bincount(minlength=96))
    # an example's class and its place in the support set say nothing of each other
    places = torch.stack([draw.support[:, s, 0].bincount(minlength=96) for s in range(3)])
    assert uniformly(places)


def test_ranges_of_ways_and_shots() -> None:
    source = source_of()
    draw = TaskSampler(source, (2, 5), (1, 4), 3, seed=3).indices(0, 8000)
    ways, shots = draw.in_support.any(-1).sum(-1), draw.in_support.sum(-1)
    assert uniformly(ways.bincount(minlength=6)[2:]) and int(ways.min()) == 2
    assert torch.equal(draw.in_query.any(-1), draw.in_support.any(-1))
    assert uniformly(shots[:, 0].bincount(minlength=5)[1:])
    balanced = torch.where(shots > 0, shots, shots[:, :1]) == shots[:, :1]
    assert balanced.all()
    unbalanced = TaskSampler(source, 5, (1, 4), 3, seed=3, balanced=False).indices(0, 8000).in_support.sum(-1)
    assert uniformly(unbalanced.flatten().bincount(minlength=5)[1:])
    pairs = (unbalanced[:, 0] - 1) * 4 + unbalanced[:, 1] - 1
    assert uniformly(pairs.bincount(minlength=16)), "classes have their shots independently"


def test_padding_of_the_whole_task() -> None:
    sampler = TaskSampler(source_of([4, 3, 20]), 3, 2, 6, seed=0)
    task = sampler.tasks(0, 20)
    assert task.support.x.shape == (20, 6, 1) and task.query.x.shape == (20, 18, 1)
    draw = sampler.indices(0, 20)
    for t in range(20):
        for slot in range(3):
            left = min(6, [4, 3, 20][int(draw.classes[t, slot])] - 2)
            assert task.query.weight[t].view(3, 6)[slot].tolist() == [1.0] * left + [0.0] * (6 - left)
    assert (task.support.weight == 1).all()


def test_inputs_of_any_kind() -> None:
    source = source_of(dtype=torch.float64)
    assert TaskSampler(source).tasks(0, 1).support.x.dtype == torch.float64
    x = {"ids": source.x.long(), "mask": source.x > 3}
    task = TaskSampler(source.with_x(x, "vector"), 3, 1, 2).tasks(0, 4)
    assert task.support.x["ids"].shape == (4, 3, 1) and task.query.x["mask"].dtype == torch.bool
    assert torch.equal(task.query.x["mask"], task.query.x["ids"] > 3)


def test_tasks_of_split_classes_are_disjoint() -> None:
    source, seen = source_of((6,) * 30), []
    for part in source.split(seed=1):
        assert part is not None
        task = TaskSampler(part, 2, 1, 2).tasks(0, 200)
        seen.append(set(source.y[torch.cat([task.support.x, task.query.x], 1).long().flatten()].tolist()))
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert len(seen[0] | seen[1] | seen[2]) == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"way": 11}, "way 11: source 'numbers' has 10 classes here; ask for 10 or fewer"),
        ({"way": 1}, "way 1: needs 2 or more"),
        ({"way": (4, 2)}, r"way \(4, 2\): needs 2 or more"),
        ({"way": "five"}, "way 'five': needs a whole number"),
        ({"shot": 0}, "shot 0: needs 1 or more"),
        ({"shot": 2.5}, "shot 2.5: needs a whole number"),
        ({"shot": 20}, r"class 'class 0' of source 'numbers' has 20 example\(s\), 20-shot tasks need 21"),
        ({"query": 0}, "query 0: needs at least 1"),
        ({"batch": 0}, "batch 0: needs at least 1"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        TaskSampler(source_of(), **options)


def test_raw_items_are_no_tasks() -> None:
    raw = Source("words", ["a", "b", "c"], torch.tensor([0, 1, 1]), ("x", "y"), "text")
    with pytest.raises(BadInput, match="holds raw text: embed or preprocess"):
        TaskSampler(raw, 2, 1, 1)


# -- sinusoids


def test_sinusoids() -> None:
    tasks = Sinusoids(shot=10, query=20, seed=1, frequency=(0.8, 1.2))
    task = tasks.tasks(0, 3000)
    x = torch.cat([task.support.x, task.query.x], 1).double()
    y = torch.cat([task.support.y, task.query.y], 1).double()
    assert uniformly(torch.histc(x.float(), 20, -5, 5)) and float(x.min()) >= -5 and float(x.max()) < 5
    # a·sin(ωx + φ) is linear in (a cos φ, a sin φ) once ω is known: one fit explains support and query alike
    found = []
    for t in range(40):
        errors = []
        for omega in torch.linspace(0.8, 1.2, 401, dtype=torch.float64):
            basis = torch.cat([(omega * x[t]).sin(), (omega * x[t]).cos()], 1)
            solution = torch.linalg.lstsq(basis[:10], y[t, :10]).solution
            errors.append(((basis @ solution - y[t])[10:].square().mean().item(), omega.item(), solution[:, 0]))
        error, omega, (cosine, sine) = min(errors, key=lambda e: e[0])
        amplitude, phase = math.hypot(cosine, sine), math.atan2(sine, cosine)
        assert error < 1e-3 * amplitude**2 and 0.1 - 1e-2 <= amplitude <= 5.1 and -0.05 <= phase <= math.pi + 0.05
        found.append((amplitude, omega, phase))
    spread = np.ptp(np.array(found), axis=0)
    assert (spread > np.array([3.5, 0.3, 2.2])).all(), "amplitudes, frequencies and phases cover their intervals"


def test_sinusoids_are_the_same_in_any_batch() -> None:
    whole = Sinusoids(batch=4).tasks(0, 8)
    for i in range(2):
        part: Task = Sinusoids(batch=4).draw(i)
        assert torch.equal(part.query.y, whole.query.y[4 * i : 4 * i + 4])
    assert not torch.equal(whole.query.y, Sinusoids(seed=1).tasks(0, 8).query.y)
    assert not torch.equal(whole.query.x[0], whole.query.x[1])
