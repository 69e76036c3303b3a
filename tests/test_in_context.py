"""The in-context learner for rows: opinions against direct formulas, what it does not depend on, its size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import metafit.learners
from metafit.apps import FewShotClassifier
from metafit.bench.memory import peak
from metafit.data import SyntheticTables
from metafit.data.keel import parse
from metafit.errors import BadInput
from metafit.learners import attention, build, opinions, parts
from metafit.learners.attention import Attention
from metafit.learners.opinions import RIDGES
from metafit.task import Examples, weights

ROWS, COLUMNS, SLOTS = 14, 5, 3


@pytest.fixture
def table() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, one-hot labels, what each column tells, queries."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    labels = torch.eye(SLOTS, dtype=torch.float64)[torch.arange(ROWS) % SLOTS]
    told = torch.rand(COLUMNS, generator=generator, dtype=torch.float64)
    return rows, labels, told, torch.randn(4, COLUMNS, generator=generator, dtype=torch.float64)


def test_ridges_are_those_of_scikit_learn_with_and_without_each_row(table: tuple[Tensor, ...]) -> None:
    from sklearn.kernel_ridge import KernelRidge

    rows, labels, told, queries = table
    known, own = opinions.opinions(rows, labels, told)
    asked = known.of(queries)
    centred = (labels - labels.mean(0)).numpy()
    for i, (which, penalty) in enumerate(RIDGES):
        share = known.shares[which]

        def fit(keep: np.ndarray, share: Tensor = share, penalty: float = penalty) -> KernelRidge:
            scaled = (rows * share.sqrt()).numpy()
            return KernelRidge(alpha=penalty).fit(scaled[keep], centred[keep])

        everyone = fit(np.arange(ROWS))
        np.testing.assert_allclose(asked[:, i], everyone.predict((queries * share.sqrt()).numpy()), atol=1e-10)
        for n in range(ROWS):
            others = fit(np.delete(np.arange(ROWS), n))
            np.testing.assert_allclose(
                own[n, i], others.predict((rows * share.sqrt()).numpy()[n : n + 1])[0], atol=1e-10
            )


def test_votes_and_densities_are_those_of_a_direct_loop(table: tuple[Tensor, ...]) -> None:
    rows, labels, told, queries = table
    known, own = opinions.opinions(rows, labels, told)
    y, told = labels.argmax(-1), told / (1.05 - told)
    shares = (torch.full((COLUMNS,), 1 / COLUMNS, dtype=torch.float64), told / told.sum())

    def reach(share: Tensor) -> Tensor:
        apart = [[(share * (a - b) ** 2).sum() for b in rows] for a in rows]
        return torch.stack([min(d for j, d in enumerate(line) if j != i) for i, line in enumerate(apart)]).mean() + 1e-3

    def expected(query: Tensor, without: int | None) -> list[list[float]]:
        kept = [n for n in range(ROWS) if n != without]
        said = []
        for share in shares:
            vote = [torch.exp(-(share * (query - rows[n]) ** 2).sum() / reach(share)) for n in kept]
            said.append(
                [float(sum(v for v, n in zip(vote, kept, strict=True) if y[n] == s) / sum(vote)) for s in range(SLOTS)]
            )
        for share in shares:
            logs = []
            for s in range(SLOTS):
                of = [n for n in kept if y[n] == s]
                density = torch.stack([torch.exp(-2 * (query - rows[n]) ** 2) for n in of]).mean(0)
                logs.append((share * (density + 0.02).log()).sum() * COLUMNS**0.5)
            said.append(torch.stack(logs).softmax(0).tolist())
        return said

    for q, query in enumerate(queries):
        np.testing.assert_allclose(known.of(query[None])[0, 3:7], expected(query, None), atol=1e-10, err_msg=str(q))
    for n in range(ROWS):
        np.testing.assert_allclose(own[n, 3:7], expected(rows[n], n), atol=1e-10)


@pytest.fixture(scope="module")
def tables() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Support rows and classes, query rows and classes of tasks that the weights were not trained on."""
    found = []
    for index in range(12):
        support, query = SyntheticTables(batch=8, seed=7).draw(index)
        found += [(support.x[t].double(), support.y[t], query.x[t].double(), query.y[t]) for t in range(8)]
    return found


def test_units_and_orders_do_not_matter(tables: list[tuple[Tensor, ...]]) -> None:
    learner = build("in-context", 32, 10).double().eval()
    generator = torch.Generator().manual_seed(1)
    for x, y, query, _ in tables[::10]:
        x = x + 0.01 * torch.randn(x.shape, generator=generator)  # ties are broken by rounding
        expected = learner.predict(learner.adapt(Examples(x, y)), query)
        columns, rows = torch.randperm(32, generator=generator), torch.randperm(len(x), generator=generator)
        names = torch.randperm(10, generator=generator)
        unit, origin = torch.exp(torch.randn(32, generator=generator)), torch.randn(32, generator=generator)
        changed = ((z * unit + origin)[:, columns] for z in (x[rows], query))
        support, asked = changed
        found = learner.predict(learner.adapt(Examples(support, names[y[rows]])), asked)
        torch.testing.assert_close(found[:, names], expected, rtol=1e-6, atol=1e-6)


