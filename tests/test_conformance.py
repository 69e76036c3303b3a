"""Every learner of the catalogue, and a stranger's, through the conformance suite and the backends."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_map

from metafit.errors import BadInput
from metafit.learners import ENTRIES, GradientLearner, Learner, build
from metafit.learners.base import mask_absent, members
from metafit.learners.checks import _check_derivative, check_learner, pad
from metafit.losses import CrossEntropy, Curriculum
from metafit.optim import SGD
from metafit.over_tasks import double_backward, meta_gradient, over_tasks
from metafit.task import Examples, Task, take
from metafit.training import Recipe, load_model, save_model

DIM, WAY = 6, 4
SHAPES = {"features": (DIM,), "mlp": (DIM,), "conv": (1, 5, 5)}
CASES = [(name, kind, body) for name, entry in ENTRIES.items() for kind in entry.tasks for body in SHAPES]
SLOW_TO_COMPILE = {"scratch", "finetune"}  # the same class as FOMAML's, which is traced
# an autograd function under vmap; and learned shifts by step, of which dynamo makes another loss: our own trace, which
# is what compiles, takes both (test_plans.py)
NOT_FOR_DYNAMO = {"imaml", "maml++"}


def body_of(kind: str) -> nn.Module | None:
    if kind == "features":
        return None
    if kind == "mlp":
        return nn.Sequential(nn.Linear(DIM, 8), nn.Tanh(), nn.Linear(8, DIM))
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(1, 3, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(27, DIM), nn.LayerNorm(DIM))


def learner_of(name: str, kind: str, body: str, **options: Any) -> Learner:
    torch.manual_seed(0)
    if name in ("finetune", "scratch"):
        options.setdefault("steps", 3)
    elif name in ("protomaml", "metal", "alfa+metal"):  # five steps bend too much for finite differences
        options.setdefault("steps", 2)
    way = WAY if kind == "classification" else None
    learner = build(name, DIM, way, body_of(body), outputs=2, **options)
    for key, p in learner.named_parameters():  # heads that start at zero would hide wrong gradients elsewhere
        p.data += 0.0 if key.startswith("optimizer") else 0.1 * torch.randn_like(p)
    learner.advance(1.0)  # what changes during training is as at its end
    return learner.double().eval()  # what is random (dropout) is not, in evaluation mode


def tasks_of(kind: str, body: str, seed: int = 1) -> Task:
    """Three tasks of three classes; the learners' fourth class is absent."""
    generator = torch.Generator().manual_seed(seed)

    def examples(shot: int) -> Examples:
        x = torch.randn(3, 3 * shot, *SHAPES[body], generator=generator, dtype=torch.float64)
        y = torch.arange(3).repeat(shot).expand(3, -1).clone()
        targets = torch.randn(3, 3 * shot, 2, generator=generator, dtype=torch.float64)
        weight = torch.ones(3, 3 * shot, dtype=torch.float64)
        return Examples(x, y if kind == "classification" else targets, weight)

    return Task(examples(2), examples(3))


def is_exact(learner: Learner) -> bool:
    return getattr(learner, "outer", "unrolled") == "unrolled"


@pytest.mark.parametrize(("name", "kind", "body"), CASES)
def test_catalogue(name: str, kind: str, body: str) -> None:
    learner = learner_of(name, kind, body)
    check_learner(
        learner,
        tasks_of(kind, body),
        exact_gradient=is_exact(learner),
        padding=not learner.transductive,
        order=not ENTRIES[name].ordered,
        relabels=ENTRIES[name].relabels,
    )


PARTS: dict[str, dict[str, Any]] = {
    **{f"rule {rule}": {"rule": rule, "rate": 0.1} for rule in ("alfa", "lstm", "mlp")},
    **{
        f"loss {loss}": {"loss": loss} for loss in ("smoothed", "focal", "contrastive", "learned", "metal-transductive")
    },
    "loss huber": {"loss": "huber"},
    "learned number of steps": {"multi_step": "learned"},
}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_learned_has_exact_derivatives_away_from_where_it_starts(name: str) -> None:
    """Where learned rules and losses start they are gradient descent and the criterion, whose derivatives are easy."""
    kind = "regression" if name == "loss huber" else "classification"
    learner, tasks = learner_of("maml", kind, "mlp", steps=2, **PARTS[name]), tasks_of(kind, "mlp")
    assert isinstance(learner, GradientLearner)
    if hasattr(learner.optimizer, "through_state"):
        learner.optimizer.through_state = True
    for key, parameter in learner.named_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) if key.startswith(("optimizer", "step_logits")) else 0.0
    check_learner(learner, tasks, padding=not learner.transductive)
    _check_derivative(learner.train(), tasks)  # of the loss of all steps, where they count


