"""Metric-based learners against their closed forms, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn

from metafit.learners import Learner, build
from metafit.learners.base import mask_absent
from metafit.learners.laplacian import affinity
from metafit.learners.logistic import LogisticLearner, newton_step
from metafit.learners.mahalanobis import MahalanobisLearner
from metafit.learners.ridge import RidgeLearner, ridge
from metafit.learners.tim import TIMLearner, balanced
from metafit.task import Examples

N, DIM, WAY = 12, 5, 3


pytestmark = pytest.mark.usefixtures("double")


def support() -> Examples:
    y = torch.arange(N) % WAY
    return Examples(torch.randn(N, DIM) + y[:, None], y)


def answers(learner: Learner, examples: Examples, x: Tensor) -> Tensor:
    with torch.no_grad():
        return learner.eval().predict(learner.adapt(examples), x)


def ones_beside(x: Tensor) -> np.ndarray:
    return torch.cat([x, torch.ones(len(x), 1)], 1).numpy()


@pytest.mark.parametrize("way", [WAY, None])
def test_ridge(way: int | None) -> None:
    known, x = support(), torch.randn(7, DIM)
    if way is None:
        known = known._replace(y=torch.randn(N, 2))
    learner = RidgeLearner(nn.Identity(), way, penalty=0.7, scale=3.0)
    targets = known.y if way is None else F.one_hot(known.y, WAY)
    theirs = Ridge(alpha=0.7, fit_intercept=False).fit(ones_beside(known.x), targets.numpy())
    expected = torch.from_numpy(theirs.predict(ones_beside(x))) * (1 if way is None else 3)
    torch.testing.assert_close(answers(learner, known, x), expected)


def test_ridge_is_the_same_from_both_sides() -> None:
    x, y, penalty = torch.randn(4, 9), torch.randn(4, 2), torch.tensor(0.3)
    wide = ridge(x, y, penalty)
    torch.testing.assert_close(wide, torch.linalg.solve(x.mT @ x + 0.3 * torch.eye(9), x.mT @ y))
    tall = torch.cat([x, torch.zeros(6, 9)])
    torch.testing.assert_close(wide, ridge(tall, torch.cat([y, torch.zeros(6, 2)]), penalty))


def test_logistic_is_the_optimum() -> None:
    known, x = support(), torch.randn(7, DIM)
    learner = LogisticLearner(nn.Identity(), WAY, penalty=0.5, scale=1.3)
    theirs = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-12, max_iter=10_000)
    theirs.fit(1.3 * ones_beside(known.x), known.y.numpy())
    expected = torch.from_numpy(1.3 * ones_beside(x) @ theirs.coef_.T).log_softmax(-1)
    torch.testing.assert_close(answers(learner, known, x).log_softmax(-1), expected, rtol=1e-6, atol=1e-6)


def test_a_newton_step_solves_the_whole_system() -> None:
    """Against the dense matrix of N × way unknowns, with weights, padding and a class that is absent."""
    x, weight, penalty = torch.randn(N, DIM), torch.rand(N) * (torch.arange(N) > 1), torch.tensor(0.2)
    here = torch.tensor([True, False, True])
    kernel, p = x @ x.mT, mask_absent(torch.randn(N, WAY), here).softmax(-1)
    spread = weight[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    dense = (spread[:, :, None, :] * kernel[:, None, :, None]).reshape(N * WAY, N * WAY) + 0.2 * torch.eye(N * WAY)
    value = torch.randn(N, WAY)
    expected = torch.linalg.solve(dense, value.flatten()).view(N, WAY)
    torch.testing.assert_close(newton_step(kernel, p, weight, penalty, value), expected)


@pytest.mark.parametrize("penalty", [1e-3, 10.0])
def test_newton_gets_there(penalty: float) -> None:
    """One more step changes nothing, over separable and inseparable classes."""
    for x in (support().x, torch.randn(N, DIM)):
        known = Examples(x, torch.arange(N) % WAY)
        few, more = (LogisticLearner(nn.Identity(), WAY, penalty, 1.0, newton=n) for n in (15, 60))
        torch.testing.assert_close(answers(few, known, x), answers(more, known, x), rtol=1e-4, atol=1e-4)


def test_mahalanobis() -> None:
    known, x = support(), torch.randn(7, DIM)
    known = known._replace(y=torch.tensor([0] * 6 + [1] * 5 + [2]))  # one example has no covariance of its own
    learner = MahalanobisLearner(nn.Identity(), WAY, ridge=0.4, scale=1.5)
    z, q = 1.5 * known.x.numpy(), 1.5 * x.numpy()
    whole = np.cov(z.T)
    expected = np.empty((7, WAY))
    for k in range(WAY):
        own = z[known.y.numpy() == k]
        share = len(own) / (len(own) + 1)
        spread = share * (np.cov(own.T) if len(own) > 1 else 0) + (1 - share) * whole + 0.4 * np.eye(DIM)
        away = q - own.mean(0)
        expected[:, k] = -0.5 * np.einsum("qi,ij,qj->q", away, np.linalg.inv(spread), away)
    torch.testing.assert_close(answers(learner, known, x), torch.from_numpy(expected))


def test_gaussian_prototypes() -> None:
    known, x = support(), torch.randn(7, DIM)
    learner = build("gaussian-protonet", DIM, WAY, nn.Identity(), temperature=0.5)
    plain = build("protonet", DIM, WAY, nn.Identity(), temperature=0.5)
    torch.testing.assert_close(answers(learner, known, x), answers(plain, known, x))  # before training
    nn.init.normal_(learner.precision.weight)  # type: ignore[union-attr, arg-type]
    s = F.softplus(learner.precision(known.x)).detach()  # type: ignore[operator]
    expected = torch.empty(7, WAY)
    for k in range(WAY):
        own = known.y == k
        mean = (s[own] * known.x[own]).sum(0) / s[own].sum(0)
        expected[:, k] = -(s[own].mean(0) * (x - mean) ** 2).sum(-1) / 0.5
    torch.testing.assert_close(answers(learner, known, x), expected)


def test_matching() -> None:
    known, x = support(), torch.randn(7, DIM)
    learner = build("matching", DIM, WAY, nn.Identity(), temperature=0.3)
    attention = (F.cosine_similarity(x[:, None], known.x, dim=-1) / 0.3).softmax(-1)
    expected = torch.stack([attention[:, known.y == k].sum(-1) for k in range(WAY)], -1)
    torch.testing.assert_close(answers(learner, known, x).exp(), expected)


def test_relation_sees_the_pair() -> None:
    known, x = support(), torch.randn(7, DIM)
    learner = build("relation", DIM, WAY, nn.Identity(), hidden=6)
    first = torch.cat([learner.of_class.weight, learner.of_query.weight], 1)  # type: ignore[union-attr, list-item]
    expected = torch.empty(7, WAY)
    for k in range(WAY):
        pair = torch.cat([known.x[known.y == k].mean(0).expand(7, -1), x], 1)
        hidden = F.relu(F.linear(pair, first, learner.of_class.bias))  # type: ignore[union-attr, arg-type]
        expected[:, k] = learner.last(F.relu(learner.between(hidden)))[:, 0]  # type: ignore[operator]
    torch.testing.assert_close(answers(learner, known, x), expected.detach())


def test_soft_kmeans() -> None:
    known, x = support(), torch.randn(7, DIM)
    learner = build("soft-kmeans", DIM, WAY, nn.Identity(), temperature=2.0)
    means = torch.stack([known.x[known.y == k].mean(0) for k in range(WAY)])
    share = (-(torch.cdist(x, means) ** 2) / 2).softmax(-1)
    moved = torch.stack([(4 * means[k] + share[:, k] @ x) / (4 + share[:, k].sum()) for k in range(WAY)])
    torch.testing.assert_close(answers(learner, known, x), -(torch.cdist(x, moved) ** 2) / 2)


def test_laplacian_lowers_its_objective_round_by_round() -> None:
    known, x = support(), torch.randn(20, DIM)
    alike, found = affinity(x, 3), []
    assert torch.equal(alike, alike.mT) and float(torch.linalg.eigvalsh(alike).min()) > -1e-12
    plain = answers(build("protonet", DIM, WAY, nn.Identity(), temperature=2.0), known, x)
    for rounds in (1, 2, 4, 8, 40):
        learner = build("laplacian", DIM, WAY, nn.Identity(), metric="euclidean", temperature=2.0, smoothness=2.0)
        learner.rounds = rounds  # type: ignore[assignment]
        y = answers(learner, known, x).softmax(-1)
        found.append(float((y * (y.log() - plain)).sum() - (y * (alike @ y)).sum()))
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(found))
    assert found[-1] < found[0] - 1e-3
    before = plain.softmax(-1)
    assert (y * (alike @ y)).sum() > (before * (alike @ before)).sum(), "neighbours agree more than they did"


def test_tim_takes_the_steps_of_its_objective() -> None:
    """A round is a gradient step on λ·CE − (1 + α)·mean Σ q log p (eq. 4, proposition 2), scaled for each class."""
    known, x = support(), F.normalize(torch.randn(20, DIM), dim=-1)
    learner = TIMLearner(nn.Identity(), WAY, temperature=0.5, rounds=1, confidence=0.7, labels=1.4)
    adapted = {name: value.detach() for name, value in learner.adapt(known).items()}
    w = adapted["prototypes"].clone().requires_grad_()
    told, log_p = learner.scores(adapted["known"], w), learner.scores(x, w).log_softmax(-1)
    q = balanced(log_p.detach().exp(), 0.7)
    torch.testing.assert_close(q.sum(-1), torch.ones(20))
    value = 1.4 * F.cross_entropy(told, known.y) - 1.7 * (q * log_p).sum(-1).mean()
    (slope,) = torch.autograd.grad(value, w)
    curvature = (2 / 0.5) * (1.4 * torch.full((WAY, 1), 1 / WAY) + 1.7 * q.mean(0)[:, None])
    torch.testing.assert_close(learner.classifier(adapted, x), w - slope / curvature)


def test_tim_tells_clusters_apart() -> None:
    """It is surer of the queries than after one round, more often right, and gives each class its share."""
    y = torch.arange(30) % WAY
    known, x = support(), F.normalize(torch.eye(WAY, DIM)[y] + 0.3 * torch.randn(30, DIM), dim=-1)
    known = known._replace(x=torch.eye(WAY, DIM)[known.y] + torch.randn(N, DIM))
    first, last = (answers(TIMLearner(nn.Identity(), WAY, rounds=rounds), known, x) for rounds in (1, 50))
    unsure = [-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean() for logits in (first, last)]
    right = [(logits.argmax(-1) == y).double().mean() for logits in (first, last)]
    assert unsure[1] < unsure[0] and right[0] < right[1] and right[1] > 0.9
    torch.testing.assert_close(last.softmax(-1).mean(0), torch.full((WAY,), 1 / WAY), rtol=0, atol=0.1)
