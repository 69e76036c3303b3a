"""Online adaptation: streams in changing order, bounded memory, forgetting, drift, feedback, and restarts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from metafit import apps, backbones, data
from metafit.apps import FewShotClassifier, OnlineClassifier
from metafit.apps.coreset import Means, Sample, moments, more
from metafit.apps.drift import POWERS, Drift
from metafit.errors import BadInput
from metafit.learners import ENTRIES, build
from metafit.task import Examples
from metafit.training import Model, Recipe

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@parametrize_with_checks([OnlineClassifier(learner="centroid")])
def test_conventions(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def digits() -> Split:
    """600 examples to learn from and 900 others, as rows."""
    source = data.read("digits")
    order = np.random.default_rng(0).permutation(len(source.y))[:1500]
    x, y = source.x.flatten(1).numpy()[order] / 255.0, source.y.numpy()[order]
    return x[:600], y[:600], x[600:], y[600:]


def frozen(dim: int = 64) -> backbones.Backbone:
    """Rows as the features of a frozen backbone: nothing is scaled by the examples."""
    return backbones.wrap(lambda x: x, dim, name="as they are")


def stream(few: OnlineClassifier, x: np.ndarray, y: np.ndarray, size: int = 50) -> OnlineClassifier:
    for start in range(0, len(y), size):
        few.partial_fit(x[start : start + size], y[start : start + size])
    return few


def orders(y: np.ndarray) -> Iterator[np.ndarray]:
    """Shuffled, twice; sorted by class; by class, the other way round."""
    for seed in (0, 1):
        order = np.random.default_rng(seed).permutation(len(y))
        yield order
    yield order[y[order].argsort(kind="stable")]
    yield y.argsort(kind="stable")[::-1]


@pytest.mark.parametrize(("learner", "margin"), [("linear", 0.03), ("knn", 0.03), ("r2d2", 0.03)])
def test_a_stream_in_any_order_ends_near_the_batch(digits: Split, learner: str, margin: float) -> None:
    x, y, new, truth = digits
    x, y = x[:400], y[:400]
    batch = FewShotClassifier(learner=learner).fit(x, y).score(new, truth)
    first = FewShotClassifier(learner=learner).fit(x[:50], y[:50]).score(new, truth)
    assert batch > first + 0.05, "there is something to learn from the stream"
    for order in orders(y):
        few = stream(OnlineClassifier(learner=learner, per_class=10), x[order], y[order], 100)
        assert few.score(new, truth) > batch - margin
        assert all(len(part.weight) <= 10 and part.seen == (y == c).sum() for c, part in few.memory_.items())


def test_class_means_are_those_of_the_batch_whatever_the_order(digits: Split) -> None:
    x, y, new, _ = digits
    batch = FewShotClassifier(learner="centroid", backbone=frozen()).fit(x, y)
    for order in orders(y):
        few = stream(OnlineClassifier(learner="centroid", backbone=frozen(), per_class=2), x[order], y[order])
        np.testing.assert_allclose(few._logits(new) * few.temperature_, batch._logits(new) * batch.temperature_, 1e-4)


def test_one_at_a_time_is_all_at_once(digits: Split) -> None:
    """To the bit, also where the stream goes on after ``fit``: memory knows no batches."""
    x, y, new, _ = digits
    x, y = x[:60], y[:60]
    one = stream(OnlineClassifier(learner="linear", per_class=3), x, y, 1)
    all_at_once = OnlineClassifier(learner="linear", per_class=3).partial_fit(x, y)
    continued = OnlineClassifier(learner="linear", per_class=3).fit(x[:40], y[:40]).partial_fit(x[40:], y[40:])
    np.testing.assert_array_equal(one.predict_proba(new), all_at_once.predict_proba(new))
    np.testing.assert_array_equal(one.predict_proba(new), continued.predict_proba(new))


def test_what_fits_into_memory_is_learned_as_the_batch(digits: Split) -> None:
    x, y, *_ = digits
    x, y = x[:100], y[:100]
    batch = FewShotClassifier(learner="linear").fit(x, y)
    few = stream(OnlineClassifier(learner="linear"), x, y, 30)
    np.testing.assert_allclose(few.inputs_.mean, batch.inputs_.mean, atol=1e-12)
    np.testing.assert_allclose(few.inputs_.scale, batch.inputs_.scale, rtol=1e-9)
    np.testing.assert_allclose(few.adapted_["coefficients"], batch.adapted_["coefficients"], atol=1e-2)


def test_merging_keeps_the_moments() -> None:
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 100
    kept = [more(None, part, 4) for part in x.split([150, 50])]
    for known, part in zip(kept, x.split([150, 50]), strict=True):
        assert isinstance(known, Means) and len(known.x) == 4 and known.seen == len(part)
        torch.testing.assert_close(known.mean, part.mean(0))
        torch.testing.assert_close(known.scatter, (part - part.mean(0)).square().sum(0))
    mean, variance = moments(kept)  # type: ignore[arg-type]
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(variance, x.var(0, correction=0))


def test_those_most_alike_are_merged() -> None:
    """By hand: in units of the spread, (0, 0) and (1, 0) are nearest; in raw units (0, 0) and (0, 2) would be not."""
    rows = torch.tensor([[0.0, 0.0], [1000.0, 0.0], [0.0, 2.0], [9000.0, 9.0]], dtype=torch.float64)
    known = more(None, rows, 3)
    assert isinstance(known, Means)
    assert known.x.tolist() == [[500.0, 0.0], [0.0, 2.0], [9000.0, 9.0]] and known.weight.tolist() == [2, 1, 1]
    heavy = Means(torch.tensor([[0.0], [3.0], [7.0]]), torch.tensor([9.0, 9.0, 1.0]), torch.tensor([100.0]))
    assert heavy.within(2).weight.tolist() == [9, 10], "two heavy rows cost more than a light one that is further off"


def test_a_sample_is_uniform() -> None:
    kept = more(None, [str(i) for i in range(4000)], 400)
    assert isinstance(kept, Sample) and kept.seen == 4000 and kept.weight.tolist() == [10.0] * 400
    numbers = np.array([int(item) for item in kept.items])
    assert (np.diff(numbers) > 0).all() and (np.histogram(numbers, 4, (0, 4000))[0] > 75).all()
    assert kept.within(50) == more(None, [str(i) for i in range(4000)], 50), "as if there had never been more room"


def state(few: OnlineClassifier, new: np.ndarray) -> list[Any]:
    sums = [few._sums[label][name] for label in sorted(few._sums) for name in ("features", "size")]
    return [few.predict_proba(new), few.predict(new), few.temperature_, few.classes_, few.inputs_.mean, *sums]


def assert_same(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("learner", ["linear", "centroid"])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_forgotten_class_was_never_seen(digits: Split, learner: str, scaled: bool) -> None:
    x, y, new, _ = digits
    x, y, new = x[:200], y[:200], new[:50]

    def online() -> OnlineClassifier:
        return OnlineClassifier(learner=learner, backbone=None if scaled else frozen(), per_class=5)

    few, without = online(), online()
    for part in np.split(np.arange(200), 5):
        few.partial_fit(x[part], y[part])
        others = part[y[part] != 3]
        without.partial_fit(x[others], y[others])
    few.feedback(x[:9], [3] * 9, y[:9] == 3)
    assert not np.array_equal(few.predict_proba(new)[:, :3], without.predict_proba(new)[:, :3])
    assert_same(state(few.forget(3), new), state(without, new))
    few.partial_fit(x[y == 3][:9], y[y == 3][:9])
    without.partial_fit(x[y == 3][:9], y[y == 3][:9])
    assert_same(state(few, new), state(without, new))


def test_forgetting_where_all_classes_had_no_more_room(digits: Split) -> None:
    """Whatever the examples of the class were, nothing of them is left."""
    x, y, new, _ = digits
    one, other = (OnlineClassifier(learner="linear", in_all=40).partial_fit(x[:200], y[:200]) for _ in range(2))
    assert sum(len(part.weight) for part in one.memory_.values()) == 40
    one.partial_fit(x[:30], [10] * 30)
    other.partial_fit(1 - x[30:70], [10] * 40)
    assert all(len(part.weight) == 3 for part in one.memory_.values())
    assert_same(state(one.forget(10), new), state(other.forget(10), new))


def test_new_classes_are_learned_as_they_come(digits: Split) -> None:
    x, y, new, truth = digits
    few = OnlineClassifier(learner="linear").partial_fit(x[:1], y[:1])
    assert few.predict(new[:3]).tolist() == [y[0]] * 3 and few.predict_proba(new[:3]).tolist() == [[1.0]] * 3
    for c in range(10):
        few.partial_fit(x[y == c], y[y == c])
    assert few.classes_.tolist() == list(range(10)) and few.score(new, truth) > 0.9
    few.partial_fit(x[:5], y[:5], classes=[77, 3])
    assert few.classes_.tolist() == [*range(10), 77] and (few.predict_proba(new)[:, -1] == 0).all()


@pytest.mark.parametrize("learner", ["auto", "linear", "centroid"])
def test_a_restart_changes_nothing(digits: Split, learner: str, tmp_path: Path) -> None:
    x, y, new, _ = digits
    x, y, new = x[:150], np.array([f"digit {c}" for c in y[:150]]), new[:40]
    backbone = None if learner == "auto" else frozen()
    few = OnlineClassifier(learner=learner, backbone=backbone, per_class=3, alarm_every=50).fit(x[:50], y[:50])
    few.feedback(x[50:80], few.predict(x[50:80]), few.predict(x[50:80]) == y[50:80])
    few.partial_fit(x[80:100], y[80:100])
    few.save(tmp_path)
    again = OnlineClassifier.load(tmp_path, backbone)
    assert_same(state(few, new), state(again, new))
    for one in (few, again):
        one.partial_fit(x[100:], np.roll(y[100:], 1)).partial_fit(x[:2], ["one more", "digit 0"])
    assert few.drift_ == again.drift_ and few.drift_.tested > 60
    assert_same(state(few, new), state(again, new))
    assert_same(state(few.forget("digit 0"), new), state(again.forget("digit 0"), new))


class Letters(nn.Module):
    """Texts ``(N, 20)`` of letters as codes to features."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x).mean(1)


