"""Figures are what statistics says they are, on tasks that are the same for every learner."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from metafit.data import Sinusoids, Source, TaskSampler
from metafit.errors import BadInput
from metafit.evaluation import (
    Contender,
    Evaluation,
    compare,
    coverage,
    describe,
    evaluate,
    gallery,
    interval,
    reliability,
    result,
    write_report,
    write_result,
)
from metafit.learners import GradientLearner, Learner, build
from metafit.task import Examples, take


def source_of(classes: int = 12, each: int = 12, spread: float = 0.6) -> Source:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 8, generator=generator)
    x = centres.repeat_interleave(each, 0) + spread * torch.randn(classes * each, 8, generator=generator)
    y = torch.arange(classes).repeat_interleave(each)
    return Source("blobs", x, y, tuple(f"blob {c}" for c in range(classes)), "vector")


def run(learner: Learner, tasks: Any, episodes: int = 30, **options: Any) -> Evaluation:
    return evaluate(learner, tasks, episodes, show_progress=False, **options)


# -- statistics


@pytest.mark.parametrize("n", [2, 5, 600])
def test_interval_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(3, 2, n)
    low, high = scipy.stats.t.interval(0.95, n - 1, values.mean(), scipy.stats.sem(values))
    found = interval(torch.from_numpy(values))
    assert found["mean"] == pytest.approx(values.mean(), abs=1e-6)
    assert found["ci95"] == pytest.approx((high - low) / 2, abs=1e-6)


def test_interval_of_odd_values() -> None:
    assert interval(torch.tensor([0.5])) == {"mean": 0.5, "ci95": None}
    assert interval(torch.tensor([0.5, 0.5, 0.5])) == {"mean": 0.5, "ci95": 0.0}
    for bad in (math.nan, math.inf):
        assert interval(torch.tensor([0.5, bad])) == {"mean": None, "ci95": None}
    # float32 sums of many values would drift
    assert interval(torch.full((1_000_000,), 0.1))["mean"] == 0.1


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(1.0, 1.0, (2000, 8))
    found = [interval(torch.from_numpy(row)) for row in draws]
    covered = np.mean([abs(f["mean"] - 1.0) <= f["ci95"] for f in found])
    assert 0.93 < covered < 0.97


def test_reliability_of_known_cases() -> None:
    error, rows = reliability(torch.ones(4), torch.tensor([True, True, True, True]))
    assert error == 0.0 and rows == [{"confidence": 1.0, "accuracy": 1.0, "count": 4}]
    error, _ = reliability(torch.ones(4), torch.zeros(4, dtype=torch.bool))
    assert error == 1.0
    confidence = torch.tensor([0.55] * 10 + [0.95] * 30, dtype=torch.float64)
    right = torch.tensor([True] * 8 + [False] * 2 + [True] * 27 + [False] * 3)
    error, rows = reliability(confidence, right, bins=10)
    assert error == pytest.approx(0.25 * abs(0.8 - 0.55) + 0.75 * abs(0.9 - 0.95))
    assert [row["count"] for row in rows] == [10, 30] and [row["accuracy"] for row in rows] == [0.8, 0.9]


@pytest.mark.parametrize("spread", [1.0, 2.0, 0.5])
def test_intervals_of_a_density_hold_what_they_say(spread: float) -> None:
    """Targets of a Gaussian whose predicted deviation is ``spread`` times the true one, by the normal distribution."""
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / spread
    error, rows = coverage(torch.erf(z.abs() / 2**0.5))
    levels = np.arange(1, 20) / 20
    held = 2 * scipy.stats.norm.cdf(spread * scipy.stats.norm.ppf(0.5 + levels / 2)) - 1
    np.testing.assert_allclose([row["accuracy"] for row in rows], held, atol=0.005)
    assert error == pytest.approx(np.abs(held - levels).mean(), abs=0.005)


def test_a_calibrated_answerer_has_little_error() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(100_000, generator=generator)
    right = torch.rand(100_000, generator=generator) < confidence
    assert reliability(confidence, right)[0] < 0.01


# -- evaluation


def test_evaluation_by_hand() -> None:
    """The score of each task is the share of right answers among the queries that count."""
    tasks = TaskSampler(source_of(each=6), (2, 4), (1, 3), 5, batch=7, seed=1, balanced=False)
    learner = build("centroid", 8, 4)
    evaluation = run(learner, tasks, 20)
    assert evaluation.score.shape == evaluation.loss.shape == (20, 1)
    for t in range(20):
        task = take(tasks.tasks(t, t + 1), 0)
        logits = learner.predict(learner.adapt(task.support), task.query.x)
        kept = task.query.weight > 0
        assert torch.equal(evaluation.counted[t], kept)
        right = (logits.argmax(-1) == task.query.y)[kept].float()
        torch.testing.assert_close(evaluation.score[t, 0], right.mean())
        loss = nn.functional.cross_entropy(logits[kept], task.query.y[kept])
        torch.testing.assert_close(evaluation.loss[t, 0], loss, rtol=1e-4, atol=1e-5)
        assert torch.equal(evaluation.answers[t, kept], logits.argmax(-1)[kept])
    assert evaluation.metrics()["accuracy"] == interval(evaluation.score[:, -1])
    counted = sum(row["count"] for row in evaluation.calibration())
    assert counted == int(evaluation.counted.sum()), "padding is not calibrated"


@pytest.mark.parametrize("name", ["centroid", "knn", "linear", "finetune", "maml", "protonet"])
def test_evaluation_is_the_same_again_and_by_any_batch(name: str) -> None:
    torch.manual_seed(0)
    source, learner = source_of(), build(name, 8, 3, **({"steps": 2} if name in ("finetune", "maml") else {}))
    first = run(learner, TaskSampler(source, 3, 2, 4, batch=30, seed=4))
    second = run(learner, TaskSampler(source, 3, 2, 4, batch=30, seed=4))
    assert torch.equal(first.score, second.score) and torch.equal(first.loss, second.loss)
    for batch, backend in ((7, "auto"), (30, "loop")):
        other = run(learner, TaskSampler(source, 3, 2, 4, batch=batch, seed=4), backend=backend)
        torch.testing.assert_close(other.loss, first.loss, rtol=1e-4, atol=1e-5)


def test_evaluation_leaves_the_learner_as_it_was() -> None:
    learner = build("maml", 8, 3, nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), steps=1, test_steps=3).train()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    tasks = TaskSampler(source_of(), 3, 1, 4)
    evaluation = run(learner, tasks)
    assert evaluation.score.shape == (30, 4), "evaluation takes the test steps"
    assert learner.training and all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
    assert all(p.grad is None for p in learner.parameters()) and not evaluation.loss.requires_grad
    learner.eval()
    run(learner, tasks, 2)
    assert not learner.training


def test_the_curve_has_a_point_a_step() -> None:
    learner = build("finetune", 8, 3, steps=6)
    evaluation = run(learner, TaskSampler(source_of(), 3, 2, 4))
    curve = evaluation.curve()
    assert [point["step"] for point in curve] == list(range(7))
    assert curve[0]["accuracy"]["mean"] == pytest.approx(1 / 3, abs=0.01), "a head of zeros guesses the first class"
    assert curve[-1]["accuracy"] == evaluation.metrics()["accuracy"]
    assert curve[-1]["loss"]["mean"] < curve[0]["loss"]["mean"] == pytest.approx(math.log(3), abs=1e-5)


def test_regression() -> None:
    learner = build("maml", 8, None, nn.Sequential(nn.Linear(1, 8), nn.Tanh()))
    evaluation = run(learner, Sinusoids(shot=5, batch=8), 20)
    assert set(evaluation.metrics()) == {"mse", "loss", "adapt_ms"} and evaluation.calibration() == []
    torch.testing.assert_close(evaluation.score, evaluation.loss)
    assert evaluation.answers is None and len(evaluation.curve()) == 2


def test_pairing_narrows_the_difference() -> None:
    tasks = TaskSampler(source_of(spread=1.5), 5, 1, 7, batch=50, seed=2)
    both = compare({"a": build("centroid", 8, 5), "b": build("knn", 8, 5, k=3)}, tasks, 300, show_progress=False)
    a, b = both["a"], both["b"]
    difference = a.minus(b)
    expected = scipy.stats.ttest_rel(a.score[:, 0].double(), b.score[:, 0].double()).confidence_interval(0.95)
    assert difference["metric"] == "accuracy"
    assert difference["mean"] == pytest.approx((expected.low + expected.high) / 2, abs=1e-6)
    assert difference["ci95"] == pytest.approx((expected.high - expected.low) / 2, abs=1e-6)
    assert difference["ci95"] < interval(a.score[:, 0])["ci95"], "the tasks are the same"
    assert b.minus(a)["mean"] == -difference["mean"] and a.minus(a) == {"metric": "accuracy", "mean": 0.0, "ci95": 0.0}


def test_errors() -> None:
    with pytest.raises(BadInput, match="episodes 0: needs at least 1"):
        run(build("centroid", 8, 3), TaskSampler(source_of(), 3), 0)


# -- results and gallery


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


class Own(GradientLearner):
    pass


@pytest.mark.parametrize("diverged", [False, True])
def test_the_result_is_strict_json_with_the_agreed_keys(diverged: bool, tmp_path: Path) -> None:
    splits = source_of(16).split()
    tasks = TaskSampler(splits.test, 3, 1, 4, seed=7)
    first = build("maml", 8, 3, steps=2, **({"rate": 1e38} if diverged else {}))
    learners = {"maml": first, "centroid": build("centroid", 8, 3), "mine": Own(nn.Linear(8, 8), nn.Linear(8, 3), 3)}
    evaluations = compare(learners, tasks, 10, show_progress=False)
    assert diverged == (not bool(evaluations["maml"].loss.isfinite().all()))
    contenders = [
        Contender(name, learners[name], evaluation, [{"step": 0, "loss": None, "validation": 0.5, "seconds": 0.1}])
        for name, evaluation in evaluations.items()
    ]
    made = result(
        contenders,
        tasks,
        backbone="minilm-l6",
        source=describe(splits, "blobs", "vector"),
        gallery=gallery(tasks, evaluations),
    )
    path = write_result(made, tmp_path)
    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    agreed = "schema metafit learner backbone source protocol metrics curve against environment"
    assert set(agreed.split()) <= set(read) and read["schema"] == 1
    assert set(read["protocol"]) == {"way", "shot", "query", "episodes", "seed", "transductive"}
    assert read["protocol"] | {"transductive": ""} == {
        "way": 3, "shot": 1, "query": 4, "episodes": 10, "seed": 7, "transductive": ""
    }  # fmt: skip
    assert {"accuracy", "loss", "ece", "adapt_ms"} <= set(read["metrics"])
    assert all(set(value) == {"mean", "ci95"} for value in read["metrics"].values())
    assert read["learner"]["name"] == "maml" and read["learner"]["options"]["steps"] == 2
    assert [row["learner"] for row in read["against"]] == ["centroid", "mine"]
    for row in read["against"]:
        assert {"metrics", "paired_difference"} <= set(row) and {"mean", "ci95"} <= set(row["paired_difference"])
    assert read["against"][1]["family"] == "own" and read["against"][1]["title"] == "mine"
    assert len(read["curve"]) == 3 and (read["metrics"]["loss"]["mean"] is None) == diverged
    assert "maml" in write_report([made], tmp_path / "report.html").read_text(encoding="utf-8").lower()
    assert [len(names) for names in read["source"]["classes"].values()] == [10, 2, 4]


def test_functions_have_results_too(tmp_path: Path) -> None:
    learner, tasks = build("maml", 8, None, nn.Sequential(nn.Linear(1, 8), nn.Tanh())), Sinusoids()
    made = result([Contender("maml", learner, run(learner, tasks, 5))], tasks)
    assert made["source"]["name"] == "sinusoids" and made["protocol"]["way"] is None
    write_result(made, tmp_path)


def test_the_gallery_shows_what_was_evaluated() -> None:
    source = source_of(each=6)
    source = source.with_x(source.x, "vector")  # raw: the vectors themselves
    tasks = TaskSampler(source, (2, 3), (1, 2), 5, batch=4, seed=3)
    learner = build("centroid", 8, 3)
    evaluations = {"centroid": run(learner, tasks, 6)}
    shown = gallery(tasks, evaluations, episodes=50, support=2, queries=3)
    assert len(shown) == 6, "no more than were evaluated"
    for t, episode in enumerate(shown):
        task = take(tasks.tasks(t, t + 1), 0)
        logits = learner.predict(learner.adapt(task.support), task.query.x)
        assert len(episode["classes"]) in (2, 3) and len(episode["query"]) == 3 * len(episode["classes"])
        for item in episode["query"]:
            values = torch.tensor(item["values"])
            same = ((task.query.x - values).abs().amax(1) < 1e-3) & (task.query.weight > 0)
            (row,) = torch.nonzero(same)[:, 0].tolist()
            assert int(task.query.y[row]) == item["class"]
            original = int(torch.nonzero((source.x - values).abs().amax(1) < 1e-3)[0, 0])
            assert source.classes[int(source.y[original])] == episode["classes"][item["class"]]
            answer = item["answers"]["centroid"]
            assert answer["class"] == int(logits[row].argmax())
            assert answer["confidence"] == pytest.approx(float(logits[row].softmax(-1).max()), abs=1e-3)
        for item in episode["support"]:
            rows = torch.nonzero((task.support.x - torch.tensor(item["values"])).abs().amax(1) < 1e-3)[:, 0]
            assert item["class"] in task.support.y[rows].tolist()


def test_the_gallery_shows_images_and_texts() -> None:
    from PIL import Image

    x = torch.randint(0, 255, (8, 1, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Source("pixels", x, torch.arange(8) % 2, ("a", "b"), "image")
    (episode,) = gallery(TaskSampler(images, 2, 1, 2), {}, episodes=1)
    head, _, body = episode["support"][0]["image"].partition(",")
    assert head == "data:image/png;base64"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))
    assert any(np.array_equal(pixels, image[0].numpy()) for image in x)
    texts = Source("words", x.flatten(1).float(), images.y, ("a", "b"), "vector", raw=[f"text {i}" for i in range(8)])
    (episode,) = gallery(TaskSampler(texts, 2, 1, 2), {}, episodes=1)
    assert episode["query"][0]["text"].startswith("text ") and episode["query"][0]["answers"] == {}
    opened = Source("opened", x, images.y, ("a", "b"), "image", raw=[Image.fromarray(image[0].numpy()) for image in x])
    (episode,) = gallery(TaskSampler(opened, 2, 1, 2), {}, episodes=1)
    assert episode["query"][0]["image"].startswith("data:image/png")


class Slow(Learner):
    """Not vmappable, and of no catalogue."""

    vmappable = False

    def adapt(self, support: Examples) -> dict[str, Tensor]:
        assert support.x.sum().item() != 0.0
        return {"mean": support.x.mean(0)}

    def predict(self, adapted: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x - adapted["mean"])[:, : self.way]


def test_learners_that_only_loop_are_evaluated() -> None:
    evaluation = run(Slow(3), TaskSampler(source_of(), 3, 2, 4))
    assert evaluation.score.shape == (30, 1) and evaluation.adapt_ms.shape == (20,)


def test_tasks_of_more_classes_than_the_learner_tells_apart() -> None:
    learner = build("protonet", dim=8, way=2)
    with pytest.raises(BadInput, match="tasks of 3 classes: the learner tells 2 apart"):
        evaluate(learner, TaskSampler(source_of(), 3, 1, 2), episodes=2, show_progress=False)
