"""Each learner against its closed form, or against somebody else's code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafit.errors import BadInput
from metafit.learners import (
    ENTRIES,
    GradientLearner,
    LinearLearner,
    NeighbourLearner,
    PrototypeLearner,
    build,
    entry,
)
from metafit.losses import CrossEntropy, SquaredError
from metafit.optim import SGD, MetaSGD
from metafit.over_tasks import meta_gradient, over_tasks
from metafit.task import Examples, Task, take

pytestmark = pytest.mark.usefixtures("double")


def support_of(n: int = 12, dim: int = 5, way: int = 3) -> tuple[Examples, np.ndarray, np.ndarray]:
    x, y = torch.randn(n, dim), torch.arange(n) % way
    return Examples(x, y), x.numpy(), y.numpy()


def rows(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def tasks_of(outputs: int | None = None, tasks: int = 3, dim: int = 5, way: int = 3) -> Task:
    def examples(n: int) -> Examples:
        y = (torch.arange(n) % way).expand(tasks, -1).clone() if outputs is None else torch.randn(tasks, n, outputs)
        return Examples(torch.randn(tasks, n, dim), y, torch.ones(tasks, n))

    return Task(examples(6), examples(9))


# -- metric


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_euclidean_prototypes(temperature: float) -> None:
    support, x, y = support_of()
    queries = torch.randn(7, 5)
    means = np.stack([x[y == c].mean(0) for c in range(3)])
    learner = PrototypeLearner(nn.Identity(), 3, "euclidean", temperature)
    adapted = learner.adapt(support)
    np.testing.assert_allclose(adapted["prototypes"], means, rtol=1e-12)
    distances = ((queries.numpy()[:, None] - means) ** 2).sum(-1)
    np.testing.assert_allclose(learner.predict(adapted, queries).detach(), -distances / temperature, rtol=1e-10)


def test_cosine_prototypes() -> None:
    support, x, y = support_of()
    queries = torch.randn(7, 5)
    means = rows(np.stack([rows(x)[y == c].mean(0) for c in range(3)]))
    learner = PrototypeLearner(nn.Identity(), 3, "cosine", 0.1)
    expected = rows(queries.numpy()) @ means.T / 0.1
    np.testing.assert_allclose(learner.predict(learner.adapt(support), queries).detach(), expected, rtol=1e-10)


def test_the_zero_vector_has_cosine_zero() -> None:
    support, *_ = support_of()
    learner = PrototypeLearner(nn.Identity(), 3, "cosine", 0.1)
    zero = torch.zeros(1, 5, requires_grad=True)
    logits = learner.predict(learner.adapt(support), zero)
    assert not logits.any()
    logits.square().sum().backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("k", [1, 3, 100])
@pytest.mark.parametrize("way", [3, None])
def test_neighbours_by_brute_force(k: int, way: int | None) -> None:
    support, x, y = support_of()
    targets = torch.randn(12, 2)
    if way is None:
        support = support._replace(y=targets)
    queries = torch.randn(7, 5)
    learner = NeighbourLearner(nn.Identity(), way, k, temperature=0.5)
    found = learner.predict(learner.adapt(support), queries)
    known, asked = (x, queries.numpy()) if way is None else (rows(x), rows(queries.numpy()))
    for q in range(7):
        distances = ((known - asked[q]) ** 2).sum(1)
        nearest = np.argsort(distances)[:k]
        share = np.exp(-distances[nearest] / 0.5) / np.exp(-distances[nearest] / 0.5).sum()
        if way is None:
            np.testing.assert_allclose(found[q], share @ targets.numpy()[nearest], rtol=1e-9)
        else:
            votes = np.array([share[y[nearest] == c].sum() for c in range(3)])
            np.testing.assert_allclose(found[q].exp(), votes + 1e-3, rtol=1e-9)


# -- linear


@pytest.mark.parametrize("way", [2, 3])
def test_logistic_regression_is_scikit_learns(way: int) -> None:
    from sklearn.linear_model import LogisticRegression

    support, x, y = support_of(way=way)
    weight = torch.rand(12) + 0.5
    queries = torch.randn(7, 5)
    learner = LinearLearner(nn.Identity(), way + 1, strength=2.0)  # a class more than the support set has
    logits = learner.predict(learner.adapt(support._replace(weight=weight)), queries)
    model = LogisticRegression(C=2.0, max_iter=1000).fit(x, y, sample_weight=weight.numpy())
    np.testing.assert_allclose(logits.softmax(-1)[:, :way], model.predict_proba(queries.numpy()), rtol=1e-9)
    assert (logits[:, way] == -torch.inf).all()


def test_ridge_regression_is_scikit_learns() -> None:
    from sklearn.linear_model import Ridge

    x, y, weight = torch.randn(12, 5), torch.randn(12, 2), torch.rand(12)
    learner = LinearLearner(nn.Identity(), None, strength=4.0)
    found = learner.predict(learner.adapt(Examples(x, y, weight)), x)
    model = Ridge(alpha=0.25).fit(x.numpy(), y.numpy(), sample_weight=weight.numpy())
    np.testing.assert_allclose(found, model.predict(x.numpy()), rtol=1e-9)


def test_some_classes_of_many() -> None:
    """Class 0 and 2 of four: the binary case of scikit-learn, in the right places."""
    x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    learner = LinearLearner(nn.Identity(), 4)
    logits = learner.predict(learner.adapt(Examples(x, torch.tensor([0, 0, 2, 2]))), x)
    assert logits.argmax(-1).tolist() == [0, 0, 2, 2] and (logits[:, [1, 3]] == -torch.inf).all()


# -- gradient


def linear_task(seed: int) -> tuple[Task, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    xs, xq = torch.randn(6, 4, generator=generator), torch.randn(8, 4, generator=generator)
    ys, yq = torch.randn(6, 1, generator=generator), torch.randn(8, 1, generator=generator)
    return Task(Examples(xs, ys), Examples(xq, yq)), xs, ys, xq, yq


@pytest.mark.parametrize("outer", ["unrolled", "first_order"])
@pytest.mark.parametrize("steps", [1, 3])
def test_maml_on_linear_regression_in_closed_form(outer: Any, steps: int) -> None:
    """y = w·x: w' = (I − αH)ˢ w + …, H = 2XᵀX/N: the meta-gradient is (I − αH)ˢ ∇L_query(w'), or ∇L_query(w')."""
    task, xs, ys, xq, yq = linear_task(0)
    rate, w = 0.07, torch.randn(4, 1)
    head = nn.Linear(4, 1, bias=False)
    head.weight.data = w.T.clone()
    learner = GradientLearner(nn.Identity(), head, None, optimizer=SGD(rate), outer=outer, steps=steps)
    hessian, pull = 2 * xs.T @ xs / 6, 2 * xs.T @ ys / 6
    adapted = w
    for _ in range(steps):
        adapted = adapted - rate * (hessian @ adapted - pull)
    at_query = 2 * xq.T @ (xq @ adapted - yq) / 8
    through = torch.eye(4) - rate * hessian
    expected = torch.linalg.matrix_power(through, steps) @ at_query if outer == "unrolled" else at_query
    batch = Task(*(Examples(part.x[None], part.y[None]) for part in task))
    for backend in ("loop", "vmap"):
        loss, metrics, gradients = meta_gradient(learner, batch, backend)
        torch.testing.assert_close(loss, (xq @ adapted - yq).square().mean(), rtol=1e-10, atol=0)
        torch.testing.assert_close(gradients["model.head.weight"], expected.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(metrics["mse"], loss)


def test_a_learned_rate_has_the_gradient_of_the_step() -> None:
    """dL/dα of one step is −∇L_query(w')·∇L_support(w)."""
    task, xs, ys, xq, yq = linear_task(1)
    head = nn.Linear(4, 1, bias=False)
    learner = GradientLearner(nn.Identity(), head, None, optimizer=SGD(0.1, learned=True))
    w = head.weight.detach().T
    at_support = 2 * xs.T @ (xs @ w - ys) / 6
    at_query = 2 * xq.T @ (xq @ (w - 0.1 * at_support) - yq) / 8
    _, _, gradients = meta_gradient(learner, Task(*(Examples(p.x[None], p.y[None]) for p in task)))
    torch.testing.assert_close(gradients["optimizer.rate"], -(at_query * at_support).sum())


def test_trajectory_holds_every_step() -> None:
    tasks = tasks_of()
    learner = build("maml", 5, 3, nn.Linear(5, 5), steps=2, test_steps=4)
    support = take(tasks.support, 0)
    assert len(learner.trajectory(support)) == 3
    learner.eval()
    path = learner.trajectory(support)
    assert len(path) == 5
    torch.testing.assert_close(learner.adapt(support), path[-1])
    losses = [F.cross_entropy(learner.predict(adapted, support.x), support.y).item() for adapted in path]
    assert losses == sorted(losses, reverse=True), "each step lowers the support loss"
    torch.testing.assert_close(path[0]["parameters"], dict(learner.model.named_parameters()))


def test_anil_is_maml_on_the_head() -> None:
    """The cached body gives the same numbers as adapting the head of the whole model."""
    tasks = tasks_of()
    torch.manual_seed(1)
    body, head = nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 3)
    anil = GradientLearner(body, head, 3, "head", SGD(0.3), steps=3)
    # adapting the body at rate 0 too computes it at every step
    whole = GradientLearner(body, head, 3, "all", lambda params: MetaSGD(params, 0.0), steps=3)
    for name in ("weight", "bias"):
        whole.optimizer.rates[f"head/{name}"].data.fill_(0.3)
    assert not anil.body_adapts and whole.body_adapts and set(anil.adapting) == {"head.weight", "head.bias"}
    for backend in ("loop", "vmap"):
        loss, metrics, gradients = meta_gradient(anil, tasks, backend)
        expected_loss, expected_metrics, expected = meta_gradient(whole, tasks, backend)
        torch.testing.assert_close((loss, metrics), (expected_loss, expected_metrics), rtol=1e-7, atol=1e-10)
        for name, value in gradients.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9)