def coded(texts: Any) -> torch.Tensor:
    return torch.tensor([[ord(letter) % 128 for letter in text.ljust(20)[:20]] for text in texts])


@pytest.mark.parametrize("learner", ["protonet", "maml"])
def test_over_a_trained_network_inputs_are_sampled(learner: str, tmp_path: Path) -> None:
    """Texts as they are, images as tensors; a network for four classes takes no fifth."""
    torch.manual_seed(0)
    body = backbones.wrap(Letters(), 8, "text", coded, "letters")
    few = OnlineClassifier(model=Model(build(learner, 8, 4, body), Recipe(trained=True)), per_class=3)
    texts = [letter * n for n in range(2, 9) for letter in "abc"]
    labels = [text[0] for text in texts]
    few.fit(texts[:9], labels[:9]).partial_fit(texts[9:], labels[9:]).save(tmp_path)
    assert (
        few.memory_["a"].items == tuple(t for t in texts if t in few.memory_["a"].items) and few.memory_["a"].seen == 7
    )
    again = apps.load(tmp_path, backbones.wrap(Letters(), 8, "text", coded, "letters"))
    for one in (few, again):
        one.partial_fit(["dd", "d"], ["d", "d"])
    assert_same(state(few, texts), state(again, texts))
    if learner == "maml":
        with pytest.raises(BadInput, match="at most 4"):
            few.partial_fit(["eee"], ["e"])
        assert few.classes_.tolist() == ["a", "b", "c", "d"] and "e" not in few.memory_

    body = backbones.load("conv4", image_size=16, width=8, norm="group")
    few = OnlineClassifier(model=Model(build(learner, body.out_dim, 4, body), Recipe(trained=True)), per_class=3)
    source = data.read("digits")
    rows = torch.nonzero(source.y < 3)[:30, 0]
    few.partial_fit(source.x[rows].numpy(), source.y[rows].numpy()).save(tmp_path)
    again = apps.load(tmp_path, backbones.load("conv4", image_size=16, width=8, norm="group"))
    assert_same(state(few, source.x[:9].numpy()), state(again, source.x[:9].numpy()))