def test_a_curriculum_within_the_task_has_exact_derivatives() -> None:
    torch.manual_seed(0)
    inner, body = Curriculum(CrossEntropy(), start=1.0), body_of("mlp")
    assert body is not None
    learner = GradientLearner(body, nn.Linear(DIM, WAY), WAY, inner_loss=inner, optimizer=SGD(0.4), steps=2).double()
    _check_derivative(learner.train(), tasks_of("classification", "mlp"))


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("body", SHAPES)
@pytest.mark.parametrize("name", ["fomaml", "finetune", "scratch"])
def test_first_order_gradient_is_that_at_the_adapted_parameters(name: str, kind: str, body: str) -> None:
    """Finn et al., section 5.2, by plain autograd: one leaf after another, no graph between the steps."""
    learner, tasks = learner_of(name, kind, body, rate=0.25), tasks_of(kind, body)
    assert isinstance(learner, GradientLearner)

    def plain_loss(params: dict[str, Tensor], examples: Examples) -> Tensor:
        outputs = functional_call(learner.model, params, (examples.x,))
        if kind == "regression":
            return (outputs - examples.y).square().mean()
        return F.cross_entropy(outputs[:, : WAY - 1], examples.y)  # the last class is absent

    expected = {name: torch.zeros_like(p) for name, p in learner.model.named_parameters()}
    for t in range(3):
        task = take(tasks, t)
        params = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
        for examples in [task.support] * learner.steps + [task.query]:
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            grads = torch.autograd.grad(plain_loss(leaves, examples), list(leaves.values()))
            params = {name: p - 0.25 * g for (name, p), g in zip(leaves.items(), grads, strict=True)}
        for name, g in zip(params, grads, strict=True):
            expected[name] += g / 3
    _, _, gradients = meta_gradient(learner, tasks)
    for name, value in expected.items():
        torch.testing.assert_close(gradients[f"model.{name}"], value, rtol=1e-6, atol=1e-9)


def traced(name: str) -> Any:
    """Of each family one: all take minutes, and ``test_plans`` traces those for classes as training does."""
    quick = name in ("maml", "protonet", "cnp")
    return pytest.param(name, ENTRIES[name].tasks[0], "conv", marks=[] if quick else [pytest.mark.slow])


TRACED = [
    traced(name)
    for name, entry in ENTRIES.items()
    if name not in SLOW_TO_COMPILE | NOT_FOR_DYNAMO and learner_of(name, entry.tasks[0], "conv").vmappable
] + [("maml", "regression", "mlp")]


@pytest.mark.parametrize(("name", "kind", "body"), TRACED)
def test_traced_by_the_compiler(name: str, kind: str, body: str) -> None:
    options = {"steps": 2} if "steps" in ENTRIES[name].options() else {}
    learner, tasks = learner_of(name, kind, body, **options), tasks_of(kind, body)
    parameters = {name: p.detach() for name, p in learner.named_parameters() if p.requires_grad}

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.learner = learner

        def forward(self, task: Task) -> Tensor:
            return self.learner.loss(task)[0]

    module = Loss()

    def mean(parameters: dict[str, Tensor], tasks: Task) -> Tensor:
        whole = {f"learner.{name}": value for name, value in parameters.items()}
        return vmap(lambda task: functional_call(module, whole, (task,)))(tasks).mean()

    torch._dynamo.reset()
    with double_backward(vmapped=True):
        run = torch.compile(grad_and_value(mean) if parameters else mean, backend="aot_eager", fullgraph=True)
        result = run(parameters, tasks)
    loss, _, gradients = meta_gradient(learner, tasks, "loop")
    found_gradients, found = result if parameters else ({}, result)
    torch.testing.assert_close(found, loss, rtol=1e-9, atol=1e-9)
    for name, value in found_gradients.items():
        torch.testing.assert_close(value, gradients[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ENTRIES)
def test_saved_and_loaded_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Any) -> None:
    kind = ENTRIES[name].tasks[0]
    learner, tasks = learner_of(name, kind, "mlp").to(dtype), tasks_of(kind, "mlp")
    tasks = tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tasks)
    save_model(tmp_path, learner, Recipe(source={"name": "noise"}))
    loaded = load_model(tmp_path, body_of("mlp"))
    assert loaded.recipe.source == {"name": "noise"}
    assert all(torch.equal(value, loaded.learner.state_dict()[key]) for key, value in learner.state_dict().items())
    assert [p.requires_grad for p in learner.parameters()] == [p.requires_grad for p in loaded.learner.parameters()]
    for t in range(3):
        task = take(tasks, t)
        answers = [made.predict(made.adapt(task.support), task.query.x) for made in (learner, loaded.learner)]
        assert torch.equal(*answers)