def test_what_does_not_adapt_is_computed_once() -> None:
    calls = []

    class Body(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    task = take(tasks_of(), 0)
    GradientLearner(Body(5, 4), nn.Linear(4, 3), 3, "head", steps=7).loss(task)
    assert calls == [6, 9]
    calls.clear()
    GradientLearner(Body(5, 4), nn.Linear(4, 3), 3, "all", steps=7).loss(task)
    assert calls == [6] * 7 + [9]


def test_meta_sgd_with_one_rate_is_maml() -> None:
    tasks, (body, head) = tasks_of(), (nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 3))
    maml = GradientLearner(body, head, 3, "all", SGD(0.25), steps=2)
    meta_sgd = GradientLearner(body, head, 3, "all", lambda params: MetaSGD(params, 0.25), steps=2)
    expected = meta_gradient(maml, tasks)
    loss, _, gradients = meta_gradient(meta_sgd, tasks)
    torch.testing.assert_close(loss, expected[0])
    for name, value in expected[2].items():
        torch.testing.assert_close(gradients[name], value)
    # and the gradient of a rate, by differences
    for key in ("body/0/weight", "head/bias"):
        rate = meta_sgd.optimizer.rates[key]
        place, ends = (0,) * rate.ndim, []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                rate[place] += step
                ends.append(over_tasks(meta_sgd.loss, tasks)[0].mean())
        difference = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(gradients[f"optimizer.rates.{key}"][place], difference, rtol=1e-6, atol=1e-9)


