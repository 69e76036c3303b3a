"""Learners that read the support set as a sequence or as a set: MANN, SNAIL and CAML."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafit.data import Source, TaskSampler, packaged
from metafit.evaluation import evaluate
from metafit.learners import Learner, build
from metafit.learners.caml import ContextAwareLearner, elmes
from metafit.learners.mann import FAINT, MemoryLearner, least_used
from metafit.learners.snail import GatedConvolution, SnailLearner
from metafit.task import Examples
from metafit.training import meta_train

N, DIM, WAY = 9, 5, 3


@pytest.fixture
def support(double: None) -> Examples:
    return Examples(torch.randn(N, DIM), torch.arange(N) % WAY, torch.ones(N))


def answers(learner: Learner, examples: Examples, x: Tensor) -> Tensor:
    with torch.no_grad():
        return learner.eval().predict(learner.adapt(examples), x)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def paper(learner: MemoryLearner, x: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Santoro et al., eq. 2-8, slot by slot and head by head."""
    weights = {name: p.detach().numpy() for name, p in learner.named_parameters()}
    slots, heads, size = learner.memory
    beta, alpha = np.exp(weights["log_sharpness"]), weights["gate"]
    memory, usage = np.zeros((slots, size)), np.zeros(slots)
    hidden, cell, found = np.zeros(learner.width), np.zeros(learner.width), np.zeros((heads, size))
    reading = np.zeros((heads, slots))

    def controller(x: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inputs = np.concatenate([x, label, found.ravel(), hidden])
        i, f, o, g = np.split(weights["lstm.weight"] @ inputs + weights["lstm.bias"], 4)
        new_cell = sigmoid(f + 1) * cell + sigmoid(i) * np.tanh(g)
        new_hidden = sigmoid(o) * np.tanh(new_cell)
        keys = weights["key.weight"] @ new_hidden + weights["key.bias"]
        return new_hidden, new_cell, keys.reshape(heads, size)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.sqrt((a @ a + FAINT) * (b @ b + FAINT)))

    def attend(keys: np.ndarray) -> np.ndarray:
        scores = np.exp([[beta * cosine(k, row) for row in memory] for k in keys])
        return scores / scores.sum(1, keepdims=True)

    for example, label in zip(x, labels, strict=True):
        hidden, cell, keys = controller(example, label)
        idle = np.argsort(usage, kind="stable")[:heads]
        writing = np.zeros((heads, slots))
        for h in range(heads):
            for i in range(slots):
                writing[h, i] = sigmoid(alpha[h]) * reading[h, i] + (1 - sigmoid(alpha[h])) * (i == idle[h])
        memory[idle] = 0
        for h in range(heads):
            for i in range(slots):
                memory[i] += writing[h, i] * keys[h]
        reading = attend(keys)
        found = np.array([sum(reading[h, i] * memory[i] for i in range(slots)) for h in range(heads)])
        usage = learner.decay * usage + reading.sum(0) + writing.sum(0)
    outputs = []
    for query in asked:
        h, _, keys = controller(query, np.zeros_like(labels[0]))
        r = attend(keys) @ memory
        outputs.append(weights["out.weight"] @ np.concatenate([h, r.ravel()]) + weights["out.bias"])
    return np.array(outputs)


@pytest.mark.parametrize("way", [WAY, None])
def test_the_memory_is_the_papers(support: Examples, way: int | None) -> None:
    """More examples than slots, so that slots are emptied and used again."""
    learner = MemoryLearner(nn.Identity(), DIM, way, 2, width=7, slots=5, size=4, heads=2, decay=0.8, sharpness=3.0)
    nn.init.normal_(learner.gate)
    known, asked = support, torch.randn(4, DIM)
    labels = np.eye(WAY)[known.y.numpy()]
    if way is None:
        labels = np.random.default_rng(0).normal(size=(N, 2))
        known = known._replace(y=torch.from_numpy(labels))
    expected = paper(learner, known.x.numpy(), labels, asked.numpy())
    torch.testing.assert_close(answers(learner, known, asked), torch.from_numpy(expected))


def test_each_head_has_a_slot_of_the_least_used() -> None:
    found = least_used(torch.tensor([0.3, 0.0, 0.2, 0.0]), 3)
    assert found.nonzero()[:, 1].tolist() == [1, 3, 2]


@pytest.mark.parametrize("name", ["mann", "snail"])
def test_padding_anywhere_changes_nothing(support: Examples, name: str) -> None:
    learner, x = build(name, DIM, WAY), torch.randn(4, DIM)
    kept = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    padded = support._replace(weight=kept.double())
    fewer = Examples(support.x[kept], support.y[kept], torch.ones(5))
    torch.testing.assert_close(answers(learner, padded, x), answers(learner, fewer, x))