@pytest.mark.parametrize("name", ENTRIES)
def test_no_weights_means_that_all_count(name: str) -> None:
    kind = ENTRIES[name].tasks[0]
    learner, tasks = learner_of(name, kind, "mlp"), tasks_of(kind, "mlp")
    bare = Task(tasks.support._replace(weight=None), tasks.query._replace(weight=None))
    loss, _, gradients = meta_gradient(learner, bare)
    expected, _, expected_gradients = meta_gradient(learner, tasks)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for key, value in expected_gradients.items():
        torch.testing.assert_close(gradients[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if "classification" in entry.tasks])
def test_all_support_of_one_class_is_no_surprise(name: str) -> None:
    """The only class there is gets all the probability, and the gradient of a sure answer is zero, not NaN."""
    learner, tasks = learner_of(name, "classification", "mlp"), tasks_of("classification", "mlp")
    one = Task(*(part._replace(y=torch.full_like(part.y, 2)) for part in tasks))
    loss, metrics, gradients = meta_gradient(learner, one)
    # kNN's floor under its votes is the one constant that a single class keeps
    assert float(metrics["accuracy"]) == 1.0 and float(loss) == pytest.approx(0, abs=1e-12)
    assert all(g.isfinite().all() and g.abs().max() < 1e-9 for g in gradients.values())


@pytest.mark.parametrize("name", ENTRIES)
def test_the_catalogue_says_who_looks_at_all_queries(name: str) -> None:
    learner = learner_of(name, ENTRIES[name].tasks[0], "features")
    assert bool(learner.transductive) == ENTRIES[name].transductive


class Matching(Learner):
    """A stranger's learner: attention over the support set (matching networks), with no help from this package."""

    def __init__(self, way: int):
        super().__init__(way)
        self.embedding = nn.Sequential(nn.Linear(DIM, 5), nn.Tanh())

    def adapt(self, support: Examples) -> dict[str, Tensor]:
        return {"keys": self.embedding(support.x), "members": members(support, self.way)}

    def predict(self, adapted: dict[str, Tensor], x: Tensor) -> Tensor:
        counted = adapted["members"].sum(-1) > 0
        scores = (self.embedding(x) @ adapted["keys"].T).masked_fill(~counted, -torch.inf)
        votes = scores.softmax(-1) @ adapted["members"]
        return mask_absent(votes.clamp_min(1e-12).log(), adapted["members"].sum(0) > 0)


def test_a_strangers_learner_conforms() -> None:
    torch.manual_seed(0)
    learner = Matching(WAY).double()
    learner.embedding.eval()
    before = torch.random.get_rng_state()
    check_learner(learner, tasks_of("classification", "mlp"), relabels=True)
    assert learner.training and not learner.embedding.training, "modes are left as they were"
    assert torch.equal(torch.random.get_rng_state(), before)


class Careless(Matching):
    """Counts padding."""

    def adapt(self, support: Examples) -> dict[str, Tensor]:
        return super().adapt(support._replace(weight=torch.ones_like(support.weight)))


class Ordered(Matching):
    """Believes the first example more."""

    def adapt(self, support: Examples) -> dict[str, Tensor]:
        adapted = super().adapt(support)
        return adapted | {"keys": adapted["keys"] * 0.9 ** torch.arange(len(support.y))[:, None]}


class Favouring(Matching):
    """Prefers the first class."""

    def predict(self, adapted: dict[str, Tensor], x: Tensor) -> Tensor:
        return super().predict(adapted, x) + torch.arange(self.way)


class Detached(Matching):
    """Forgets a part of its gradient."""

    def adapt(self, support: Examples) -> dict[str, Tensor]:
        adapted = super().adapt(support)
        return adapted | {"keys": adapted["keys"].detach()}


class Random(Matching):
    """Draws from another source than the seeded one."""

    def predict(self, adapted: dict[str, Tensor], x: Tensor) -> Tensor:
        return super().predict(adapted, x) + torch.randn(1, generator=GENERATOR, dtype=torch.float64)


GENERATOR = torch.Generator()


@pytest.mark.parametrize(
    ("broken", "clause"),
    [
        (Careless, "padding under loop"),
        (Ordered, "support examples in another order"),
        (Favouring, "relabelled classes"),
        (Detached, "the gradient of embedding.0.weight against finite differences"),
        (Random, "vmap|second run"),
    ],
)
def test_the_suite_finds_what_is_broken(broken: type[Matching], clause: str) -> None:
    torch.manual_seed(0)
    with pytest.raises((AssertionError, RuntimeError), match=clause):
        check_learner(broken(WAY).double(), tasks_of("classification", "mlp"), relabels=True)


