"""The forest that the in-context learner reads: against trees grown one by one, what it does not depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metafit.learners import parts
from metafit.learners.forest import CUTS, DEPTH, LEFT_OUT, PRIOR, TREES, forest

ROWS, COLUMNS, SLOTS = 40, 6, 3


@pytest.fixture
def table() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, one-hot labels, what each column tells (the last one: it does not vary), queries."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    rows[:, -1] = 0
    labels = torch.eye(SLOTS, dtype=torch.float64)[(rows[:, 0] > 0).long() + (rows[:, 1] > 0.5).long()]
    told = torch.tensor([0.5, 0.4, 0.1, 0.1, 0.1, 0.0], dtype=torch.float64)
    return rows, labels, told, torch.randn(7, COLUMNS, generator=generator, dtype=torch.float64)


def one_by_one(rows: np.ndarray, labels: np.ndarray, varying: int, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same by recursion, a tree and a node at a time: what queries are told, and each row out of bag."""
    chance = np.random.default_rng(0)
    turn = chance.standard_normal((TREES, rows.shape[1]))
    which, where = chance.random((2, TREES, 2**DEPTH - 1, CUTS))
    share = labels.mean(0)

    def impurity(kept: np.ndarray) -> float:
        counts = labels[kept].sum(0)
        return 0.0 if not kept.any() else float(counts.sum() * (1 - ((counts / counts.sum()) ** 2).sum()))

    def say(tree: int, node: int, kept: np.ndarray, row: np.ndarray) -> np.ndarray:
        if node < 2**DEPTH - 1:
            options = []
            for column, place in zip((which[tree, node] * varying).astype(int), where[tree, node], strict=True):
                values = rows[kept, column]
                cut = values.min() + place * (values.max() - values.min())
                beyond = kept & (rows[:, column] > cut)
                options.append((impurity(beyond) + impurity(kept & ~beyond), column, cut, beyond))
            least, column, cut, beyond = min(options, key=lambda option: option[0])
            if least < impurity(kept) - 1e-9:
                right = row[column] > cut
                return say(tree, 2 * node + 1 + int(right), beyond if right else kept & ~beyond, row)
        counts = labels[kept].sum(0)
        return (counts + PRIOR * share) / (counts.sum() + PRIOR)

    seen = [np.argsort(np.argsort(rows @ turn[t], kind="stable")) % LEFT_OUT != t % LEFT_OUT for t in range(TREES)]
    told = np.array([np.mean([say(t, 0, seen[t], row) for t in range(TREES)], 0) for row in asked])
    unseen = [np.mean([say(t, 0, seen[t], rows[n]) for t in range(TREES) if not seen[t][n]], 0) for n in range(ROWS)]
    return told, np.array(unseen)


def test_it_is_the_trees_grown_one_by_one(table: tuple[Tensor, ...]) -> None:
    rows, labels, told, queries = table
    grown, out_of_bag = forest(rows, labels, told)
    expected, unseen = one_by_one(rows.numpy(), labels.numpy(), COLUMNS - 1, queries.numpy())
    np.testing.assert_allclose(grown.of(queries), expected, atol=1e-12)
    np.testing.assert_allclose(out_of_bag, unseen, atol=1e-12)


def test_order_and_padding_do_not_matter_nor_do_parts(table: tuple[Tensor, ...], monkeypatch: Any) -> None:
    rows, labels, told, queries = table
    grown, out_of_bag = forest(rows, labels, told)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    padded = torch.cat([rows[order], 9 * torch.ones(5, COLUMNS, dtype=torch.float64)])
    zeros = torch.zeros(5, SLOTS, dtype=torch.float64)
    again, unseen = forest(padded, torch.cat([labels[order], zeros]), told)
    torch.testing.assert_close(again.of(queries), grown.of(queries))
    torch.testing.assert_close(unseen[:ROWS], out_of_bag[order])
    whole = grown.of(queries)
    monkeypatch.setattr(parts, "HELD", 3 * ROWS * CUTS)
    pieces, unseen = forest(rows, labels, told)
    torch.testing.assert_close(pieces.of(queries), whole)
    monkeypatch.setattr(parts, "HELD", 2 * TREES * SLOTS)  # two queries
    torch.testing.assert_close(grown.of(queries), whole)
    torch.testing.assert_close(unseen, out_of_bag)


def test_mapped_over_tasks(table: tuple[Tensor, ...]) -> None:
    rows, labels, told, queries = table
    both = torch.stack([rows, rows.flip(1).roll(-1, 1)])
    made = torch.vmap(lambda x: forest(x, labels, told)[0].of(queries))(both)
    for index in range(2):
        torch.testing.assert_close(made[index], forest(both[index], labels, told)[0].of(queries))


def test_it_finds_a_rule_that_no_line_shows() -> None:
    """One column of twelve decides, by whether it is near 0."""
    generator = torch.Generator().manual_seed(0)
    rows, queries = (torch.randn(count, 12, generator=generator) for count in (120, 400))

    def near(x: Tensor) -> Tensor:
        return (x[:, 0].abs() < 0.67).long()

    grown, out_of_bag = forest(rows, torch.eye(2)[near(rows)], torch.ones(12))
    assert (grown.of(queries).argmax(-1) == near(queries)).double().mean() > 0.8
    assert (out_of_bag.argmax(-1) == near(rows)).double().mean() > 0.7  # by fewer trees, that saw fewer rows


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_rows(count: int) -> None:
    rows, labels = torch.randn(count, 2, generator=torch.Generator().manual_seed(0)), torch.eye(3)[:count]
    grown, out_of_bag = forest(rows, labels, torch.ones(2))
    for said in (grown.of(torch.zeros(1, 2)), out_of_bag):
        torch.testing.assert_close(said.sum(-1), torch.ones(len(said)))
