"""Heads of the gradient-based learner, and what goes between its body and its head."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metafit.learners import build
from metafit.learners.checks import check_learner
from metafit.learners.film import Film
from metafit.learners.heads import CosineHead, CosinePrototypeHead, PrototypeHead
from metafit.learners.meta_dropout import MetaDropout
from metafit.over_tasks import meta_gradient, over_tasks
from metafit.task import Examples, Task, take

DIM, WAY = 4, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_cosine_head_sees_directions_alone() -> None:
    torch.manual_seed(0)
    head, z = CosineHead(DIM, WAY, scale=7.0).double(), randn(5, DIM)
    expected = 7 * F.cosine_similarity(z[:, None], head.weight[None], dim=-1)
    torch.testing.assert_close(head(z), expected)
    longer = {"weight": head.weight * torch.tensor([[0.1], [1.0], [9.0]]).double(), "scale": head.scale}
    torch.testing.assert_close(functional_call(head, longer, (3 * z,)), expected)
    named = dict(head.named_parameters())

    def called(*values: Tensor) -> Tensor:
        return functional_call(head, dict(zip(named, values, strict=True)), (z,))

    assert torch.autograd.gradcheck(called, (*named.values(),))


def test_the_cosine_head_gives_a_zero_feature_no_class() -> None:
    head, z = CosineHead(DIM, WAY).double(), torch.zeros(1, DIM, dtype=torch.float64, requires_grad=True)
    logits = head(z)
    assert torch.equal(logits, torch.zeros(1, WAY, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(logits[0, 0], z)
    assert gradient.isfinite().all()


SUPPORT_Y, SUPPORT_WEIGHT = torch.tensor([0, 2, 0, 2, 0, 1]), torch.tensor([1, 1, 1, 1, 1, 0]).double()  # 1 is absent


def started(features: Tensor, y: Tensor = SUPPORT_Y, weight: Tensor = SUPPORT_WEIGHT) -> dict[str, Tensor]:
    return PrototypeHead(DIM, WAY).double().start(features, y, weight)


def test_the_prototype_head_starts_as_minus_squared_distances() -> None:
    """Up to what the classes share: ‖z‖², of the query."""
    features, z = randn(6, DIM), randn(5, DIM, seed=1)
    params = started(features)
    logits = functional_call(PrototypeHead(DIM, WAY).double(), params, (z,))
    for c, rows in {0: [0, 2, 4], 2: [1, 3]}.items():
        centre = features[rows].mean(0)
        torch.testing.assert_close(params["weight"][c], 2 * centre)
        torch.testing.assert_close(params["bias"][c], -centre.square().sum())
        torch.testing.assert_close(logits[:, c], z.square().sum(-1) - (z - centre).square().sum(-1))
    assert not params["weight"][1].any() and not params["bias"][1].any(), "an absent class has zeros"
    head = PrototypeHead(DIM, WAY)
    assert {n: (tuple(p.shape), p.requires_grad) for n, p in head.named_parameters()} == {
        "weight": ((WAY, DIM), True),
        "bias": ((WAY,), True),
    }


def test_the_prototype_head_weighs_examples_and_does_not_see_padding() -> None:
    features, weight = randn(6, DIM), torch.tensor([1.0, 1.0, 3.0, 1.0, 0.0, 0.0]).double()
    centre = (features[0] + 3 * features[2]) / 4
    torch.testing.assert_close(started(features, weight=weight)["weight"][0], 2 * centre)
    far = torch.cat([features, 1e3 * randn(4, DIM, seed=2)])
    y, zeros = torch.cat([SUPPORT_Y, torch.tensor([0, 1, 2, 2])]), torch.zeros(4).double()
    torch.testing.assert_close(started(far, y, torch.cat([weight, zeros])), started(features, weight=weight))


def test_the_start_of_the_prototype_head_is_differentiated_and_batched() -> None:
    features = randn(2, 6, DIM)
    one = features[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda f: tuple(started(f).values()), one)
    assert torch.autograd.gradgradcheck(lambda f: tuple(started(f).values()), one)
    ys, weights = torch.stack([SUPPORT_Y, SUPPORT_Y.flip(0)]), torch.stack([SUPPORT_WEIGHT, SUPPORT_WEIGHT.flip(0)])
    together = torch.vmap(started)(features, ys, weights)
    for t in range(2):
        alone = started(features[t], ys[t], weights[t])
        torch.testing.assert_close({n: v[t] for n, v in together.items()}, alone)


def test_the_cosine_prototype_head_sees_directions_and_its_sharpness_does_not_adapt() -> None:
    features, z = randn(6, DIM), randn(5, DIM, seed=1)
    head = CosinePrototypeHead(DIM, WAY, sharpness=7.0).double()
    logits = functional_call(head, head.start(features, SUPPORT_Y, SUPPORT_WEIGHT), (z,))
    for c, rows in {0: [0, 2, 4], 2: [1, 3]}.items():
        centre = F.normalize(features[rows], dim=-1).mean(0)
        expected = 7 * (1 - (F.normalize(z, dim=-1) - centre).square().sum(-1))
        torch.testing.assert_close(logits[:, c], expected)
    learner = build("maml", DIM, WAY, nn.Linear(DIM, DIM), head="cosine-prototype")
    assert set(learner.initial()) == {"body.weight", "body.bias", "head.weight", "head.bias"}
    assert "model.head.stretch.log_sharpness" in dict(learner.named_parameters())


def test_film_starts_as_the_body_and_scales_and_shifts_it() -> None:
    torch.manual_seed(0)
    body, x = nn.Linear(2, DIM).double(), randn(5, 2)
    film = Film(body, DIM).double()
    torch.testing.assert_close(film(x), body(x), rtol=0, atol=0)
    gamma, beta = randn(DIM, seed=1), randn(DIM, seed=2)
    torch.testing.assert_close(
        functional_call(film, {"gamma": gamma, "beta": beta}, (x,)), (1 + gamma) * body(x) + beta
    )
    gradients = torch.autograd.grad(film(x).sum(), (film.gamma, film.beta))
    torch.testing.assert_close(gradients, (body(x).sum(0), torch.full((DIM,), 5.0).double()))


def moved(seed: int = 0) -> MetaDropout:
    module = MetaDropout(DIM).double()
    module.mean.weight.data, module.mean.bias.data = 0.5 * randn(DIM, DIM, seed=seed), randn(DIM, seed=seed + 1)
    return module


def test_meta_dropout_starts_as_the_identity_and_is_certain_in_evaluation_mode() -> None:
    z = randn(5, DIM)
    torch.testing.assert_close(MetaDropout(DIM).double().eval()(z), z, rtol=1e-14, atol=0)
    module = moved().eval()
    mean = z @ module.mean.weight.T + module.mean.bias
    torch.testing.assert_close(module(z), z * (1 + mean.exp()).log() / math.log(2))
    parameters = dict(module.named_parameters())
    given = (z.requires_grad_(), *parameters.values())

    def called(z: Tensor, *values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(parameters, values, strict=True)), (z,))

    assert torch.autograd.gradcheck(called, given) and torch.autograd.gradgradcheck(called, given)


def test_the_noise_of_meta_dropout() -> None:
    """Mean and variance of softplus(μ + ε) / log 2 within five standard errors of those by quadrature."""
    draws, bias = 100_000, torch.tensor([-1.0, 0.0, 1.0, 3.0]).double()
    module = MetaDropout(DIM).double()
    module.mean.bias.data = bias
    torch.manual_seed(0)
    noise = module(torch.ones(draws, DIM, dtype=torch.float64)).detach()
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(80))
    values = F.softplus(bias[:, None] + nodes) / math.log(2)
    mean, square = ((values**k * weights).sum(1) / weights.sum() for k in (1, 2))
    assert ((noise.mean(0) - mean).abs() < 5 * noise.std(0) / draws**0.5).all()
    spread = (noise - mean).square()
    assert ((spread.mean(0) - (square - mean**2)).abs() < 5 * spread.std(0) / draws**0.5).all()
    correlation = torch.corrcoef(noise.T) - torch.eye(DIM)
    assert correlation.abs().max() < 5 / draws**0.5, "each element has its own"


def test_each_task_has_its_own_dropout() -> None:
    torch.manual_seed(0)
    out = over_tasks(MetaDropout(DIM).double(), torch.ones(2, 3, DIM, dtype=torch.float64), "vmap")
    assert not torch.equal(out[0], out[1])


def tasks() -> Task:
    def examples(shot: int, seed: int) -> Examples:
        y = torch.arange(WAY).repeat(shot).expand(3, -1).clone()
        return Examples(randn(3, WAY * shot, DIM, seed=seed), y, torch.ones(3, WAY * shot, dtype=torch.float64))

    return Task(examples(2, 3), examples(3, 4))


@pytest.mark.parametrize("scope", ["all", "head"])
def test_meta_dropout_perturbs_support_sets_alone(scope: str) -> None:
    torch.manual_seed(0)
    learner = build("maml", DIM, WAY, nn.Linear(DIM, DIM), scope=scope, meta_dropout=True).double().train()
    learner.model.noise = moved()
    support, query = take(tasks(), 0)
    first, second = learner.adapt(support), learner.adapt(support)
    assert (learner.predict(first, query.x) - learner.predict(second, query.x)).abs().max() > 1e-3
    assert torch.equal(learner.predict(first, query.x), learner.predict(first, query.x))
    body, head = (learner.model.get_submodule(part) for part in ("body", "head"))
    plain = functional_call(nn.Sequential(OrderedDict(body=body, head=head)), first["parameters"], (query.x,))
    torch.testing.assert_close(learner.predict(first, query.x), plain)
    _, _, gradients = meta_gradient(learner, tasks())
    assert gradients["model.noise.mean.bias"].abs().min() > 1e-4, "it is meta-learned"
    learner.eval()
    torch.testing.assert_close(learner.adapt(support), learner.adapt(support), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_meta_dropout_is_meta_learned_through_the_noise(backend: Any) -> None:
    """The derivative at one draw of the noise, against central differences."""
    torch.manual_seed(0)
    module = moved()
    body = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), module)
    learner = build("maml", DIM, WAY, body, scope="body.0.*", rate=0.5, steps=2).double().train()

    def drawn() -> Tensor:
        torch.manual_seed(1)
        return meta_gradient(learner, tasks(), backend)[0]

    torch.manual_seed(1)
    gradient = meta_gradient(learner, tasks(), backend)[2]["model.body.2.mean.bias"]
    for i in range(DIM):
        ends = []
        for step in (1e-5, -2e-5):
            module.mean.bias.data[i] += step
            ends.append(drawn())
        module.mean.bias.data[i] += 1e-5
        torch.testing.assert_close(gradient[i], (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-8)
    assert gradient.abs().min() > 1e-4


@pytest.mark.parametrize(
    "options", [{"head": "cosine"}, {"head": "prototype"}, {"head": "cosine-prototype"}, {"scope": "film"}]
)
def test_a_learner_of_these_parts_keeps_the_contract(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(DIM, 5), nn.Tanh())
    learner = build("maml", 5, WAY + 1, body, rate=0.3, steps=2, **options).double().eval()
    for parameter in learner.parameters():  # as after some training
        parameter.data += 0.1 * torch.randn_like(parameter)
    check_learner(learner, tasks())