class Branching(Matching):
    """Branches on data, which vmap cannot."""

    def predict(self, adapted: dict[str, Tensor], x: Tensor) -> Tensor:
        return super().predict(adapted, x) * (2 if float(x.sum()) > 0 else 1)


def test_what_vmap_refuses_runs_in_a_loop_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    learner, tasks = Branching(WAY).double(), tasks_of("classification", "mlp")
    expected = meta_gradient(learner, tasks, "loop")
    with caplog.at_level(logging.WARNING, logger="metafit.over_tasks"):
        first, second = meta_gradient(learner, tasks), meta_gradient(learner, tasks)
        over_tasks(learner.loss, tasks)
    assert len(caplog.records) == 1, "vmap is tried once"
    assert "Branching" in caplog.text and ".item()" in caplog.text
    for found in (first, second):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="item"):
        meta_gradient(learner, tasks, "vmap")


@pytest.mark.parametrize("name", ["protonet", "anil"])
def test_running_statistics_run_in_a_loop(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """BatchNorm that keeps running statistics updates them in place: vmap refuses, the loop does what training does."""
    tasks, found = tasks_of("classification", "mlp"), []
    for backend in ("auto", "loop"):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM), nn.Tanh())
        learner = build(name, DIM, WAY, body).double()
        found.append(meta_gradient(learner, tasks, backend, None))
        assert body[1].num_batches_tracked > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert "batch" in caplog.text.lower()
    learner.eval()
    assert torch.isfinite(over_tasks(learner.loss, tasks, "vmap")[0]).all(), "in evaluation mode vmap is able again"


@pytest.mark.parametrize("name", ["maml", "fomaml", "finetune"])
def test_running_statistics_cannot_adapt(name: str) -> None:
    learner = build(name, DIM, WAY, nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM))).double()
    with pytest.raises(BadInput, match=r"'body\.1'.*track_running_stats=False"):
        meta_gradient(learner, tasks_of("classification", "mlp"))


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_dropout_differs_between_tasks(backend: Any) -> None:
    learner = GradientLearner(nn.Dropout(0.5), nn.Linear(DIM, WAY), WAY, optimizer=SGD(0.1)).double()
    one = take(tasks_of("classification", "features"), slice(0, 1))
    same = Task(*(Examples(*(torch.cat([leaf] * 4) for leaf in part)) for part in one))
    losses, _ = over_tasks(learner.loss, same, backend, None)
    assert len(losses.unique()) == 4
    learner.eval()
    losses, _ = over_tasks(learner.loss, same, backend, None)
    torch.testing.assert_close(losses, losses[:1].expand(4))


@pytest.mark.parametrize("name", ["protonet", "centroid", "knn", "maml"])
def test_a_zero_vector_has_no_wild_gradient(name: str) -> None:
    """The direction of the zero vector is undefined; its gradient must not be 10¹² times that of the others."""
    options = {"metric": "cosine"} if "metric" in ENTRIES[name].options() else {}
    learner = build(name, DIM, WAY, nn.Sequential(nn.Linear(DIM, DIM, bias=False), nn.Tanh()), **options).double()
    learner.requires_grad_(True)
    tasks = tasks_of("classification", "mlp")
    tasks.support.x[:, 0] = 0
    tasks.query.x[:, 0] = 0
    loss, _, gradients = meta_gradient(learner, tasks)
    assert torch.isfinite(loss) and all(g.isfinite().all() and g.abs().max() < 1e3 for g in gradients.values())


def test_padding_alone_makes_no_task_infinite() -> None:
    """Tasks of 2 and 3 classes in one batch are what they are alone, for inner and outer loss alike."""
    tasks = tasks_of("classification", "mlp")
    for part in tasks:
        part.weight[0, part.y[0] == 2] = 0
    for name in ("protonet", "maml", "anil"):
        learner = learner_of(name, "classification", "mlp")
        losses, _ = over_tasks(learner.loss, tasks, "vmap")
        first = take(tasks, 0)
        kept = Task(*(Examples(*(leaf[part.weight > 0] for leaf in part)) for part in first))
        torch.testing.assert_close(losses[0], learner.loss(kept)[0], rtol=1e-9, atol=1e-12)
        padded = Task(pad(tasks.support, WAY), pad(tasks.query, WAY))
        assert all(torch.isfinite(g).all() for g in meta_gradient(learner, padded)[2].values())
