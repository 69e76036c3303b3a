"""Meta-training without labels: where its tasks come from, the pretraining that feeds it, and what it gains."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metafit.apps.comparing import compare_learners
from metafit.apps.preparing import prepare
from metafit.apps.protocol import Protocol
from metafit.data import Source, Splits, TaskSampler, packaged
from metafit.data.clusters import cactus
from metafit.data.families import Families
from metafit.data.randomness import keys
from metafit.data.sampler import Tasks
from metafit.data.umtra import UMTRA
from metafit.data.views import Affine, Erase, Jitter, Marginal, drop_words, text_views
from metafit.errors import BadInput
from metafit.evaluation import evaluate
from metafit.learners import build
from metafit.task import Task
from metafit.training import meta_train, pretrain_alike, pretrain_denoising
from metafit.training.self_supervised import denoising, nt_xent, vicreg


def numbered(n: int = 60, dim: int = 3) -> Source:
    """Rows far apart: row i is i at every place, so that a view is told from any other row's."""
    x = torch.arange(n, dtype=torch.float32)[:, None].expand(n, dim).clone()
    return Source("numbers", x, torch.arange(n) % 4, tuple("abcd"), "vector")


def blobs(classes: int = 6, each: int = 30, seed: int = 0) -> Source:
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.eye(classes, 8)
    y = torch.arange(classes).repeat_interleave(each)
    x = centres[y] + torch.randn(len(y), 8, generator=generator)
    return Source("blobs", x, y, tuple(f"class {c}" for c in range(classes)), "vector")


def slightly(x: Tensor, key: Tensor) -> Tensor:
    return x + 0.25


def shuffled(source: Source) -> Source:
    return replace(source, y=source.y[torch.randperm(len(source), generator=torch.Generator().manual_seed(1))])


def same(a: Task, b: Task) -> bool:
    return all(torch.equal(p, q) for one, two in zip(a, b, strict=True) for p, q in zip(one, two, strict=True))


# -- UMTRA


def test_support_is_the_example_and_queries_are_views_of_it() -> None:
    task = UMTRA(numbered(), way=4, shot=2, query=3, batch=8, augment=[slightly]).draw(2)
    support, query = task.support.x[..., 0].view(8, 4, 2), task.query.x[..., 0].view(8, 4, 3)
    assert torch.equal(support[..., 0], support[..., 0].round()), "the first is the example as it is"
    assert torch.equal(support[..., 1], support[..., 0] + 0.25)
    assert torch.equal(query, support[..., :1].expand(8, 4, 3) + 0.25)
    assert torch.equal(task.query.y.view(8, 4, 3), torch.arange(4)[None, :, None].expand(8, 4, 3))
    assert all(len(set(row.tolist())) == 4 for row in support[..., 0]), "classes are distinct examples"


def test_views_made_beforehand_are_of_the_same_example_and_differ() -> None:
    source = numbered()
    views = source.x[:, None] + torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None]
    task = UMTRA(source, way=5, query=3, batch=16, views=views).draw(0)
    query, own = task.query.x[..., 0].view(16, 5, 3), task.support.x[..., 0].view(16, 5, 1)
    assert torch.equal((query - own).floor(), torch.zeros(16, 5, 3))
    assert all(len(set(row.tolist())) == 3 for row in (10 * (query - own)).round().flatten(0, 1))


def test_a_mixed_query_is_mostly_of_its_own_example_and_partly_of_one_outside() -> None:
    source = Source("unit", torch.eye(40), torch.arange(40) % 2, ("a", "b"), "vector")
    task = UMTRA(source, way=5, query=4, batch=50, views=source.x[:, None], mixed=True).draw(0)
    own = task.support.x.argmax(-1)  # (50, 5)
    query = task.query.x.view(50, 5, 4, 40)
    share, other = query.topk(2).values, query.topk(2).indices
    assert torch.equal(other[..., 0], own[..., None].expand(50, 5, 4))
    assert not (other[..., 1, None] == own[:, None, None]).any(), "the other is not in the task"
    assert torch.allclose(share.sum(-1), torch.ones(50, 5, 4))
    assert share[..., 1].max() < 0.5 and abs(float(share[..., 1].mean()) - 0.25) < 0.02, "uniform in 0 to a half"