def test_meta_sgd_draws_its_rates() -> None:
    rates = MetaSGD({"w": torch.zeros(1000)}, (0.005, 0.1)).rates["w"]
    assert 0.005 <= float(rates.detach().min()) < 0.01 and 0.09 < float(rates.detach().max()) < 0.1


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("all", ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "head.weight", "head.bias"]),
        ("head", ["head.weight", "head.bias"]),
        ("body", ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"]),
        ("norm", ["body.1.weight", "body.1.bias"]),
        ("*.bias", ["body.0.bias", "body.1.bias", "head.bias"]),
        ("body.0.*", ["body.0.weight", "body.0.bias"]),
    ],
)
def test_scopes(scope: str, names: list[str]) -> None:
    body = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))
    learner = GradientLearner(body, nn.Linear(4, 3), 3, scope)
    assert list(learner.adapting) == names
    adapted = learner.adapt(take(tasks_of().support, 0))["parameters"]
    before = dict(learner.model.named_parameters())
    assert list(adapted) == names and all(not torch.equal(adapted[name], before[name]) for name in names)
    body.requires_grad_(False)
    if scope == "all":
        assert GradientLearner(body, nn.Linear(4, 3), 3, scope).adapting == ("head.weight", "head.bias")


def test_errors_of_the_gradient_learner() -> None:
    make = lambda **options: GradientLearner(nn.Linear(5, 4), nn.Linear(4, 3), 3, **options)  # noqa: E731
    with pytest.raises(BadInput, match=r"scope 'layer9' matches no trainable parameter; choose all.*body\.weight"):
        make(scope="layer9")
    with pytest.raises(BadInput, match="scope 'norm' matches no"):
        make(scope="norm")
    with pytest.raises(BadInput, match="steps 0: needs at least 1 inner step"):
        make(steps=0)
    with pytest.raises(BadInput, match="outer gradient 'second': choose"):
        make(outer="second")


# -- losses


def test_losses_count_by_weight() -> None:
    logits, y = torch.tensor([[2.0, 0.0, -torch.inf], [0.0, 1.0, -torch.inf], [0.0, 0.0, -torch.inf]]), [0, 1, 2]
    weight = torch.tensor([1.0, 3.0, 0.0])
    expected = (np.log1p(np.exp(-2)) + 3 * np.log1p(np.exp(-1))) / 4
    assert float(CrossEntropy()(logits, torch.tensor(y), weight, None)) == pytest.approx(expected)
    outputs = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert float(SquaredError()(outputs, torch.zeros(2, 2), torch.tensor([1.0, 1.0]), None)) == 2.5


# -- catalogue