def test_the_shipped_weights_beat_the_untrained_network_and_logistic_regression(
    tables: list[tuple[Tensor, ...]],
) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    torch.manual_seed(0)
    learners = [build("in-context", 32, 10, pretrained=pretrained).double().eval() for pretrained in (True, False)]
    right: list[list[float]] = []
    for x, y, query, truth in tables:
        answers = [made.predict(made.adapt(Examples(x, y)), query).argmax(-1) for made in learners]
        scaler = StandardScaler().fit(x)
        answers.append(
            torch.from_numpy(LogisticRegression().fit(scaler.transform(x), y).predict(scaler.transform(query)))
        )
        right.append([float((answer == truth).double().mean()) for answer in answers])
    ours, untrained, logistic = np.mean(right, 0)
    assert ours > untrained + 0.005, (ours, untrained)
    assert ours > logistic + 0.01, (ours, logistic)


def test_more_classes_than_it_has_slots() -> None:
    """A hundred well-separated classes, where it was trained on ten."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(100, 12, generator=generator)
    y = torch.arange(100).repeat(3)
    x, query = (centres[y] + 0.05 * torch.randn(300, 12, generator=generator) for _ in range(2))
    names = np.array([f"class {c:03d}" for c in range(100)])
    model = FewShotClassifier(learner="in-context").fit(x.numpy(), names[y])
    assert model.score(query.numpy(), names[y]) > 0.95
    assert np.allclose(model.predict_proba(query.numpy()[:5]).sum(1), 1)


def test_attention_in_parts_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    attend = Attention(8, 2).double()
    queries, known, weight = torch.randn(7, 8).double(), torch.randn(5, 8).double(), torch.tensor([1.0, 1, 0, 1, 1])
    whole = attend(queries, known, known, weight.double())
    monkeypatch.setattr(attention, "SCORES", 2 * 5 * 3)
    torch.testing.assert_close(attend(queries, known, known, weight.double()), whole, rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # the fused kernel
        torch.testing.assert_close(attend(queries, known, known, weight.double()), whole, rtol=1e-12, atol=1e-12)


def test_memory_holds_no_matrix_of_all_pairs_of_rows() -> None:
    if peak(lambda: None) is None:
        pytest.skip("this system does not tell the memory of a process")
    learner = build("in-context", 10, 5).eval()

    def grows(rows: int) -> float:
        x, y = torch.randn(rows, 10), torch.arange(rows) % 5
        with torch.no_grad():
            return float(peak(lambda: learner.predict(learner.adapt(Examples(x, y)), x)) or 0)

    grows(1000)  # what is allocated once
    assert grows(4000) < 400e6  # scores of all pairs in four heads, and their softmax, would be 512 MB


def test_opinions_in_parts_are_the_whole(table: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels, told, queries = table
    known, own = opinions.opinions(rows, labels, told)
    whole = known.of(queries)
    monkeypatch.setattr(parts, "HELD", 3 * ROWS * COLUMNS)
    known, own_in_parts = opinions.opinions(rows, labels, told)
    torch.testing.assert_close(own_in_parts, own, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(known.of(queries), whole, rtol=1e-12, atol=1e-12)


def test_the_weights_are_small_and_of_one_size() -> None:
    path = Path(metafit.learners.__file__).parent / "in_context.safetensors"
    assert path.stat().st_size < 8e6
    with pytest.raises(BadInput, match=r"default width.*pretrained=False"):
        build("in-context", 8, 3, width=64)


def test_synthetic_tables_are_the_same_again_and_none_is_without_support() -> None:
    for index in range(30):
        first, again = (SyntheticTables(batch=4, seed=3).draw(index) for _ in range(2))
        assert all(torch.equal(a, b) for part in (0, 1) for a, b in zip(first[part], again[part], strict=True))
        assert first.support.x.isfinite().all() and (weights(first.support) == 1).all()
        for t in range(4):
            assert set(first.query.y[t].tolist()) <= set(first.support.y[t].tolist())
    assert not torch.equal(
        SyntheticTables(seed=1, batch=4).draw(0).support.x, SyntheticTables(seed=2, batch=4).draw(0).support.x
    )
    with pytest.raises(BadInput, match="ask for one"):
        SyntheticTables(batch=4).tasks(2, 6)


def test_plain_tables_are_read() -> None:
    text = "@relation t\n@data\nrow1, 1.5, a, yes\nrow2, 2.5, b, no\nrow3, ?, b, no\nrow4, 3.5, a, no\n"
    source = parse(text, "t", without=(0,))
    assert source.classes == ("no", "yes") and source.y.tolist() == [1, 0, 0]
    assert source.x.tolist() == [[1.5, 1.0, 0.0], [2.5, 0.0, 1.0], [3.5, 1.0, 0.0]]
    assert parse("1 2.0 x\n2 3.0 y", "s", without=(0,)).x.tolist() == [[2.0], [3.0]]