@pytest.mark.parametrize("mixed", [False, True])
def test_a_task_depends_on_seed_and_index_alone(mixed: bool) -> None:
    digits = packaged.load("digits")
    options: dict[str, Any] = {
        "way": (2, 5),
        "shot": (1, 3),
        "query": 2,
        "augment": [Affine(), Erase()],
        "mixed": mixed,
    }
    batch, alone = UMTRA(digits, batch=6, **options).draw(1), UMTRA(digits, batch=1, **options).draw(8)
    assert same(Task(*(type(p)(*(leaf[2:3] for leaf in p)) for p in batch)), alone)
    assert not same(alone, UMTRA(digits, batch=1, seed=1, **options).draw(8))
    assert batch.support.x.dtype == torch.uint8, "images stay bytes"
    ways = batch.query.weight.view(6, 5, 2)[..., 0].sum(1)
    assert len(set(ways.tolist())) > 1 and ways.min() >= 2


def test_labels_are_not_read() -> None:
    source = blobs()
    pairs = [
        (
            UMTRA(s, way=3, augment=[Jitter()]),
            Families({k: TaskSampler(v, 3, batch=16) for k, v in cactus(s, clusters=6, partitions=2).items()}),
        )
        for s in (source, shuffled(source))
    ]
    for one, other in zip(*pairs, strict=True):
        assert same(one.tasks(16, 32), other.tasks(16, 32))
    bodies = []
    for s in (source, shuffled(source)):
        torch.manual_seed(0)
        bodies.append(nn.Linear(8, 8))
        pretrain_alike(bodies[-1], s, 8, [Jitter()], steps=3, batch=16, show_progress=False)
        pretrain_denoising(bodies[-1], s, 8, steps=3, batch=16, show_progress=False)
    assert torch.equal(bodies[0].weight, bodies[1].weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "a query is a view"),
        ({"augment": [slightly], "way": 61}, "a task takes 61 examples"),
        ({"augment": [slightly], "way": 30, "query": 2, "mixed": True}, "a task takes 90 examples"),
        ({"views": torch.zeros(3, 1, 3)}, "views of 3 examples"),
        ({"augment": [slightly], "way": 1}, "way 1"),
    ],
)
def test_umtra_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        UMTRA(numbered(), **options)


# -- views


def test_views_change_an_example_by_its_own_key_alone() -> None:
    digits = packaged.load("digits")
    rows = digits.x[:6].flatten(1).float()
    for view, x in ((Affine(), digits.x[:6]), (Erase(0.3), digits.x[:6]), (Jitter(), rows), (Marginal(rows), rows)):
        key = keys(0, torch.arange(6))
        whole = view(x, key)
        assert torch.equal(whole[2:4], view(x[2:4], key[2:4]))
        assert whole.dtype == x.dtype and not torch.equal(whole, x) and not torch.equal(view(x, key + 1), whole)
        with pytest.raises(BadInput, match=type(view).__name__):
            view(x[0], key)


def test_views_leave_an_example_what_it_is() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8)
    key = keys(0, torch.arange(1))
    assert torch.allclose(Affine(0, 0, 0, 0)(x, key), x, atol=1e-4)
    ones = torch.ones(400, 1, 10, 10)
    assert abs(float((Erase(0.3)(ones, keys(0, torch.arange(400))) == 0).float().mean()) - 0.3) < 0.01
    many, of = torch.randn(500, 20), keys(0, torch.arange(500))
    assert float(Jitter(0.2, 0.1)(many, of).sub(many).mean().abs()) < 0.02, "the mean is kept"
    table = torch.stack([torch.arange(2000.0), 5000 + torch.arange(2000.0)], 1)
    changed = Marginal(table, 0.5)(table, keys(0, torch.arange(2000)))
    assert (changed[:, 0] < 2000).all() and (changed[:, 1] >= 5000).all(), "columns keep their values"
    assert abs(float((changed != table).float().mean()) - 0.5) < 0.03


def test_a_shifted_image_moves_by_what_was_drawn_at_most() -> None:
    """The centre of one bright square, before and after."""
    x = torch.zeros(200, 1, 40, 40)
    x[..., 18:22, 18:22] = 1
    moved = Affine(0, 0, 0, 0.25)(x, keys(0, torch.arange(200)))[:, 0]
    mass, place = moved.sum((1, 2)), torch.arange(40.0) + 0.5
    centre = torch.stack([(moved.sum(2) @ place) / mass, (moved.sum(1) @ place) / mass], 1) - 20
    assert torch.allclose(mass, torch.full((200,), 16.0), atol=1e-2), "nothing is lost inside"
    assert 9 < centre.abs().max() < 10 and centre.mean().abs() < 1, "a quarter of 40 pixels, to all sides"


def test_dropped_words() -> None:
    texts = ["one two three four five six seven eight nine ten"] * 300 + ["word", ""]
    dropped = drop_words(texts, 0.3)
    assert dropped == drop_words(texts, 0.3) != drop_words(texts, 0.3, seed=1)
    assert dropped[-2:] == ["word", ""] and drop_words(texts, 1.0)[0].count(" ") == 0
    sizes = [len(text.split()) for text in dropped[:300]]
    assert abs(sum(sizes) / 3000 - 0.7) < 0.03
    left = [texts[0].split().index(word) for word in dropped[0].split()]
    assert left == sorted(left), "in their order"