def test_texts_and_images_stream_as_features() -> None:
    few = OnlineClassifier().partial_fit(["lights on", "play jazz"], ["light", "music"])
    few.partial_fit(["how is the weather", "switch the lamp off", "next song"], ["weather", "light", "music"])
    said = few.predict(["turn on the lamp", "what is the weather like", "play a song"])
    assert said.tolist() == ["light", "weather", "music"]
    assert isinstance(few.memory_["light"], Means) and few.memory_["light"].x.shape == (2, 384)
    digits = data.read("digits").x[:4].numpy()
    assert OnlineClassifier().partial_fit(digits, [0, 1, 2, 3]).memory_[0].x.shape == (1, 1280)


@pytest.mark.parametrize("name", [name for name, line in ENTRIES.items() if "classification" in line.tasks])
def test_a_weight_is_a_number_of_examples(name: str) -> None:
    """For all learners but those that say no; what they make of whole weights is what they make of copies."""
    torch.manual_seed(0)
    learner = build(name, 6, 3).double().eval()
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 3
    query, weight = torch.randn(5, 6, dtype=torch.float64), torch.tensor([1, 2, 3, 1, 1, 2, 3, 1, 1])
    with torch.no_grad():
        weighed = learner.predict(learner.adapt(Examples(x, y, weight.double())), query)
        copied = learner.predict(learner.adapt(Examples(*(v.repeat_interleave(weight, 0) for v in (x, y)))), query)
    assert torch.allclose(weighed.log_softmax(-1), copied.log_softmax(-1), atol=1e-8) == learner.weighs