@pytest.mark.parametrize("name", ["mann", "snail"])
def test_the_order_matters(support: Examples, name: str) -> None:
    learner, x = build(name, DIM, WAY), torch.randn(4, DIM)
    turned = Examples(*(leaf.flip(0) for leaf in support))
    assert (answers(learner, turned, x) - answers(learner, support, x)).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["mann", "snail", "caml"])
def test_a_query_says_nothing_about_another(support: Examples, name: str) -> None:
    learner, x = build(name, DIM, WAY), torch.randn(4, DIM)
    alone = torch.cat([answers(learner, support, one[None]) for one in x])
    torch.testing.assert_close(answers(learner, support, x), alone)


def snail(**options: Any) -> SnailLearner:
    made = build("snail", DIM, WAY, length=16, filters=4, width=6, **options)
    assert isinstance(made, SnailLearner)
    return made


def test_nothing_is_told_by_what_comes_later(support: Examples) -> None:
    learner, cut = snail(), 5
    changed = support._replace(x=torch.cat([support.x[:cut], torch.randn(N - cut, DIM)]), y=support.y.roll(1))
    changed.y[:cut] = support.y[:cut]
    with torch.no_grad():
        before, after = (learner.adapt(examples)["states"] for examples in (support, changed))
    assert len(before) > 3
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:cut], new[:cut])
        assert (old[cut:] != new[cut:]).any(-1).all()


def test_a_query_is_one_more_position(support: Examples) -> None:
    """What ``predict`` makes of a query alone is what the whole sequence, with it at its end, says there."""
    learner, query = snail(), torch.randn(1, DIM)
    labels = torch.cat([F.one_hot(support.y, WAY), torch.zeros(1, WAY)])
    x = torch.cat([learner.body(torch.cat([support.x, query])), labels], 1)
    with torch.no_grad():
        x = learner.token(x)
        for block in learner.blocks:
            x = block(x, torch.arange(N + 1), x, torch.ones(N + 1, dtype=torch.bool))
    torch.testing.assert_close(answers(learner, support, query), learner.out(x[-1:]).detach())


def test_a_sequence_may_be_longer_than_expected(support: Examples) -> None:
    learner = build("snail", DIM, WAY, length=2)
    assert answers(learner, support, torch.randn(4, DIM)).isfinite().all()


@pytest.mark.parametrize("dilation", [1, 2, 16])
def test_the_convolution_is_torchs(double: None, dilation: int) -> None:
    block, x = GatedConvolution(DIM, 3, dilation), torch.randn(N, DIM)
    kernel = torch.stack([block.before.weight, block.now.weight], -1)
    value, gate = F.conv1d(F.pad(x.T, (dilation, 0)), kernel, block.now.bias, dilation=dilation).T.chunk(2, -1)
    expected = torch.cat([x, value.tanh() * gate.sigmoid()], -1)
    torch.testing.assert_close(block(x, torch.arange(N), x, torch.ones(N, dtype=torch.bool)), expected)


@pytest.mark.parametrize("way", [2, 3, 8])
def test_codes_are_the_corners_of_a_simplex(double: None, way: int) -> None:
    expected = torch.full((way, way), -1 / (way - 1)).fill_diagonal_(1)
    torch.testing.assert_close(elmes(way) @ elmes(way).T, expected)


def test_caml_knows_no_order_and_no_names(support: Examples) -> None:
    """Any order of the examples, any permutation of the classes, one of which is absent."""
    learner, x = build("caml", DIM, WAY + 1), torch.randn(6, DIM)
    assert isinstance(learner, ContextAwareLearner)
    expected = answers(learner, support, x)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        order, names = torch.randperm(N, generator=generator), torch.randperm(WAY + 1, generator=generator)
        turned = Examples(support.x[order], names[support.y[order]], support.weight)
        torch.testing.assert_close(answers(learner, turned, x)[:, names], expected)


@pytest.mark.parametrize(
    ("name", "options", "margin"),
    [
        ("mann", {"width": 64, "slots": 16, "size": 16}, 0.1),
        ("snail", {"length": 16, "filters": 16, "width": 32}, 0.15),
        ("caml", {"width": 64, "layers": 2}, 0.15),
    ],
)
def test_it_learns_to_learn_new_digits(name: str, options: dict[str, Any], margin: float) -> None:
    """Trained on seven digits, it tells the other three apart."""
    torch.manual_seed(0)
    digits = packaged.load("digits")
    x = digits.x.flatten(1).float() / 255
    splits = Source("digits", x - x.mean(0), digits.y, digits.classes, "vector").split(validation=0, seed=0)
    learner = build(name, 64, 3, **options)
    unseen = TaskSampler(splits.test, 3, 3, 10, 50, seed=1)

    def accuracy() -> float:
        return float(evaluate(learner, unseen, 100, show_progress=False).metrics()["accuracy"]["mean"])

    before = accuracy()
    meta_train(learner, TaskSampler(splits.train, 3, 3, 5, 16, seed=0), steps=200, rate=3e-3, show_progress=False)
    assert accuracy() > before + margin