def test_text_views_are_features_of_the_text_without_some_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from metafit.backbones import wrap

    monkeypatch.setenv("METAFIT_CACHE", str(tmp_path))
    texts = Source("t", ["a b c d e f g h", "i j k l m n o p"], torch.tensor([0, 1]), ("x", "y"), "text")
    counts = wrap(lambda x: x, out_dim=1, modality="text", preprocess=lambda raw: torch.tensor([[len(t)] for t in raw]))
    found = text_views(texts, counts, views=3, share=0.5, progress=False)
    expected = [[len(t) for t in drop_words(texts.x, 0.5, v)] for v in range(3)]
    assert torch.equal(found[..., 0], torch.tensor(expected).T.float())


# -- CACTUs


def test_clusters_recover_blobs_in_every_partition() -> None:
    source = blobs()
    parts = cactus(source, clusters=6, partitions=4)
    assert list(parts) == [f"partition {i}" for i in range(4)]
    first = parts["partition 0"]
    for cluster in range(6):
        true = source.y[(source.x[:, None] == first.x[first.y == cluster]).all(-1).any(1)]
        assert len(true) == 30 and true.unique().numel() == 1
    assert len({tuple(part.y.tolist()) for part in parts.values()}) > 1, "scaled dimensions give other partitions"


def test_small_clusters_are_left_out() -> None:
    source = blobs(3)
    alone = replace(
        source, x=torch.cat([source.x, -50 * torch.ones(2, 8)]), y=torch.cat([source.y, torch.tensor([0, 1])])
    )
    part = cactus(alone, clusters=4, partitions=1, least=3)["partition 0"]
    assert len(part) == 90 and len(part.classes) == 3 and part.x.min() > -20
    with pytest.raises(BadInput, match="ask for fewer clusters"):
        cactus(alone, clusters=4, partitions=1, least=60)
    with pytest.raises(BadInput, match="embeddings"):
        cactus(alone, torch.zeros(3, 2))
    with pytest.raises(BadInput, match="holds no rows of numbers"):
        cactus(Source("t", ["a", "b"], torch.tensor([0, 1]), ("x", "y"), "text"))


def test_clusters_are_of_the_embeddings_given() -> None:
    source = blobs(4)
    turned = source.x[torch.arange(len(source)).roll(15)]  # embeddings that group other rows than x does
    part = cactus(source, turned, clusters=4, partitions=1)["partition 0"]
    assert torch.equal(part.x, source.x) and len(part.y[:15].unique()) == 1 and part.y[0] != part.y[15]


# -- self-supervised losses, against plain loops in double precision


def test_nt_xent_is_the_paper_s_sum() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 7, dtype=torch.float64)
    z, total = [row / row.norm() for pair in zip(a, b, strict=True) for row in pair], 0.0
    for i in range(10):
        partner = i + 1 if i % 2 == 0 else i - 1
        below = sum(math.exp(float(z[i] @ z[k]) / 0.3) for k in range(10) if k != i)
        total -= math.log(math.exp(float(z[i] @ z[partner]) / 0.3) / below)
    assert float(nt_xent(a, b, 0.3)) == pytest.approx(total / 10, rel=1e-12)


def test_vicreg_is_the_paper_s_sum() -> None:
    torch.manual_seed(0)
    a, b = 0.7 * torch.randn(2, 6, 4, dtype=torch.float64)
    apart = sum(float(a[i, j] - b[i, j]) ** 2 for i in range(6) for j in range(4)) / 24
    spread = together = 0.0
    for z in (a.tolist(), b.tolist()):
        mean = [sum(row[j] for row in z) / 6 for j in range(4)]
        cov = [[sum((r[i] - mean[i]) * (r[j] - mean[j]) for r in z) / 5 for j in range(4)] for i in range(4)]
        spread += sum(max(0.0, 1 - math.sqrt(cov[j][j] + 1e-4)) for j in range(4)) / 4 / 2
        together += sum(cov[i][j] ** 2 for i in range(4) for j in range(4) if i != j) / 4
    assert float(vicreg(a, b, 3.0, 5.0, 7.0)) == pytest.approx(3 * apart + 5 * spread + 7 * together, rel=1e-12)