def test_bets_are_fair_and_evidence_is_as_by_hand() -> None:
    drift = Drift(every=1000)
    for rank in (0, 0, 3, 0, 1, 0):
        drift.learn("a", rank)
    expected = []
    for rank in (0, 1, 3):  # the seventh score: how often it is as likely to be any of the seven, times its bet
        one = Drift(every=10**9, scores={"a": list(drift.scores["a"])})
        one.test("a", rank)
        expected.append(np.array(one.evidence))
        worse, equal = {0: (2, 5), 1: (1, 2), 3: (0, 2)}[rank]
        np.testing.assert_allclose(
            expected[-1], (((worse + equal) / 7) ** POWERS - (worse / 7) ** POWERS) / (equal / 7)
        )
    for bag in ([0, 0, 3, 0, 1, 0, 0], [0, 0, 3, 0, 1, 0, 3]):
        won = []
        for i, last in enumerate(bag):
            one = Drift(every=10**9)
            for rank in bag[:i] + bag[i + 1 :]:
                one.learn("a", rank)
            one.test("a", last)
            won.append(one.evidence)
        np.testing.assert_allclose(np.mean(won, 0), 1)


def test_false_alarms_are_as_rare_as_said(digits: Split) -> None:
    """On real data, shuffled and sorted by class, where the test alarms once in 50 examples at most, on average."""
    x, y, *_ = digits
    tested = alarms = 0
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(len(y))
        first, rest = order[:60], order[60:]
        if seed % 2:
            rest = rest[y[rest].argsort(kind="stable")]
        few = OnlineClassifier(learner="centroid", backbone=frozen(), per_class=5, alarm_every=50)
        drift = stream(few.fit(x[first], y[first]), x[rest], y[rest], 60).drift_
        tested, alarms = tested + drift.tested, alarms + len(drift.alarms)
    assert tested == 6 * 540 and 0 < alarms <= tested / 50


@pytest.mark.parametrize("learner", ["linear", "centroid"])
def test_drift_is_told_where_classes_change_places(digits: Split, learner: str) -> None:
    x, y, *_ = digits
    few = OnlineClassifier(learner=learner).fit(x[:50], y[:50])
    stream(few, x[50:300], y[50:300])
    assert few.drift_.alarms == [] and few.drift_.tested == 250
    few.partial_fit(x[300:330], (y[300:330] + 1) % 10)
    assert len(few.drift_.alarms) == 1 and few.drift_.alarms[0] <= 270
    fitted = OnlineClassifier(learner=learner).fit(x[:50], y[:50]).partial_fit(x[50:100], (y[50:100] + 1) % 10)
    assert fitted.drift_.alarms, "also right after fit, which says what to expect"


def test_a_new_class_is_no_drift(digits: Split) -> None:
    x, y, *_ = digits
    few = OnlineClassifier(learner="centroid")
    stream(few, *(v[:400][y[:400].argsort(kind="stable")] for v in (x, y)), 20)
    assert few.drift_.alarms == [] and few.drift_.tested > 300
    few.forget(4).partial_fit(x[400:460], (y[400:460] + 1) % 10)
    assert few.drift_.alarms, "each new class, and the one forgotten, left the others what to compare with"


