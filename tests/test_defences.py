"""Defences against overfitting: around the update rule, and on the batch of tasks before the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafit.context import Context
from metafit.data.views import Affine, Erase, Jitter, Mirror
from metafit.errors import BadInput
from metafit.learners import build
from metafit.learners.checks import check_learner, pad
from metafit.losses import CrossEntropy
from metafit.optim import SGD, Adam, DropGrad, EarlyStop, MetaOptimizer, Proximal
from metafit.over_tasks import meta_gradient, over_tasks
from metafit.task import Examples, Task
from metafit.training.augment import MLTI, Augment, MetaMix, Noise, PermuteLabels, Views

RATE, DRAWS = 0.25, 200_000  # a rate without rounding
Params = dict[str, Tensor]


def run(rule: MetaOptimizer, params: Params, gradient: Callable[[Params], Params], steps: int) -> Params:
    state = rule.init(params)
    for step in range(steps):
        params, state = rule.update(params, gradient(params), state, Context(step, steps))
    return params


def start(*batch: int) -> Params:
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (3, 2), "bias": (3,)}
    return {n: torch.randn(*batch, *s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def quadratic(params: Params) -> Params:
    """The gradient of Σ h/2·(θ − 1)² with h = 0.5 and 2."""
    return {"weight": 0.5 * (params["weight"] - 1), "bias": 2.0 * (params["bias"] - 1)}


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_drop_grad_multiplies_by_noise_of_mean_one(kind: Any, rate: float) -> None:
    """Mean 1 and variance p/(1 − p), within five standard errors; none in evaluation mode."""
    rule, zeros = DropGrad(SGD(1.0), rate, kind).double(), {"x": torch.zeros(DRAWS, dtype=torch.float64)}
    torch.manual_seed(0)
    noise = -run(rule, zeros, lambda _: {"x": torch.ones(DRAWS, dtype=torch.float64)}, 1)["x"]
    variance = rate / (1 - rate)
    square = (noise - 1).square()
    assert abs(float(noise.mean()) - 1) < 5 * (variance / DRAWS) ** 0.5
    assert abs(float(square.mean()) - variance) < 5 * float(square.std()) / DRAWS**0.5 + 1e-12
    if kind == "bernoulli":
        assert set(noise.unique().tolist()) == {0.0, 1 / (1 - rate)}
    else:
        assert abs(float(((noise - 1) ** 3).mean())) < 5 * (15 * variance**3 / DRAWS) ** 0.5, "symmetric"
    torch.testing.assert_close(run(rule.eval(), start(), quadratic, 3), run(SGD(1.0), start(), quadratic, 3))


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
def test_each_task_draws_its_own_noise(kind: Any) -> None:
    rule, ones = DropGrad(SGD(1.0), 0.5, kind).double(), torch.ones(2, 50, dtype=torch.float64)
    torch.manual_seed(0)
    after = over_tasks(lambda x: run(rule, {"x": x}, lambda _: {"x": torch.ones_like(x)}, 1)["x"], ones, "vmap")
    assert not torch.equal(after[0], after[1])


@pytest.mark.parametrize("steps", [1, 4])
def test_proximal_descends_to_between_the_optimum_and_the_start(steps: int) -> None:
    """θ_K = θ* + (1 − r(h + λ))^K·(θ₀ − θ*) with θ* = (h·1 + λ·θ₀)/(h + λ), which is differentiated in θ₀, too."""
    strength, first = 0.75, {n: v.requires_grad_() for n, v in start().items()}
    after = run(Proximal(SGD(RATE), strength).double(), first, quadratic, steps)
    for n, h in {"weight": 0.5, "bias": 2.0}.items():
        left = (1 - RATE * (h + strength)) ** steps
        optimum = (h + strength * first[n]) / (h + strength)
        torch.testing.assert_close(after[n], optimum + left * (first[n] - optimum))
        (derivative,) = torch.autograd.grad(after[n].sum(), first[n], retain_graph=True)
        torch.testing.assert_close(derivative, torch.full_like(derivative, (strength + left * h) / (h + strength)))


def test_a_task_that_stopped_stays_as_it_is() -> None:
    """On h/2·(θ − 1)² the gradient shrinks by 1 − r·h a step: the step at which it is small enough is known."""
    tolerance, shrinks = 0.1, 1 - RATE * 0.5
    distances = torch.tensor([8.0, 1.0, 0.1], dtype=torch.float64)
    rule = EarlyStop(SGD(RATE), tolerance).double()

    def walk(distance: Tensor) -> Tensor:
        return run(rule, {"weight": 1 + distance, "bias": torch.ones_like(distance)}, quadratic, 20)["weight"]

    taken = [next(k for k in range(21) if k == 20 or 0.5 * d * shrinks**k < tolerance) for d in distances.tolist()]
    assert taken == [20, 13, 0]
    expected = 1 + distances * shrinks ** torch.tensor(taken, dtype=torch.float64)
    torch.testing.assert_close(over_tasks(walk, distances, "vmap"), expected)
    torch.testing.assert_close(over_tasks(walk, distances, "loop"), expected)


def test_stopping_is_for_good_and_looks_at_the_whole_gradient() -> None:
    rule, params = EarlyStop(SGD(RATE), 1.0).double(), {n: torch.zeros(1, dtype=torch.float64) for n in "ab"}
    sizes = iter([0.8, 0.5, 100.0])  # the norms are √2 times as large: 1.13, then below 1
    after = run(rule, params, lambda p: dict.fromkeys(p, torch.tensor([next(sizes)], dtype=torch.float64)), 3)
    torch.testing.assert_close(after, {n: torch.tensor([-0.8 * RATE], dtype=torch.float64) for n in "ab"})


@pytest.mark.parametrize("inner", [lambda: SGD(RATE, momentum=0.5), lambda: Adam(RATE)], ids=["momentum", "adam"])
@pytest.mark.parametrize("wrap", [lambda r: DropGrad(r, 0.0), lambda r: Proximal(r, 0.0), lambda r: EarlyStop(r, 0.0)])
def test_without_strength_a_defence_is_its_rule(wrap: Any, inner: Any) -> None:
    rule = wrap(inner()).double()
    assert [n for n, _ in rule.named_parameters()] == ["rule.rate"], "the rule's parameters are its own"
    expected = run(inner().double(), start(3), quadratic, 4)
    torch.testing.assert_close(run(rule, start(3), quadratic, 4), expected)
    torch.testing.assert_close(torch.vmap(lambda p: run(rule, p, quadratic, 4))(start(3)), expected)


def blobs(way: int = 3, count: int = 3, dim: int = 4, seed: int = 0) -> Task:
    """Tasks of the classes 0 to way − 1; 2 and 3 examples each."""
    generator = torch.Generator().manual_seed(seed)

    def examples(shot: int) -> Examples:
        x = torch.randn(count, way * shot, dim, generator=generator, dtype=torch.float64)
        y = torch.arange(way).repeat(shot).expand(count, -1).clone()
        return Examples(x, y, torch.ones(count, way * shot, dtype=torch.float64))

    return Task(examples(2), examples(3))


def test_a_learner_with_every_defence_keeps_the_contract() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    options = {"rate": 0.3, "steps": 3, "drop_grad": 0.2, "proximal": 0.5}
    made = build("maml", 5, 4, body, early_stop=0.5, **options).double()
    loss = meta_gradient(made.eval(), blobs(), "loop")[0]
    other = meta_gradient(build("maml", 5, 4, body, **options).double().eval(), blobs(), "loop")[0]
    assert loss != other, "some tasks stop, of which one at once"
    assert len({float(meta_gradient(made.train(), blobs(), "vmap")[0]) for _ in range(3)}) == 3, "noise in training"
    check_learner(made, blobs())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DropGrad(SGD(), 1.0), "drop_grad 1.0"),
        (lambda: DropGrad(SGD(), -0.1), "drop_grad -0.1"),
        (lambda: DropGrad(SGD(), 0.1, "uniform"), "noise 'uniform': choose 'gaussian' or 'bernoulli'"),  # type: ignore
        (lambda: Proximal(SGD(), -1.0), "proximal -1.0"),
        (lambda: EarlyStop(SGD(), -1.0), "early_stop -1.0"),
        (lambda: MetaMix(0.0), "MetaMix: strength 0.0"),
        (lambda: MLTI(-1.0), "MLTI: strength -1.0"),
        (lambda: Noise(-1.0), "Noise: scale -1.0"),
    ],
)
def test_strengths_that_there_are_not(make: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make()


def seeded(augment: Augment, tasks: Task, seed: int = 0) -> Task:
    return augment(tasks, torch.Generator().manual_seed(seed))


def targets(tasks: Task, slope: Tensor) -> Task:
    """The same inputs with targets that are linear in them, in the same way for all tasks."""
    return Task(*(part._replace(y=part.x @ slope) for part in tasks))


AUGMENTS = [PermuteLabels(3), MetaMix(0.5), MLTI(0.5), Noise(0.1), Views([Jitter(0.1, 0.1)])]


@pytest.mark.parametrize("augment", AUGMENTS)
def test_a_defence_is_repeatable_and_changes_nothing_in_place(augment: Any) -> None:
    tasks, before = blobs(), blobs()
    first, again, other = (seeded(augment, tasks, seed) for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(first, other)
    torch.testing.assert_close(tasks, before, rtol=0, atol=0)


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("name", ["protonet", "maml"])
def test_padding_counts_for_nothing(augment: Any, name: str) -> None:
    """Padding of absurd inputs: the loss after the defence is that without padding."""
    torch.manual_seed(0)
    learner, tasks = build(name, 4, 4, nn.Linear(4, 4)).double().eval(), blobs()

    def padded(examples: Examples) -> Examples:
        more = pad(examples, 3)
        return more._replace(x=torch.where(more.weight[..., None] > 0, more.x, 1e3))  # type: ignore[index]

    wide = Task(*map(padded, tasks))
    if isinstance(augment, MetaMix):  # what is drawn depends on the number of rows of the other set
        wide = wide._replace(query=tasks.query)
    if isinstance(augment, Noise):
        wide = wide._replace(support=tasks.support)
    losses = [over_tasks(learner.loss, seeded(augment, given), "loop")[0] for given in (tasks, wide)]
    torch.testing.assert_close(*losses)


def test_labels_are_permuted_the_same_in_support_and_query() -> None:
    tasks = blobs(count=6000)
    made, seen = seeded(PermuteLabels(3), tasks), Counter[tuple[int, ...]]()
    new = made.support.y[:, :3]  # of the classes 0, 1 and 2
    for before, after in zip(tasks, made, strict=True):
        torch.testing.assert_close(after.y, new.gather(1, before.y), rtol=0, atol=0)
        assert after.x is before.x
    seen.update(map(tuple, new.tolist()))
    assert len(seen) == 6 and all(sorted(order) == [0, 1, 2] for order in seen)
    assert all(abs(number - 1000) < 5 * (6000 * 5 / 36) ** 0.5 for number in seen.values()), "all as often"


def test_permuted_labels_are_the_same_task_to_a_learner_that_masks_absent_classes() -> None:
    learner, tasks = build("protonet", 4, 5).double().eval(), blobs()  # of 5 classes, two are absent
    made = seeded(PermuteLabels(5), tasks)
    assert not torch.equal(made.query.y, tasks.query.y)
    torch.testing.assert_close(*(over_tasks(learner.loss, t, "loop")[0] for t in (tasks, made)))


def test_meta_mix_lists_a_mixed_query_twice_for_its_soft_label() -> None:
    tasks, counts = blobs(), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64).expand(3, -1)
    weight = torch.rand(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tasks = Task(tasks.support._replace(weight=counts), tasks.query._replace(weight=weight))
    made = seeded(MetaMix(2.0), tasks).query
    (x, again), (own, other), (first, second) = (part.chunk(2, 1) for part in made)
    torch.testing.assert_close(x, again, rtol=0, atol=0)
    torch.testing.assert_close(own, tasks.query.y, rtol=0, atol=0)
    torch.testing.assert_close(first + second, weight)
    share, chosen = first / weight, set()
    unmixed = (x - share[..., None] * tasks.query.x) / (1 - share[..., None])
    for t in range(3):
        distance, row = torch.cdist(unmixed[t], tasks.support.x[t]).min(1)
        assert (distance < 1e-8).all() and torch.equal(tasks.support.y[t][row], other[t])
        chosen |= set(row.tolist())
    assert chosen == {0, 1, 3, 4}, "padding is not mixed in"
    logits = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    soft = share[0, :, None] * F.one_hot(own[0], 3) + (1 - share[0, :, None]) * F.one_hot(other[0], 3)
    expected = -(weight[0, :, None] * soft * logits.log_softmax(-1)).sum() / weight[0].sum()
    args = (torch.cat([logits, logits]), made.y[0], made.weight[0], Context())  # type: ignore[index]
    torch.testing.assert_close(CrossEntropy()(*args), expected)


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_shares_are_of_the_beta_distribution(strength: float) -> None:
    """Mean 1/2, variance 1/(4(2a + 1)) and the fourth central moment, within five standard errors."""
    one = Examples(torch.zeros(1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.long))
    queries = Examples(torch.zeros(1, DRAWS, 1, dtype=torch.float64), torch.zeros(1, DRAWS, dtype=torch.long))
    share = seeded(MetaMix(strength), Task(one, queries)).query.weight[0, :DRAWS]  # type: ignore[index]
    variance = 1 / (4 * (2 * strength + 1))
    fourth = 3 * variance**2 * (1 - 2 / (2 * strength + 3))
    assert abs(float(share.mean()) - 0.5) < 5 * (variance / DRAWS) ** 0.5
    assert abs(float(share.var()) - variance) < 5 * ((fourth - variance**2) / DRAWS) ** 0.5
    assert abs(float((share - 0.5).pow(4).mean()) - fourth) < 5 * (0.5**8 / DRAWS) ** 0.5


@pytest.mark.parametrize("augment", [MetaMix(0.5), MLTI(0.5)])
def test_regression_targets_are_mixed_as_the_inputs_are(augment: Any) -> None:
    slope = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tasks = targets(blobs(), slope)
    made = seeded(augment, tasks)
    assert made.query.y.shape == tasks.query.y.shape and (made.query.x - tasks.query.x).abs().mean() > 0.1
    for part in made:
        torch.testing.assert_close(part.y, part.x @ slope)


def numbered(task: int, classes: list[int], weight: list[float]) -> Examples:
    """Examples that tell their task, class and rank among those of it that count."""
    ranks = [sum(w for c, w in zip(classes[:i], weight[:i], strict=True) if c == k) for i, k in enumerate(classes)]
    x = [[task, c, r, 1.0] if w else [torch.nan] * 4 for c, r, w in zip(classes, ranks, weight, strict=True)]
    return Examples(torch.tensor(x, dtype=torch.float64), torch.tensor(classes), torch.tensor(weight).double())


def test_mlti_pairs_examples_of_the_same_class_and_rank() -> None:
    """In any order, of any number: ranks are counted over again, and what has no counterpart stays as it is."""
    parts = [
        numbered(0, [0, 1, 0, 1, 2, 2], [1, 1, 1, 1, 1, 1]),
        numbered(1, [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]),  # padding first; three of class 0, none of class 2
    ]
    stacked = Examples(*map(torch.stack, zip(*parts, strict=True)))  # type: ignore[arg-type]
    made = seeded(MLTI(2.0), Task(stacked, stacked))
    torch.testing.assert_close(made.support, made.query, rtol=0, atol=0, equal_nan=True)
    x, (first, second) = made.support.x, stacked.x
    share = 1 - x[0, 0, 0]  # of task 0; of task 1 it is the first coordinate itself
    assert 0.02 < float(share) < 0.98
    mixed = [share * first[i] + (1 - share) * second[j] for i, j in enumerate([3, 1, 4, 2])]
    torch.testing.assert_close(x[0], torch.stack([*mixed, first[4], first[5]]))
    share = x[1, 1, 0]
    mixed = [share * second[i] + (1 - share) * first[j] for i, j in enumerate([1, 3, 0, 2, 0], start=1)]
    torch.testing.assert_close(x[1, 1:], torch.stack(mixed))
    torch.testing.assert_close(made.support[1:], stacked[1:], rtol=0, atol=0)


def test_mlti_mixes_every_task_with_another() -> None:
    x = torch.eye(5, dtype=torch.float64)[:, None].expand(5, 3, 5)  # an input tells its task
    part = Examples({"a": x, "b": (2 * x,)}, torch.zeros(5, 3, dtype=torch.long))
    partners = set()
    for seed in range(40):
        made = seeded(MLTI(2.0), Task(part, part), seed)
        share = made.support.x["a"][:, 0]
        torch.testing.assert_close(share.sum(1), torch.ones(5, dtype=torch.float64))
        assert (share.diagonal() > 0).all() and ((share > 0).sum(1) == 2).all() and len(share.diagonal().unique()) == 5
        for examples in made:
            torch.testing.assert_close(examples.x["a"], share[:, None].expand(5, 3, 5))
            torch.testing.assert_close(examples.x["b"][0], 2 * share[:, None].expand(5, 3, 5))
        partners |= {(t, int(j)) for t in range(5) for j in share[t].nonzero()[:, 0] if t != int(j)}
    assert len(partners) == 20, "any other"


def test_noise_is_on_the_support_alone() -> None:
    part = Examples({"x": torch.ones(1, DRAWS, 1, dtype=torch.float64)}, torch.zeros(1, DRAWS, dtype=torch.long))
    made = seeded(Noise(0.3), Task(part, part))
    noise = made.support.x["x"] - 1
    assert made.query is part and made.support.y is part.y
    assert abs(float(noise.mean())) < 5 * 0.3 / DRAWS**0.5
    assert abs(float(noise.var()) - 0.09) < 5 * 0.09 * (2 / DRAWS) ** 0.5
    torch.testing.assert_close(seeded(Noise(0.0), Task(part, part)), Task(part, part), rtol=0, atol=0)


def test_each_support_image_is_seen_in_its_own_way() -> None:
    """By the same change as the view makes of it alone; a view that changes nothing leaves the bits."""
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    part = Examples(image.expand(2, 4, 3, 8, 8).clone(), torch.arange(4).expand(2, 4))
    made = seeded(Views([Affine(), Erase(0.2)]), Task(part, part))
    assert made.query is part and made.support.y is part.y
    both = seeded(Views([Mirror()], query=True), Task(part, part))
    for examples in both:
        turned = (examples.x != part.x).flatten(2).any(-1)
        expected = torch.where(turned[..., None, None, None], part.x.flip(-1), part.x)
        assert torch.equal(examples.x, expected) and 0 < turned.sum() < 8
    seen = made.support.x.flatten(0, 1)
    assert len({tuple(view.flatten().tolist()) for view in seen}) == 8 and (seen == 0).any()
    still = seeded(Views([Affine(0, 0, 0, 0), Erase(0.0)]), Task(part, part))
    torch.testing.assert_close(still.support.x, part.x, rtol=1e-5, atol=1e-6)
    wide = part._replace(x=torch.cat([part.x, part.x[:, :1]], 1), y=torch.cat([part.y, part.y[:, :1]], 1))
    other = seeded(Views([Affine(), Erase(0.2)]), Task(wide, part)).support.x
    torch.testing.assert_close(other[:, :4], made.support.x, rtol=0, atol=0)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_a_step_takes_what_a_defence_gives(augment: Any) -> None:
    learner = build("maml", 4, 3, nn.Linear(4, 4), steps=2).double()
    made = seeded(augment, blobs())
    loss, _, gradients = meta_gradient(learner, made, "vmap")
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients.values())


def tokens() -> Task:
    part = Examples({"ids": torch.zeros(2, 3, 5, dtype=torch.long)}, torch.zeros(2, 3, dtype=torch.long))
    return Task(part, part)


@pytest.mark.parametrize(
    ("augment", "tasks", "message"),
    [
        (MetaMix(), tokens(), r"MetaMix: inputs of type torch.int64.*features of a frozen backbone"),
        (MLTI(), tokens(), r"MLTI: inputs of type torch.int64.*features of a frozen backbone"),
        (Noise(0.1), tokens(), r"Noise: inputs of type torch.int64.*features of a frozen backbone"),
        (Views([Affine()]), tokens(), "Views: inputs of several tensors"),
        (Views([Affine()]), blobs(), r"Affine: it changes images \(n, C, H, W\)"),
        (MLTI(), blobs(count=1), "MLTI: a batch of one task.*draw batches of 2 or more"),
        (PermuteLabels(2), blobs(), "PermuteLabels: way 2, but a label is 2; give it the way of the learner"),
        (
            PermuteLabels(3),
            targets(blobs(), torch.ones(4, 1, dtype=torch.float64)),
            "PermuteLabels: the targets are numbers.*leave it out of a regression",
        ),
    ],
)
def test_tasks_that_cannot_be_changed_so(augment: Any, tasks: Task, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        seeded(augment, tasks)
