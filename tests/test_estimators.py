"""The scikit-learn style estimators: conventions, the three kinds of input, saving, and messages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from metafit import apps, backbones, data
from metafit.apps import FewShotClassifier, FewShotRegressor
from metafit.apps.calibration import held_out, temperature
from metafit.apps.inputs import parts
from metafit.errors import BadInput
from metafit.evaluation.statistics import reliability
from metafit.learners import build
from metafit.task import Examples, Task
from metafit.training import Model, Recipe, save_model

TEXTS = [
    "turn on the kitchen lamp",
    "lights off please",
    "what is the weather",
    "will it rain",
    "play jazz",
    "next song",
]
TOPICS = ["light", "light", "weather", "weather", "music", "music"]


@parametrize_with_checks([FewShotClassifier(), FewShotClassifier(learner="knn"), FewShotRegressor()])
def test_conventions(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def intents() -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    source = data.read("home-intents")
    chosen = source.subset(range(0, 30, 3))
    rows = [torch.nonzero(chosen.y == c)[:, 0] for c in range(10)]
    support, query = torch.cat([r[:5] for r in rows]), torch.cat([r[5:20] for r in rows])
    names = np.array(chosen.classes)
    return (*(([chosen.x[i] for i in part], names[chosen.y[part]]) for part in (support, query)),)  # type: ignore


@pytest.fixture(scope="module")
def fitted(intents: Any) -> FewShotClassifier:
    return FewShotClassifier().fit(*intents[0])


def test_texts_are_learned_with_honest_confidence(fitted: FewShotClassifier, intents: Any) -> None:
    texts, labels = intents[1]
    assert fitted.score(texts, labels) > 0.85
    probabilities = fitted.predict_proba(texts)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    right = fitted.predict(texts) == labels
    calibrated = reliability(torch.tensor(probabilities.max(1)), torch.tensor(right))[0]
    raw = torch.tensor(fitted.predict_log_proba(texts) * fitted.temperature_).softmax(1).max(1).values
    assert calibrated < 0.1 < reliability(raw, torch.tensor(right))[0]


def test_texts_work_in_cross_validation(intents: Any) -> None:
    texts, labels = intents[0]
    assert cross_val_score(FewShotClassifier(learner="centroid"), texts, labels, cv=2).mean() > 0.7


def test_image_files_arrays_and_paths_as_text_agree(tmp_path: Path) -> None:
    from PIL import Image

    digits = data.read("digits")
    rows = torch.cat([torch.nonzero(digits.y == c)[:8, 0] for c in (0, 1, 4)])
    arrays = digits.x[rows, 0].numpy().repeat(4, 1).repeat(4, 2)
    paths = [tmp_path / f"{i}.png" for i in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path)
    y = digits.y[rows].numpy()
    seen = np.arange(24) % 8 < 3
    by_array = FewShotClassifier().fit(arrays[seen], y[seen])
    assert by_array.score(arrays[~seen], y[~seen]) > 0.8
    some = [path for path, first in zip(paths, seen, strict=True) if first]
    by_path = FewShotClassifier().fit(some, y[seen])
    by_name = FewShotClassifier(backbone="efficientnet-lite0").fit([str(path) for path in some], y[seen])
    expected = by_path.predict_proba(paths[:4])
    np.testing.assert_array_equal(by_name.predict_proba([str(path) for path in paths[:4]]), expected)
    np.testing.assert_allclose(by_array.predict_proba(list(arrays[:4])), expected, atol=1e-4)


def test_a_pipeline_and_a_grid_search() -> None:
    x, y = load_iris(return_X_y=True)
    few, many, few_y, many_y = train_test_split(x, y, train_size=15, stratify=y, random_state=0)
    piped = make_pipeline(StandardScaler(), FewShotClassifier()).fit(few, few_y)
    assert piped.score(many, many_y) > 0.85
    few, many, few_y, many_y = train_test_split(x, y, train_size=45, stratify=y, random_state=0)
    search = GridSearchCV(FewShotClassifier(), {"learner": ["linear", "centroid", "knn"]}, cv=3).fit(few, few_y)
    assert search.score(many, many_y) > 0.85
    assert clone(search.best_estimator_).get_params()["learner"] in ("linear", "centroid", "knn")


def test_units_of_the_features_do_not_matter() -> None:
    x, y = load_iris(return_X_y=True)
    units = np.array([1000, 1e-3, 1, 7])
    some = np.r_[0:5, 50:55, 100:105]
    plain, other = (FewShotClassifier().fit(v[some], y[some]).predict_proba(v) for v in (x, x * units + 5))
    np.testing.assert_allclose(plain, other, atol=1e-4)


@pytest.mark.parametrize(
    "labels",
    [["a", "b"], [3, 10], [True, False], [0.0, 2.0], np.array(["x", "yy"], dtype=object), np.array([1, 2], np.int8)],
    ids=["str", "int", "bool", "float", "object", "int8"],
)
def test_labels_of_every_type_come_back_from_disk(labels: Any, tmp_path: Path) -> None:
    y = np.asarray(labels)[[0, 0, 1, 1]]
    few = FewShotClassifier().fit([[0.0], [0.1], [1.0], [1.1]], y)
    few.save(tmp_path)
    again = FewShotClassifier.load(tmp_path)
    assert again.classes_.dtype == few.classes_.dtype
    assert again.predict([[0.0], [1.0]]).tolist() == y[[0, 2]].tolist()


LOAD = """
import sys, numpy as np
from metafit import apps
few = apps.load(sys.argv[1])
x = np.load(sys.argv[2])
np.save(sys.argv[3], few.predict_proba(x.tolist() if x.dtype.kind == "U" else x))
"""


def test_a_new_process_without_the_network_answers_the_same(fitted: Any, intents: Any, tmp_path: Path) -> None:
    texts = np.array(intents[1][0][:20])
    fitted.save(tmp_path / "model")
    np.save(tmp_path / "x.npy", texts)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model"), str(tmp_path / "x.npy"), str(tmp_path / "p.npy")]
    subprocess.run(command, check=True, env=environment)
    np.testing.assert_array_equal(np.load(tmp_path / "p.npy"), fitted.predict_proba(texts.tolist()))
    weights = sum(file.stat().st_size for file in (tmp_path / "model").iterdir())
    assert weights < 1_000_000, "a frozen backbone is named, not stored"


def test_numbers_and_a_gradient_learner_survive_saving(tmp_path: Path) -> None:
    import pandas as pd

    x, y = load_iris(return_X_y=True, as_frame=True)
    few = FewShotClassifier(learner="finetune", options={"steps": 5}, random_state=1).fit(x[::10], y[::10])
    few.save(tmp_path)
    again = apps.load(tmp_path)
    np.testing.assert_array_equal(again.predict_proba(x), few.predict_proba(x))
    assert again.get_params() == few.get_params()
    assert again.feature_names_in_.tolist() == list(x.columns)
    with pytest.raises(ValueError, match="feature names"):
        again.predict(pd.DataFrame(x.to_numpy(), columns=list("abcd")))


def test_regression_of_one_and_of_several_targets(tmp_path: Path) -> None:
    x, y = load_diabetes(return_X_y=True)
    one = FewShotRegressor().fit(x[:100], y[:100])
    assert one.score(x[100:], y[100:]) > 0.4
    several = FewShotRegressor().fit(x[:100], np.stack([y, -2 * y], 1)[:100])
    np.testing.assert_allclose(several.predict(x), np.stack([one.predict(x), -2 * one.predict(x)], 1), rtol=1e-6)
    several.save(tmp_path)
    np.testing.assert_array_equal(FewShotRegressor.load(tmp_path).predict(x), several.predict(x))
    with pytest.raises(BadInput, match="FewShotRegressor"):
        FewShotClassifier.load(tmp_path)


def test_regression_on_texts() -> None:
    few = FewShotRegressor().fit(["terrible", "awful", "good", "excellent"], [1, 1, 4, 5])
    low, high = few.predict(["horrible, very bad", "great, wonderful"])
    assert low < high


def test_a_meta_trained_model_adapts_to_any_number_of_classes(tmp_path: Path) -> None:
    learner = build("protonet", 384, 5)
    with torch.no_grad():
        for p in learner.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    save_model(tmp_path / "learned", learner, Recipe("minilm-l6"))
    few = FewShotClassifier(model=tmp_path / "learned").fit(TEXTS, TOPICS)
    embedded = backbones.load("minilm-l6").embed(TEXTS, progress=False)
    learner.eval().way = 3
    y = torch.tensor([0, 0, 2, 2, 1, 1])
    with torch.no_grad():
        logits = learner.predict(learner.adapt(Examples(embedded, y)), embedded) / few.temperature_
    np.testing.assert_allclose(few.predict_proba(TEXTS), logits.double().softmax(1), atol=1e-5)
    few.save(tmp_path / "adapted")
    np.testing.assert_array_equal(apps.load(tmp_path / "adapted").predict_proba(TEXTS), few.predict_proba(TEXTS))
    with pytest.raises(BadInput, match="leave learner and options out"):
        FewShotClassifier(model=tmp_path / "learned", learner="maml").fit(TEXTS, TOPICS)
    with pytest.raises(BadInput, match="reads texts"):
        FewShotClassifier(model=tmp_path / "learned").fit([[1.0], [2.0]], [0, 1])


def test_a_trained_backbone_is_saved_and_said_to_be_transductive(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"image_size": 16, "width": 8}
    body = backbones.load("conv4", **options)
    save_model(tmp_path / "learned", build("maml", body.out_dim, 4, body), Recipe("conv4", options, trained=True))
    digits = data.read("digits")
    rows = torch.cat([torch.nonzero(digits.y == c)[:4, 0] for c in (0, 1, 2)])
    x, y = digits.x[rows].numpy(), digits.y[rows].numpy()
    few = FewShotClassifier(model=tmp_path / "learned").fit(x, y)
    assert few.transductive_ and few.predict_proba(x).shape == (12, 3)
    few.save(tmp_path / "adapted")
    np.testing.assert_array_equal(apps.load(tmp_path / "adapted").predict_proba(x), few.predict_proba(x))
    with pytest.raises(BadInput, match="at most 4"):
        FewShotClassifier(model=tmp_path / "learned").fit(x[:10], np.arange(10) % 5)


def test_a_transductive_inner_loss_adapts_with_the_queries_of_each_call(tmp_path: Path) -> None:
    """Against the path of a task with those queries; a saved one answers as before."""
    torch.manual_seed(0)
    learner = build("alfa+metal", 4, 3, loss="metal-transductive", steps=2, rate=0.1)
    for parameter in learner.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, y = load_iris(return_X_y=True)
    few = FewShotClassifier(model=Model(learner, Recipe())).fit(x[::10], y[::10])
    assert "query" in few.transductive_
    queries, others = x[1::10], x[1:8]
    asked, support = (few.inputs_.read(few.inputs_.kept(part)) for part in (queries, x[::10]))
    task = Task(Examples(support, torch.as_tensor(y[::10])), Examples(asked, torch.zeros(len(asked), dtype=torch.long)))
    with torch.no_grad():
        wanted = learner.eval().predict(learner.path(task)[-1], asked).div(few.temperature_).softmax(-1)
    np.testing.assert_allclose(few.predict_proba(queries), wanted, atol=1e-5)
    assert np.abs(few.predict_proba(others)[:1] - few.predict_proba(queries)[:1]).max() > 1e-4
    few.save(tmp_path)
    np.testing.assert_array_equal(apps.load(tmp_path).predict_proba(queries), few.predict_proba(queries))
    many = np.concatenate([x, x])[:257]  # more than others are given at once, and one more
    np.testing.assert_allclose(few.predict_proba(many)[::-1], few.predict_proba(many[::-1]), atol=1e-5)


def test_inputs_may_run_backwards_and_parts_are_alike() -> None:
    x, y = load_iris(return_X_y=True)
    few = FewShotClassifier().fit(x[::-10], y[::-10])
    np.testing.assert_array_equal(few.predict(x[::-1]), few.predict(x)[::-1])
    for count, together, sizes in (
        (257, True, [257]),
        (257, False, [128, 129]),
        (2049, True, [683] * 3),
        (3, False, [3]),
    ):
        cut = list(parts(count, together))
        assert [len(range(count)[part]) for part in cut] == sizes
        assert [i for part in cut for i in range(count)[part]] == list(range(count))


def test_a_meta_trained_regressor_with_a_network_of_your_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh())
    learner = build("maml", 8, None, body, steps=5)
    x = np.linspace(-1, 1, 10)[:, None]
    few = FewShotRegressor(model=Model(learner, Recipe(trained=True))).fit(x, x[:, 0])
    few.save(tmp_path)
    other = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh())
    np.testing.assert_array_equal(FewShotRegressor.load(tmp_path, other).predict(x), few.predict(x))
    with pytest.raises(BadInput, match="network of your own"):
        apps.load(tmp_path)
    with pytest.raises(BadInput, match="do not fit"):
        apps.load(tmp_path, torch.nn.Linear(1, 8))
    with pytest.raises(BadInput, match="other estimator"):
        FewShotClassifier(model=Model(learner, Recipe(trained=True))).fit(x, x[:, 0] > 0)


def test_a_backbone_of_your_own(tmp_path: Path) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :3]

    own = backbones.wrap(model, 3, name="first-three")
    x, y = np.random.default_rng(0).normal(size=(8, 2, 4)), np.arange(8) % 2
    few = FewShotClassifier(backbone=own).fit(x, y)
    few.save(tmp_path)
    np.testing.assert_array_equal(apps.load(tmp_path, own).predict(x), few.predict(x))
    with pytest.raises(BadInput, match="pass it as backbone="):
        apps.load(tmp_path)
    with pytest.raises(BadInput, match="other weights"):
        apps.load(tmp_path, backbones.wrap(model, 3, name="another"))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (["a b", "  "], [0, 1], "text at index 1 is empty"),
        (["a b", None], [0, 1], "text at index 1 is empty"),
        (["a b", 3], [0, 1], "index 1 is a int"),
        (["a b", "c d"], ["x", "x"], "1 class only"),
        (["a b", "c d"], ["x", None], "label at index 1 is missing"),
        (["a b", "c d"], np.array(["x", 3], dtype=object), "label"),
        (["a b", "c d"], ["x", "y", "y"], "inconsistent numbers"),
        ("a b", ["x"], "list of texts"),
        (["a.png", "b.png"], ["x", "y"], "pathlib.Path"),
        ([Path("missing-a.png"), Path("missing-b.png")], ["x", "y"], "no such file"),
        ([[1.0, np.nan], [0.0, 1.0]], ["x", "y"], "NaN"),
    ],
)
def test_bad_input_is_named(x: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewShotClassifier().fit(x, y)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"learner": "protonett"}, "did you mean 'protonet'"),
        ({"backbone": None}, "need a backbone"),
        ({"backbone": "efficientnet-lite0"}, "no such file"),
        ({"options": {"strenght": 1}}, "did you mean 'strength'"),
        ({"model": "missing-folder"}, "does not exist"),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        FewShotClassifier(**parameters).fit(TEXTS, TOPICS)


def test_labels_that_look_alike_are_told(capsys: Any) -> None:
    FewShotClassifier().fit([[0.0], [1.0], [2.0]], ["Off", "off ", "on"])
    assert "differ only by blanks or case" in capsys.readouterr().err


def test_the_temperature_follows_the_evidence() -> None:
    """Single examples leave the prior; separable classes sharpen it, labels of pure chance flatten it."""
    learner = build("linear", 2, 2, strength=10.0).double()
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(40) % 2
    noise = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    assert temperature(held_out(learner, Examples(noise[:2], y[:2])), 0.7, 1.0) == 0.7
    chance = temperature(held_out(learner, Examples(noise, y)), 1.0, 1.0)
    clear = temperature(held_out(learner, Examples(noise * 0.01 + torch.nn.functional.one_hot(y, 2), y)), 1.0, 1.0)
    assert clear < 1 < chance


def test_a_regressor_gives_the_means_of_a_gaussian() -> None:
    """Of several targets, in their own units."""
    x = np.linspace(-2, 2, 20)[:, None]
    y = np.concatenate([100 * x, 50 - 10 * x], 1)
    few = FewShotRegressor(learner="dkt", options={"noise": 0.01}).fit(x, y)
    assert few.predict(x).shape == (20, 2)
    assert np.abs(few.predict(x) - y).max() < 2
    values, spread = few.predict([[0.0], [8.0]], return_std=True)
    assert np.array_equal(values, few.predict([[0.0], [8.0]]))
    assert spread.shape == (2, 2) and (spread > 0).all()
    assert (spread[1] > 3 * spread[0]).all(), "less sure far from the examples"
    assert np.allclose(spread[:, 0] / spread[:, 1], 10), "in the targets' units"
    with pytest.raises(BadInput, match=r"return_std.*dkt"):
        FewShotRegressor().fit(x, y).predict(x, return_std=True)


def test_one_text_is_not_a_list_of_letters() -> None:
    few = FewShotClassifier().fit(
        ["lights on", "lamp on", "play jazz", "play rock"], ["light", "light", "song", "song"]
    )
    for wrong in (few.predict, few.predict_proba):
        with pytest.raises(BadInput, match=r"X is one text; pass a list of texts, \[text\] for one"):
            wrong("hello")