def test_feedback_on_two_classes_is_as_labels(digits: Split) -> None:
    """What is not the one class is the other."""
    x, y, new, truth = digits
    x, y, new = x[y < 2], y[y < 2], new[truth < 2]
    few, labelled = (OnlineClassifier(learner="linear").partial_fit(x[:10], y[:10]) for _ in range(2))
    few.feedback(x[10:30], 1 - y[10:30], np.zeros(20, bool))
    few.feedback(x[30:40], y[30:40], np.ones(10, bool))
    labelled.partial_fit(x[10:40], y[10:40])
    assert few.drift_.tested == 0 and few.memory_[0].seen < labelled.memory_[0].seen
    one, other = (np.diff(one.predict_log_proba(new) * one.temperature_)[:, 0] for one in (few, labelled))
    np.testing.assert_allclose(one, other, atol=0.01)


def test_feedback_teaches(digits: Split) -> None:
    x, y, new, truth = digits
    scores = {}
    for taught in ("nothing", "right", "right and wrong"):
        few = OnlineClassifier(learner="linear").partial_fit(x[:30], y[:30], classes=range(10))
        for start in range(30, 330, 50):
            rows = slice(start, start + 50)
            said = few.predict(x[rows])
            right = said == y[rows]
            if taught != "nothing":
                chosen = right if taught == "right" else np.full(len(right), True)
                few.feedback(x[rows][chosen], said[chosen], right[chosen])
        scores[taught] = few.score(new, truth)
    assert scores["right"] > scores["nothing"] + 0.03
    assert scores["right and wrong"] > scores["right"]


def test_wrong_teaches_only_learners_that_weigh(digits: Split) -> None:
    x, y, new, _ = digits
    few = OnlineClassifier(learner="knn").partial_fit(x[:50], y[:50])
    before = few.predict_proba(new)
    few.feedback(x[50:60], few.predict(x[50:60]), np.zeros(10, bool))
    np.testing.assert_array_equal(few.predict_proba(new), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda few: few.partial_fit([[1.0, 2.0, 3.0]], ["a"]), "3 features"),
        (lambda few: few.partial_fit([[1.0, np.nan]], ["a"]), "NaN"),
        (lambda few: few.partial_fit([[1.0, 2.0]], [None]), "label at index 0 is missing"),
        (lambda few: few.partial_fit([[1.0, 2.0]], ["a", "b"]), "inconsistent numbers"),
        (lambda few: few.partial_fit([[1.0, 2.0]], [3]), "labels of type int64"),
        (lambda few: few.partial_fit([[1.0, 2.0]] * 3, ["c", "d", "e"]), "in_all 4: 5 classes"),
        (lambda few: few.partial_fit([[1.0, 2.0]], ["c"], classes=["d", "e"]), "in_all 4: 5 classes"),
        (lambda few: few.forget("aa"), "unknown class 'aa'"),
        (lambda few: few.forget("a").forget("b"), "no other class"),
        (lambda few: few.feedback([[1.0, 2.0]], ["z"], [True]), "unknown class 'z'"),
        (lambda few: few.feedback([[1.0, 2.0]], ["a"], [1]), "not booleans"),
        (lambda few: few.feedback([[1.0, 2.0]], ["a"], [True, False]), "inconsistent numbers"),
        (lambda _: OnlineClassifier(per_class=0).partial_fit([[1.0]], ["a"]), "per_class 0"),
        (lambda _: OnlineClassifier(in_all=1).fit([[1.0], [2.0]], ["a", "b"]), "in_all 1: 2 classes"),
        (lambda _: OnlineClassifier().forget("a"), "not fitted"),
    ],
)
def test_bad_input_is_named_and_nothing_is_learned(call: Any, message: str) -> None:
    few = OnlineClassifier(in_all=4).partial_fit([[0.0, 1.0], [1.0, 0.0]], ["a", "b"])
    before = few.predict_proba([[0.2, 0.1]])
    with pytest.raises(ValueError, match=message):
        call(few)
    if "other class" not in message:
        np.testing.assert_array_equal(few.predict_proba([[0.2, 0.1]]), before)
        assert {label: part.seen for label, part in few.memory_.items()} == {"a": 1, "b": 1}