def test_before_training_features_are_what_they_were() -> None:
    """Over frozen features, a meta-trained metric learner starts where the frozen centroid stands."""
    task = take(tasks_of(), 0)
    frozen, trained = (build(name, 5, 3).eval() for name in ("centroid", "protonet"))
    answers = [learner.predict(learner.adapt(task.support), task.query.x) for learner in (frozen, trained)]
    assert torch.equal(*(a.argmax(-1) for a in answers))


@pytest.mark.parametrize("name", ["maml", "alfa+metal", "finetune", "scratch", "mann", "snail", "caml"])
def test_the_unit_of_frozen_features_does_not_matter(name: str) -> None:
    """One backbone's features are 1 long, another's 17: a step of the same rate would diverge on one of them."""
    torch.manual_seed(0)
    learner = build(name, dim=6, way=3).double().eval()
    x, y, query = torch.randn(6, 6).double(), torch.arange(6) % 3, torch.randn(4, 6).double()
    once, larger = (learner.predict(learner.adapt(Examples(unit * x, y)), unit * query) for unit in (1.0, 17.0))
    torch.testing.assert_close(larger, once, rtol=1e-9, atol=1e-9)


def test_baselines_have_nothing_to_meta_train() -> None:
    for name, line in ENTRIES.items():
        if not line.meta_trained and name not in ("finetune", "scratch"):
            assert not any(p.requires_grad for p in build(name, 5, 3, nn.Linear(5, 5)).parameters())


@pytest.mark.parametrize("name", ["centroid", "knn", "linear", "finetune", "scratch"])
def test_baselines_leave_the_network_to_others(name: str) -> None:
    """Built over a network that others train, a baseline neither freezes it nor follows it."""
    body, task = nn.Linear(5, 5), take(tasks_of(), 0)
    baseline = build(name, 5, 3, body).eval()
    before = baseline.predict(baseline.adapt(task.support), task.query.x)
    assert all(p.requires_grad for p in body.parameters())
    body.weight.data.zero_()
    assert torch.equal(baseline.predict(baseline.adapt(task.support), task.query.x), before)


def test_from_scratch_forgets_the_body() -> None:
    body = nn.Linear(5, 5)
    learner = build("scratch", 5, 3, body)
    assert not torch.equal(learner.model.body.weight, body.weight)
    assert learner.model.body.weight.shape == (5, 5)


def test_from_scratch_forgets_what_no_layer_draws_for_itself() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)
            self.where, self.scale = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.ones(4))

    body = Positions()
    anew = dict(build("scratch", 4, 3, body).model.body.named_parameters())
    kept = {name for name, p in body.named_parameters() if torch.equal(p, anew[name])}
    assert kept == {"scale", "attention.in_proj_bias"}, "all the same, as before any training"
    where = anew["where"]
    assert abs(float(where.mean() - body.where.mean())) < 2 and 0.3 < float(where.std() / body.where.std()) < 3


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_are_documented_and_rebuilt_from_their_recipe(name: str) -> None:
    line = entry(name)
    assert line.title and line.paper and type(line.options()) is dict
    options = {"steps": 2} if "steps" in line.options() else {}
    way = 3 if "classification" in line.tasks else None
    learner = build(name, 5, way, nn.Linear(5, 5), **options)
    recipe = learner.recipe
    again = build(recipe["name"], recipe["dim"], recipe["way"], nn.Linear(5, 5), recipe["outputs"], **recipe["options"])
    assert again.state_dict().keys() == learner.state_dict().keys()


def test_errors_of_the_catalogue() -> None:
    with pytest.raises(BadInput, match="unknown learner 'protonett': did you mean 'protonet'"):
        build("protonett", 5, 3)
    with pytest.raises(BadInput, match="unknown option of learner 'maml' 'step'"):
        build("maml", 5, 3, step=3)
    with pytest.raises(BadInput, match=r"learner 'protonet' does not do regression; choose one of: .*maml"):
        build("protonet", 5, None)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("knn", {"k": 0}),
        ("knn", {"k": 2.5}),
        ("knn", {"temperature": 0}),
        ("linear", {"strength": -1}),
        ("linear", {"strength": "big"}),
        ("protonet", {"temperature": 0}),
        ("protonet", {"dropout": 2}),
        ("maml", {"steps": 0}),
        ("maml", {"steps": 1.5}),
        ("finetune", {"rate": "fast"}),
    ],
)
def test_values_that_an_option_cannot_have(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=str(*options.values())):
        build(name, 5, 3, **options)


def test_transductive_learners_say_so() -> None:
    plain, batch = nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5, track_running_stats=False))
    running = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    said = [build("protonet", 5, 3, body).transductive for body in (plain, batch, running)]
    assert said == ["", "batch normalisation over the query set", ""]
