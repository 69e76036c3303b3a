"""Losses: closed forms, neutral starts, and what padding and absent classes must not change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap

from metafit.context import Context
from metafit.errors import BadInput
from metafit.losses import (
    Contrastive,
    CrossEntropy,
    Curriculum,
    Focal,
    GaussianNLL,
    Huber,
    LearnedLoss,
    Loss,
    MeTAL,
    SquaredError,
    UncertaintyWeights,
)
from metafit.losses.contrastive import contrastive

WAY, N, STEPS = 4, 6, 2
PARAMS = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}


def given(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Context]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    seen = {"unlabelled": draw(7, WAY), "unlabelled_weight": torch.ones(7).double()}
    context = Context(0, STEPS, features=draw(N, 5), means=draw(3), **seen)
    return draw(N, WAY), y, torch.tensor([1.0, 1, 2, 1, 0.5, 1]).double(), context


CLASSES = {
    "plain": CrossEntropy,
    "smoothed": lambda: CrossEntropy(smoothing=0.2),
    "weighted": lambda: CrossEntropy(class_weight=torch.tensor([1.0, 2.0, 0.5, 1.0])),
    "focal": Focal,
    "focal, power 1.5": lambda: Focal(1.5),
    "contrastive": Contrastive,
    "learned": lambda: LearnedLoss(WAY),
    "metal": lambda: MeTAL(PARAMS, WAY, STEPS),
    "metal-transductive": lambda: MeTAL(PARAMS, WAY, STEPS, transductive=True),
}


def loss_of(name: str, moved: bool = True) -> Loss:
    torch.manual_seed(0)
    loss = CLASSES[name]().double()
    for parameter in loss.parameters() if moved else ():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return loss


@pytest.mark.parametrize("name", CLASSES)
def test_padding_and_absent_classes_count_for_nothing(name: str) -> None:
    """Padding lies in a class that is absent, so that its own loss is infinite; nor do the derivatives see it."""
    loss, (outputs, y, weight, context) = loss_of(name), given()
    outputs = torch.cat([outputs[:, :3], torch.full((N, 1), -torch.inf, dtype=torch.float64)], 1)
    more = context._replace(features=torch.cat([context.features, torch.ones(2, 5).double()]))
    padded = torch.cat([outputs, outputs[:2]]), torch.cat([y, torch.tensor([3, 3])]), F.pad(weight, (0, 2))
    leaf = padded[0].clone().requires_grad_()
    assert context.unlabelled is not None and context.unlabelled_weight is not None
    seen = torch.cat([context.unlabelled, 9 * context.unlabelled[:2]])
    more = more._replace(unlabelled=seen, unlabelled_weight=F.pad(context.unlabelled_weight, (0, 2)))
    value = loss(leaf, padded[1], padded[2], more)
    torch.testing.assert_close(value, loss(outputs, y, weight, context))
    (first,) = torch.autograd.grad(value, leaf, create_graph=True)
    (second,) = torch.autograd.grad(first[:N, :3].square().sum(), leaf)
    assert first.isfinite().all() and second.isfinite().all() and not first[N:].any()


@pytest.mark.parametrize("name", CLASSES)
def test_derivatives_and_batches(name: str) -> None:
    loss, (outputs, y, weight, context) = loss_of(name), given()

    def of(outputs: Tensor, features: Tensor, means: Tensor) -> Tensor:
        return loss(outputs, y, weight, context._replace(features=features, means=means))

    leaves = [t.clone().requires_grad_() for t in (outputs, context.features, context.means)]
    used = leaves if name in ("contrastive", "metal", "metal-transductive") else leaves[:1]
    rest = leaves[len(used) :]
    assert torch.autograd.gradcheck(lambda *a: of(*a, *rest), used)
    assert torch.autograd.gradgradcheck(lambda *a: of(*a, *rest), used)
    others = [given(seed) for seed in (1, 2)]
    stacked = [torch.stack([o[0] for o in others])] + [
        torch.stack([getattr(o[3], part) for o in others]) for part in ("features", "means")
    ]
    together = vmap(of)(*stacked)
    for t in range(2):
        torch.testing.assert_close(together[t], of(*(s[t] for s in stacked)))


@pytest.mark.parametrize("name", ["learned", "metal", "metal-transductive"])
def test_a_learned_loss_starts_as_the_criterion(name: str) -> None:
    outputs, y, weight, context = given()
    assert torch.equal(
        loss_of(name, moved=False)(outputs, y, weight, context), CrossEntropy()(outputs, y, weight, context)
    )
    moved = loss_of(name)(outputs, y, weight, context)
    assert (moved - CrossEntropy()(outputs, y, weight, context)).abs() > 1e-3
    regression = LearnedLoss(None, 2) if name == "learned" else MeTAL(PARAMS, None, STEPS, outputs=2)
    values, targets = torch.randn(2, N, 2, dtype=torch.float64).unbind()
    mine = regression.double()(values, targets, weight, context)
    assert torch.equal(mine, SquaredError()(values, targets, weight, context))


def test_metal_has_networks_of_its_own_at_each_step_and_adapts_them_to_the_task() -> None:
    loss, (outputs, y, weight, context) = loss_of("metal"), given()
    values = [loss(outputs, y, weight, context._replace(step=step)) for step in range(4)]
    assert values[0] != values[1] and values[1] == values[2] == values[3], "later steps take the last"
    assert loss(outputs, y, weight, context._replace(means=-context.means)) != values[0]
    with pytest.raises(BadInput, match="MeTAL looks at the parameters"):
        loss(outputs, y, weight, Context())
    with pytest.raises(BadInput, match="transductive MeTAL is for classes"):
        MeTAL(PARAMS, None, STEPS, transductive=True)


def test_the_contrastive_term_counts_weights_as_so_many_examples_and_takes_a_feature_of_zeros() -> None:
    torch.manual_seed(0)
    features, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2])
    features[1] = 0  # what a ReLU can leave of an example, or padding
    weight = torch.tensor([1.0, 2, 1, 3, 0]).double()
    often = torch.tensor([0, 1, 1, 2, 3, 3, 3])
    features.requires_grad_()
    value = contrastive(features, y, weight, 0.5)
    z = torch.where(features[often].norm(dim=1, keepdim=True) > 0, F.normalize(features[often], dim=1), 0.0)
    terms = []
    for i in range(7):
        others = [j for j in range(7) if j != i]
        bottom = torch.stack([(z[i] @ z[j] / 0.5).exp() for j in others]).sum().log()
        alike = [bottom - z[i] @ z[j] / 0.5 for j in others if y[often[i]] == y[often[j]]]
        terms += [torch.stack(alike).mean()] if alike else []
    torch.testing.assert_close(value, torch.stack(terms).mean())
    (first,) = torch.autograd.grad(value, features, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), features)
    assert first.isfinite().all() and second.isfinite().all()
    half = [contrastive(features, y, weight * w, 0.5) for w in (1 - 1e-9, 1 + 1e-9)]
    torch.testing.assert_close(half[0], half[1])  # no jump at a whole number
    assert contrastive(features, y, 0.5 * torch.ones_like(weight), 0.5).isfinite()


def test_metal_is_its_formula() -> None:
    """The state of the authors' code, in NumPy: an independent implementation, with networks that have been trained."""
    loss, (outputs, y, weight, context) = loss_of("metal-transductive"), given()
    assert context.means is not None and context.unlabelled is not None
    values = {name: p.detach().numpy() for name, p in loss.named_parameters()}
    counted = context._replace(unlabelled_weight=torch.tensor([1.0, 2, 0, 1, 1, 0, 3]).double())

    def normal(rows: np.ndarray, w: np.ndarray) -> np.ndarray:
        mean = np.average(rows.mean(1), weights=w)
        return (rows - mean) / np.sqrt(np.average(np.square(rows - mean).mean(1), weights=w) + 1e-6)

    def run(name: str, x: np.ndarray, layers: int, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
        for layer in range(layers):
            w, b = (values[f"{name}.{2 * layer}.{part}"] for part in ("weight", "bias"))
            w, b = ((1 + scale[2 * layer + i]) * v + shift[2 * layer + i] for i, v in enumerate((w, b)))
            x = x @ w.T + b
            x = x / (1 + np.exp(-x)) if layer < layers - 1 else x
        return x

    def part(name: str, states: np.ndarray, task: np.ndarray, w: np.ndarray) -> float:
        changes = run(f"{name}.adapter", task, 2, np.zeros(4), np.zeros(4))
        return float(np.average(run(f"{name}.loss", states, 3, changes[:6], changes[6:])[:, 0], weights=w))

    plain = CrossEntropy()(outputs, y, weight, context)
    task = np.array([float(plain), *context.means])
    states = np.concatenate([np.tile(task, (N, 1)), outputs, np.eye(WAY)[y]], 1)
    w = weight.numpy()
    expected = float(plain) + part("labelled.0", normal(states, w), normal(task[None], np.ones(1))[0], w)
    p = context.unlabelled.softmax(-1).numpy()
    queries = np.concatenate([np.tile(context.means, (7, 1)), context.unlabelled, -(p * np.log(p)).sum(1)[:, None]], 1)
    w = counted.unlabelled_weight.numpy()  # type: ignore[union-attr]
    expected += part("unlabelled.0", normal(queries, w), np.average(normal(queries, w), 0, w), w)
    torch.testing.assert_close(loss(outputs, y, weight, counted).item(), expected, rtol=1e-12, atol=0)


def test_metal_stays_in_single_precision_when_its_gradient_is_differentiated_forwards() -> None:
    outputs, direction = torch.randn(5, 3), torch.randn(5, 3)
    metal, y, weight = MeTAL({"a": torch.ones(2), "b": torch.ones(1)}, 3, 1), torch.arange(5) % 3, torch.ones(5)

    def loss(outputs: Tensor) -> Tensor:
        return metal(outputs, y, weight, Context(means=outputs[:2, 0]))

    assert jvp(grad(loss), (outputs,), (direction,))[1].dtype == torch.float32


def test_closed_forms() -> None:
    outputs, y, weight, context = given()
    p = outputs.softmax(-1)[torch.arange(N), y]
    mean = lambda values: (weight * values).sum() / weight.sum()  # noqa: E731
    smooth = F.cross_entropy(outputs, y, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(CrossEntropy(0.2)(outputs, y, weight, context), mean(smooth))
    by_class = torch.tensor([1.0, 2, 0.5, 1]).double()
    expected = (weight * by_class[y] * -p.log()).sum() / (weight * by_class[y]).sum()
    torch.testing.assert_close(CrossEntropy(class_weight=by_class)(outputs, y, weight, context), expected)
    torch.testing.assert_close(Focal(2.0)(outputs, y, weight, context), mean(-((1 - p) ** 2) * p.log()))
    torch.testing.assert_close(Focal(0.0)(outputs, y, weight, context), CrossEntropy()(outputs, y, weight, context))
    values, targets = outputs[:, :2], 3 * outputs[:, 2:]
    off = (values - targets).abs()
    huber = torch.where(off <= 0.7, off.square() / 2, 0.7 * (off - 0.35)).mean(-1)
    torch.testing.assert_close(Huber(0.7)(values, targets, weight, context), mean(huber))
    density = torch.distributions.Normal(outputs[:, :2], (outputs[:, 2:] / 2).exp()).log_prob(targets).sum(-1)
    torch.testing.assert_close(GaussianNLL()(outputs, targets, weight, context), mean(-density))


def test_the_contrastive_term_by_its_sums() -> None:
    outputs, y, _, context = given()
    y, ones = torch.tensor([0, 0, 1, 1, 1, 2]), torch.ones(N, dtype=torch.float64)
    z, total, counted = F.normalize(context.features, dim=-1), 0.0, 0
    for i in range(N):
        alike = [j for j in range(N) if j != i and y[j] == y[i]]
        if alike:
            all_of = sum((z[i] @ z[j] / 0.1).exp() for j in range(N) if j != i)
            total = total - sum(((z[i] @ z[j] / 0.1).exp() / all_of).log() for j in alike) / len(alike)
            counted += 1
    entropy = CrossEntropy()(outputs, y, ones, context)
    torch.testing.assert_close(Contrastive(0.3)(outputs, y, ones, context), entropy + 0.3 * total / counted)
    with pytest.raises(BadInput, match="looks at features"):
        Contrastive()(outputs, y, ones, Context())


def test_a_curriculum_tells_its_loss_how_far_training_is() -> None:
    class Told(CrossEntropy):
        done = None

        def advance(self, done: float) -> None:
            self.done = done

    told = Told()
    Curriculum(told, start=1.0).advance(0.25)
    assert told.done == 0.25


def test_a_curriculum_looks_at_what_its_loss_looks_at() -> None:
    outputs, y, weight, context = given()
    metal = MeTAL(PARAMS, WAY, STEPS, transductive=True).double()
    loss = Curriculum(metal, start=1.0).eval()
    assert loss.transductive and loss.reads_means and not loss.moves_features
    assert loss.parameters_at(1).keys() == {f"loss.{name}" for name in metal.parameters_at(1)}
    assert torch.equal(loss(outputs, y, weight, context), metal(outputs, y, weight, context))
    assert Curriculum(Contrastive(), start=1.0).moves_features


def test_a_curriculum_weighs_hard_tasks_less_and_ends_with_none() -> None:
    outputs, y, weight, context = given()
    outputs.requires_grad_()

    def value_and_slope(loss: Loss) -> tuple[Tensor, Tensor]:
        value = loss(outputs, y, weight, context)
        return value.detach(), torch.autograd.grad(value, outputs)[0]

    loss = Curriculum(CrossEntropy(), start=1.0, temperature=0.5)
    plain, slope = value_and_slope(loss.loss)
    for done, share in (
        (0.0, torch.sigmoid((1.0 - plain) / 0.5)),
        (0.5, torch.sigmoid((2.0 - plain) / 0.5)),
        (1.0, 1.0),
    ):
        loss.advance(done)
        value, weighed = value_and_slope(loss)
        assert torch.equal(value, plain), "what is reported is the loss"
        torch.testing.assert_close(weighed, share * slope)
    loss.advance(0.0)
    assert torch.equal(value_and_slope(loss.eval())[1], slope)
    hard = torch.tensor(3.5, requires_grad=True)  # in single precision, far above the bar
    weight_of = Curriculum(_Itself(), start=1.0)
    (small,) = torch.autograd.grad(weight_of(hard, y, weight, context), hard)
    assert float(small) == pytest.approx(math.exp(-25), rel=1e-5)


class _Itself(Loss):
    """Its outputs are the loss."""

    def forward(self, outputs: Tensor, y: Tensor, weight: Tensor, context: Context) -> Tensor:
        return outputs


@pytest.mark.parametrize("loss", [SquaredError(), Huber(0.7), GaussianNLL()])
def test_regression_losses_are_differentiated_forward_over_backward(loss: Loss) -> None:
    """As the implicit gradient and mixed mode do; against differences of the gradient."""
    targets = torch.tensor([[0.3], [-2.0], [0.1], [4.0]], dtype=torch.float64)
    width = 2 if isinstance(loss, GaussianNLL) else 1
    outputs = torch.linspace(-1, 1, 4 * width, dtype=torch.float64).view(4, width)
    direction, weight, step = torch.cos(5 * outputs), torch.tensor([1.0, 2.0, 0.0, 1.0]).double(), 1e-6
    slope = grad(lambda o: loss(o, targets, weight, Context()))
    found = jvp(slope, (outputs,), (direction,))[1]
    expected = (slope(outputs + step * direction) - slope(outputs - step * direction)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_families_weigh_by_their_uncertainty() -> None:
    weigh = UncertaintyWeights(2).double()
    losses, family = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([0, 1, 1])
    assert torch.equal(weigh(losses, family), losses)
    weigh.log_variance.data = torch.tensor([0.0, 1.0]).double()
    e = torch.tensor(-1.0).double().exp()
    torch.testing.assert_close(weigh(losses, family), torch.stack([losses[0], e * 2 + 0.5, e * 4 + 0.5]))


def test_the_learned_variance_is_that_of_the_likelihood() -> None:
    """Kendall's model of classes: at the optimum over σ² of L/σ² + log σ, σ² is 2·L."""
    weigh, losses = UncertaintyWeights(1).double(), torch.tensor([3.0]).double()
    weigh.log_variance.data = torch.tensor([2 * 3.0]).double().log()
    (slope,) = torch.autograd.grad(weigh(losses, torch.tensor([0])).sum(), weigh.log_variance)
    torch.testing.assert_close(slope, torch.zeros(1).double())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_examples_that_are_surely_right_have_finite_derivatives(gamma: float) -> None:
    outputs = torch.tensor([[60.0, 0.0, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = Focal(gamma)(outputs, torch.zeros(2, dtype=torch.long), torch.ones(2).double(), Context())
    (first,) = torch.autograd.grad(loss, outputs, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), outputs)
    assert first.isfinite().all() and second.isfinite().all()
    assert first[0].abs().max() < 1e-9 < first[1].abs().max()


@pytest.mark.parametrize("loss", [SquaredError(), Huber(), GaussianNLL()])
def test_targets_of_another_shape_are_refused(loss: Loss) -> None:
    outputs = torch.randn(4, 2 if isinstance(loss, GaussianNLL) else 1)
    with pytest.raises(BadInput, match=r"targets of shape \(4,\) for outputs \(4, 1\): give y as \(N, D\)"):
        loss(outputs, torch.randn(4), torch.ones(4), Context())


@pytest.mark.parametrize(
    "bad",
    [
        lambda: CrossEntropy(1.0),
        lambda: CrossEntropy(class_weight=torch.tensor([1.0, -1.0])),
        lambda: Focal(-0.5),
        lambda: Huber(0.0),
        lambda: Contrastive(-1),
        lambda: Curriculum(CrossEntropy(), start=-1.0),
        lambda: MeTAL(PARAMS, WAY, steps=0),
    ],
)
def test_bad_settings(bad: object) -> None:
    with pytest.raises(BadInput, match=r"needs? "):
        bad()  # type: ignore[operator]


def test_class_weights_for_another_number_of_classes() -> None:
    outputs, y, weight, context = given()
    with pytest.raises(BadInput, match="class_weight: 2 for 4 classes"):
        CrossEntropy(class_weight=torch.ones(2).double())(outputs, y, weight, context)
