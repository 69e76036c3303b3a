"""Learners that tell a Gaussian: neural processes and the deep-kernel Gaussian process."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern
from torch import nn
from torch.distributions import MultivariateNormal

from metafit.data import GaussianProcesses
from metafit.data.randomness import keys
from metafit.errors import BadInput
from metafit.evaluation import evaluate
from metafit.learners import build
from metafit.learners.attention import Attention
from metafit.learners.deep_kernel import DeepKernelLearner
from metafit.task import Examples, Task, take
from metafit.training import meta_train

pytestmark = pytest.mark.usefixtures("double")


def learner() -> DeepKernelLearner:
    made = DeepKernelLearner(nn.Identity(), length=0.7, noise=0.3)
    made.log_scale.data.fill_(0.2)
    return made


def test_the_posterior_is_that_of_the_process() -> None:
    x, y, asked = torch.randn(8, 2), torch.randn(8, 1), torch.randn(5, 2)
    with torch.no_grad():
        told = learner().predict(learner().adapt(Examples(x, y)), asked)
    kernel = ConstantKernel(np.exp(0.4)) * RBF(0.7)
    theirs = GaussianProcessRegressor(kernel, alpha=0.09, optimizer=None).fit(x.numpy(), y[:, 0].numpy())
    mean, deviation = theirs.predict(asked.numpy(), return_std=True)
    torch.testing.assert_close(told[:, 0], torch.from_numpy(mean))
    torch.testing.assert_close(told[:, 1].exp(), torch.from_numpy(deviation**2 + 0.09))


class Own(NamedTuple):
    """Functions of the process that ``learner`` is."""

    batch: int = 100
    way: None = None
    shot: int = 6
    query: int = 6
    seed: int = 0

    def tasks(self, start: int, stop: int) -> Task:
        torch.manual_seed(start)
        x = torch.rand(stop - start, 12, 1) * 4
        with torch.no_grad():
            covariance = torch.stack([learner().kernel(one, one) for one in x]) + 0.09 * torch.eye(12)
        y = MultivariateNormal(torch.zeros(12), covariance).sample()[..., None]
        return Task(*(Examples(x[:, p], y[:, p], torch.ones(stop - start, 6)) for p in (slice(6), slice(6, 12))))


def test_the_intervals_of_the_process_hold_as_many_targets_as_they_say() -> None:
    made = evaluate(learner(), Own(), 500, show_progress=False)
    assert made.metrics()["ece"]["mean"] < 0.015
    sure = learner()
    sure.log_noise.data -= 1.0
    found = evaluate(sure, Own(), 500, show_progress=False)
    assert found.metrics()["ece"]["mean"] > 0.1
    assert all(row["accuracy"] < row["confidence"] for row in found.calibration())


def test_training_maximises_the_marginal_likelihood() -> None:
    """Of both sets together, whatever is padding."""
    x, y = torch.randn(9, 2), torch.randn(9, 2)
    weight = torch.tensor([1.0, 1, 1, 0, 1, 1])
    task = Task(Examples(x[:6], y[:6], weight), Examples(x[6:], y[6:], torch.ones(3)))
    made = learner().train()
    counts = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8])
    covariance = made.kernel(x[counts], x[counts]) + 0.09 * torch.eye(8)
    density = MultivariateNormal(torch.zeros(8), covariance)
    expected = -sum(density.log_prob(y[counts, d]) for d in range(2)) / 8
    torch.testing.assert_close(made.loss(task)[0], expected)


def test_attention_is_torchs() -> None:
    ours, theirs = Attention(8, heads=2), nn.MultiheadAttention(8, 2, batch_first=True)
    layers = (ours.query, ours.key, ours.value)
    theirs.in_proj_weight.data.copy_(torch.cat([layer.weight for layer in layers]))
    theirs.in_proj_bias.data.copy_(torch.cat([layer.bias for layer in layers]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    asking, known, values = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5, 8)
    weight = torch.tensor([1.0, 0, 1, 1, 0])
    expected, _ = theirs(asking, known, values, key_padding_mask=weight == 0)
    torch.testing.assert_close(ours(asking, known, values, weight), expected)


@pytest.mark.parametrize("name", ["cnp", "anp", "tnp"])
def test_a_query_says_nothing_about_another(name: str) -> None:
    made = build(name, 1, None).double().eval()
    task = take(GaussianProcesses().draw(0), 0)
    with torch.no_grad():
        adapted = made.adapt(task.support)
        together = made.predict(adapted, task.query.x[:4])
        alone = torch.cat([made.predict(adapted, x[None]) for x in task.query.x[:4]])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("kernel", ["rbf", "matern", "periodic"])
def test_draws_have_the_covariance_that_they_say(kernel: Any) -> None:
    """Whitened by it, they are standard normal: mean 0, variance 1, uncorrelated."""
    tasks = GaussianProcesses(kernel, most=10)
    made = tasks.tasks(0, 4000)
    x = torch.cat([made.support.x, made.query.x], 1)[..., 0]
    y = torch.cat([made.support.y, made.query.y], 1)[..., 0]
    factor = torch.linalg.cholesky(tasks._covariance(x, keys(0, torch.arange(4000))))
    white = torch.linalg.solve_triangular(factor, y[..., None], upper=False)[..., 0]
    assert white.mean().abs() < 0.02
    torch.testing.assert_close(white.T @ white / 4000, torch.eye(12), rtol=0, atol=0.1)


def test_the_kernels_are_scikit_learns() -> None:
    x = torch.linspace(-1, 1, 7)[None]
    for kernel, theirs in (("rbf", RBF), ("matern", lambda length: Matern(length, nu=2.5))):
        tasks = GaussianProcesses(kernel)  # type: ignore[arg-type]
        found = tasks._covariance(x, torch.tensor([5]))[0]
        correlation = (found - 0.02**2 * torch.eye(7)) / (found[0, 0] - 0.02**2)
        fits = [
            np.abs(theirs(length)(x.numpy().T) - correlation.numpy()).max()  # type: ignore[no-untyped-call]
            for length in np.linspace(0.1, 0.6, 5001)
        ]
        assert min(fits) < 1e-3


def test_tasks_are_a_function_of_their_number() -> None:
    tasks = GaussianProcesses()
    whole, part = tasks.tasks(0, 6), tasks.tasks(3, 5)
    for a, b in zip(take(whole, slice(3, 5)), part, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.weight, b.weight)
    sizes = tasks.tasks(0, 500)
    support, query = sizes.support.weight.sum(1), sizes.query.weight.sum(1)
    assert support.min() == 3 and support.max() == 46 and query.min() == 3 and (support + query).max() <= 49


@pytest.mark.parametrize("name", ["cnp", "anp", "tnp", "dkt"])
def test_it_learns_to_tell_a_function_from_its_points(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    made = build(name, 1, None, **({} if name == "dkt" else {"width": 32}))
    tasks, validation = GaussianProcesses(), GaussianProcesses(seed=1)
    training = meta_train(made, tasks, validation, steps=300, rate=3e-3, validate_every=50)
    values = [row["validation"] for row in training.history]
    assert min(values) < 0.9 * values[0], values


def test_an_unknown_kernel_is_told() -> None:
    with pytest.raises(BadInput, match="unknown kernel 'rbff': did you mean 'rbf'"):
        GaussianProcesses("rbff")  # type: ignore[arg-type]