def test_denoising_counts_what_was_changed_and_how_it_is_mended() -> None:
    torch.manual_seed(0)
    x, found, mended = torch.randn(3, 4, 5, dtype=torch.float64)
    noisy = x.clone()
    noisy[0, 1] = noisy[2, 3] = 9.0
    total = 0.0
    for i in range(4):
        for j in range(5):
            p = 1 / (1 + math.exp(-float(found[i, j])))
            hit = noisy[i, j] != x[i, j]
            total += -math.log(p if hit else 1 - p) + 2.0 * float(mended[i, j] - x[i, j]) ** 2
    assert float(denoising(x, noisy, found, mended, 2.0)) == pytest.approx(total / 20, rel=1e-12)


# -- what it gains


def vectors() -> Splits:
    digits = packaged.load("digits")
    return digits.with_x(digits.x.flatten(1) / 255, "vector").split(seed=0)


def embedded(body: nn.Module, part: Source) -> Tensor:
    with torch.no_grad():
        return body.eval()(part.x)


@pytest.mark.parametrize("how", ["simclr", "vicreg", "denoising"])
def test_pretraining_makes_classes_easier_to_tell(how: str) -> None:
    """Nearest centroids of digits over a random network, and over the same after 150 steps without their labels."""
    splits = vectors()
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))

    def accuracy() -> float:
        known = splits.train.with_x(embedded(body, splits.train), "vector")
        tasks = TaskSampler(known, 5, 1, 10, 50, seed=2)
        return evaluate(build("centroid", 32, 5), tasks, 300, show_progress=False).metrics()["accuracy"]["mean"]

    before = accuracy()
    options: dict[str, Any] = {"steps": 150, "rate": 3e-3, "show_progress": False}
    if how == "denoising":
        losses = pretrain_denoising(body, splits.train, 32, **options)
    else:
        losses = pretrain_alike(
            body, splits.train, 32, [Jitter(0.3, 0.3)], nt_xent if how == "simclr" else vicreg, batch=128, **options
        )
    assert len(losses) == 150 and sum(losses[-20:]) < 0.9 * sum(losses[:20])
    assert accuracy() > before + 0.1


@pytest.mark.parametrize("how", ["cactus", "umtra", "mixture"])
def test_meta_training_without_labels_beats_the_untrained_learner(how: str) -> None:
    splits = vectors()
    tasks: Tasks
    if how == "cactus":
        tasks = Families({k: TaskSampler(v, 5, 1, 5, 4) for k, v in cactus(splits.train, clusters=20).items()})
    else:
        tasks = UMTRA(splits.train, 5, 1, 4, 4, augment=[Jitter()], mixed=how == "mixture")
    torch.manual_seed(0)
    learner = build("protonet", 64, 5)
    known = splits.train.subset(range(5))  # real classes, whose labels no training task has read
    test = TaskSampler(known, 5, 1, 10, 50, seed=2)
    before = evaluate(learner, test, 300, show_progress=False)
    meta_train(learner, tasks, steps=150, rate=1e-3, show_progress=False)
    lead = evaluate(learner, test, 300, show_progress=False).minus(before)
    assert lead["mean"] - lead["ci95"] > 0.01


def test_a_comparison_without_labels_reads_none_and_says_so(tmp_path: Path) -> None:
    digits = packaged.load("digits")
    prepared = prepare(digits, None)
    protocol = Protocol(2, 1, 5, episodes=20, steps=4, unsupervised="umtra")
    made = compare_learners(prepared, ["protonet"], protocol, tmp_path, ["centroid"], show_progress=False)
    assert made["protocol"]["labels"] == "none (umtra)" and made["diversity"] is None and made["gauge"] is None
    assert "none (umtra)" in (tmp_path / "report.html").read_text()
    train, validation, test = prepared.splits
    assert validation is not None
    other = replace(prepared, splits=Splits(shuffled(train), shuffled(validation), test))
    again = compare_learners(other, ["protonet"], protocol, None, ["centroid"], show_progress=False)
    assert json.dumps(made["metrics"]["accuracy"]) == json.dumps(again["metrics"]["accuracy"])
    assert [row["loss"] for row in made["history"]] == [row["loss"] for row in again["history"]]
    with pytest.raises(BadInput, match="leave the balance out"):
        Protocol(unsupervised="cactus", balance="uniform")


@pytest.mark.parametrize(("learner", "how"), [("protonet", "cactus"), ("maml", "mixture")])
def test_a_network_meta_trains_without_labels(learner: str, how: Any) -> None:
    digits = packaged.load("digits")
    x = torch.nn.functional.interpolate(digits.x[:600].float(), (16, 16)).to(torch.uint8)
    small = Source("digits", x, digits.y[:600], digits.classes, "image")
    protocol = Protocol(2, 1, 2, episodes=2, steps=1, unsupervised=how)
    made = compare_learners(prepare(small, "conv4"), [learner], protocol, None, ["centroid"], show_progress=False)
    assert made["history"][-1]["step"] == 1
