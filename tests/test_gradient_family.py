"""What the gradient-based learner adds to a plain inner loop: outer gradients, steps, heads and their combinations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metafit.data import Sinusoids, TaskSampler, from_arrays
from metafit.errors import BadInput
from metafit.evaluation import evaluate
from metafit.learners import GradientLearner, build
from metafit.learners.checks import pad
from metafit.learners.choices import RULES
from metafit.learners.gradient import SHARPNESS
from metafit.learners.heads import PrototypeHead
from metafit.losses import CrossEntropy, GaussianNLL, LearnedLoss, MeTAL
from metafit.over_tasks import Plan, meta_gradient
from metafit.task import Examples, Task, take
from metafit.training import Recipe, load_model, meta_train, save_model
from metafit.training.augment import MetaMix

WAY, RATE = 3, 0.2


def tasks(count: int = 3, dim: int = 4) -> Task:
    generator = torch.Generator().manual_seed(0)

    def examples(shot: int) -> Examples:
        x = torch.randn(count, WAY * shot, dim, generator=generator, dtype=torch.float64)
        return Examples(x, torch.arange(WAY).repeat(shot).expand(count, -1))

    return Task(examples(2), examples(3))


def learner(name: str = "maml", norm: bool = False, **options: Any) -> GradientLearner:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), *([nn.LayerNorm(6)] if norm else []), nn.Tanh())
    made = build(name, 6, WAY, body, **{"rate": RATE, **options})
    assert isinstance(made, GradientLearner)
    return made.double()


def loss_of(made: GradientLearner, params: dict[str, Tensor], examples: Examples) -> Tensor:
    return F.cross_entropy(functional_call(made.model, params, (examples.x,)), examples.y)


def walked(made: GradientLearner, task: Task, steps: int, create_graph: bool = True) -> list[dict[str, Tensor]]:
    """The parameters before and after each step, by plain autograd; the rate of the rule, a float32's."""
    path = [dict(made.model.named_parameters())]
    rate = float(next(made.optimizer.parameters()).detach().flatten()[0])
    for _ in range(steps):
        loss = loss_of(made, path[-1], task.support)
        grads = torch.autograd.grad(loss, list(path[-1].values()), create_graph=create_graph)
        path.append({n: p - rate * g for (n, p), g in zip(path[-1].items(), grads, strict=True)})
    return path


def test_reptile_moves_the_start_towards_the_adapted_parameters() -> None:
    made, batch = learner("reptile", steps=4), tasks()
    loss, _, gradients = meta_gradient(made, batch)
    expected = dict.fromkeys(gradients, torch.tensor(0.0))
    losses = []
    for t in range(3):
        path = walked(made, take(batch, t), 4)
        losses.append(loss_of(made, path[-1], take(batch, t).query).detach())
        for n, start in path[0].items():
            expected[f"model.{n}"] = expected[f"model.{n}"] + (start - path[-1][n]).detach() / 3
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    for n in (n for n in gradients if n.startswith("model.")):
        torch.testing.assert_close(gradients[n], expected[n], msg=n)


@pytest.mark.parametrize("done", [0.0, 0.05, 0.15, 1.0])
def test_the_multi_step_loss_moves_its_weight_to_the_last_step(done: float) -> None:
    """MAML++: all steps count the same at first, the last alone from 15 % of the training on."""
    made, batch, steps = learner(steps=3, multi_step="annealed").train(), tasks(), 3
    made.advance(done)
    others = max(0.0, 1 - done / 0.15) / steps
    expected = torch.zeros(())
    for t in range(3):
        path = walked(made, take(batch, t), steps)
        losses = [loss_of(made, params, take(batch, t).query) for params in path[1:]]
        expected = expected + (others * sum(losses[:-1]) + (1 - 2 * others) * losses[-1]) / 3
    loss, _, gradients = meta_gradient(made, batch)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)  # the weights are float32's
    parameters = dict(made.model.named_parameters())
    for (n, _), g in zip(parameters.items(), torch.autograd.grad(expected, list(parameters.values())), strict=True):
        torch.testing.assert_close(gradients[f"model.{n}"], g, rtol=1e-6, atol=1e-9)


def test_query_losses_that_do_not_count_are_not_computed() -> None:
    made, task = learner(steps=3, multi_step="annealed").train(), take(tasks(), 0)
    answered: list[int] = []
    predict = made.predict
    made.predict = lambda adapted, x: (answered.append(1), predict(adapted, x))[1]  # type: ignore
    for done, times in ((0.0, 3), (0.149, 3), (0.15, 1)):
        answered.clear()
        made.advance(done)
        made.loss(task)
        assert len(answered) == times


def test_the_number_of_steps_is_learned() -> None:
    made, batch = learner(steps=3, multi_step="learned"), tasks()
    assert len(made.path(take(batch, 0))) == 4, "before any training it takes all"
    made.step_logits.data = torch.tensor([0.0, 0.2, 0.1], dtype=torch.float64)
    losses = torch.zeros(3, dtype=torch.float64)
    for t in range(3):
        path = walked(made, take(batch, t), 3)
        losses += torch.stack([loss_of(made, params, take(batch, t).query).detach() for params in path[1:]]) / 3
    p = (SHARPNESS * made.step_logits.detach()).softmax(0)
    loss, _, gradients = meta_gradient(made.train(), batch)
    torch.testing.assert_close(loss, (p * losses).sum())
    torch.testing.assert_close(gradients["step_logits"], SHARPNESS * p * (losses - (p * losses).sum()))
    torch.testing.assert_close(meta_gradient(made.eval(), batch)[0], losses[1])
    assert len(made.path(take(batch, 0))) == 3, "what is measured is what answers"
    torch.testing.assert_close(made.path(take(batch, 0))[-1], made.adapt(take(batch, 0).support))


def test_parts_that_change_on_the_way_are_told_how_far_training_is() -> None:
    made, told = learner(), []
    made.inner_loss.advance = told.append  # type: ignore[method-assign]
    made.criterion.advance = told.append  # type: ignore[method-assign]
    made.advance(0.25)
    assert told == [0.25, 0.25]


def test_first_order_comes_before_second_order() -> None:
    made, batch = learner(steps=2, first_order_until=0.5).train(), tasks()
    gradients = {}
    for done in (0.0, 0.49, 0.5):
        made.advance(done)
        gradients[done] = meta_gradient(made, batch)[2]
    first = meta_gradient(learner("fomaml", steps=2), batch)[2]
    second = meta_gradient(learner(steps=2), batch)[2]
    torch.testing.assert_close(gradients[0.0], first)
    torch.testing.assert_close(gradients[0.49], first)
    torch.testing.assert_close(gradients[0.5], second)
    assert (first["model.head.weight"] - second["model.head.weight"]).abs().max() > 1e-4


def test_training_tells_how_far_it_is() -> None:
    made = build("maml", 8, None, nn.Sequential(nn.Linear(1, 8), nn.Tanh()), first_order_until=0.5)
    seen: list[tuple[float, bool]] = []
    advance = made.advance
    made.advance = lambda done: (advance(done), seen.append((done, made.first_order_now)))[0]  # type: ignore
    meta_train(made, Sinusoids(batch=2), steps=4, show_progress=False)
    assert seen == [(0.0, True), (0.25, True), (0.5, False), (0.75, False)]


def test_normalisation_shifts_at_each_step() -> None:
    """The support loss of step k, and the prediction after K steps, see the shifts of their own step."""
    made, batch, steps = learner(norm=True, steps=2, per_step_norm=True), tasks(), 2
    torch.manual_seed(1)
    for shift in made.shifts.values():
        shift.data = 0.3 * torch.randn_like(shift)
    named = {key.replace("/", "."): shift for key, shift in made.shifts.items()}
    assert set(named) == {"body.1.weight", "body.1.bias"}

    def at(params: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        return {**params, **{n: params[n] + shift[step] for n, shift in named.items()}}

    rate, expected = float(made.optimizer.rate), torch.zeros(())
    for t in range(3):
        params, task = dict(made.model.named_parameters()), take(batch, t)
        for step in range(steps):
            loss = loss_of(made, at(params, step), task.support)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {n: p - rate * g for (n, p), g in zip(params.items(), grads, strict=True)}
        expected = expected + loss_of(made, at(params, steps), task.query) / 3
    loss, _, gradients = meta_gradient(made, batch)
    torch.testing.assert_close(loss, expected.detach())
    for key, shift in made.shifts.items():
        (g,) = torch.autograd.grad(expected, shift, retain_graph=True)
        torch.testing.assert_close(gradients[f"shifts.{key}"], g)
        assert (g.abs().amax(1) > 1e-6).all(), "each step's shift counts"


def test_protomaml_starts_from_prototypes() -> None:
    made, task = learner("protomaml", steps=1), take(tasks(), 0)
    before = made.predict(made.trajectory(task.support)[0], task.query.x)
    body = made.model.get_submodule("body")
    z, support = body(task.query.x), body(task.support.x)
    centres = torch.stack([support[task.support.y == c].mean(0) for c in range(WAY)])
    distances = -torch.cdist(z, centres).square()
    torch.testing.assert_close(before - before[:, :1], distances - distances[:, :1])


def test_a_transductive_loss_is_shown_the_queries_and_says_so() -> None:
    made, batch = learner("metal", loss="metal-transductive", steps=2), tasks()
    assert "query" in made.transductive
    with pytest.raises(BadInput, match="the steps depend on the queries"):
        made.trajectory(take(batch, 0).support)
    torch.manual_seed(0)
    for parameter in made.inner_loss.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    task = take(batch, 0)
    other = task._replace(query=task.query._replace(x=task.query.x.flip(0) * 2))
    first, second = (made.path(t)[-1]["parameters"]["head.weight"] for t in (task, other))
    assert (first - second).abs().max() > 1e-6
    answered = made.predict(made.adapt(task.support), task.query.x)
    torch.testing.assert_close(answered, made.predict(made.path(task)[-1], task.query.x))
    padded = meta_gradient(made, Task(pad(batch.support, WAY), pad(batch.query, WAY)))
    torch.testing.assert_close(padded, meta_gradient(made, batch))
    x, y = torch.randn(40, 4), [str(i % 4) for i in range(40)]
    sampler = TaskSampler(from_arrays(x, y, name="numbers"), WAY, 1, 3, batch=4)
    measured = evaluate(made.float(), sampler, episodes=6, show_progress=False)
    assert measured.score.shape == (6, 3) and len(measured.adapt_ms) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "sdg"}, "rule 'sdg'.*sgd"),
        ({"loss": "metall"}, "loss 'metall'.*metal"),
        ({"head": "cosin"}, "head 'cosin'.*cosine"),
        ({"loss": "huber"}, "loss 'huber' is for regression"),
        ({"multi_step": "first"}, "multi_step 'first': choose"),
        ({"outer": "reptile", "multi_step": "annealed"}, "multi_step 'annealed': the reptile gradient"),
        ({"outer": "implicit", "rule": "alfa"}, r"outer 'implicit': .* update rule \(ALFA\) would never be trained"),
        ({"outer": "reptile", "loss": "metal"}, r"outer 'reptile': .* inner loss \(MeTAL\) would never be trained"),
        (
            {"outer": "reptile", "meta_dropout": True},
            r"outer 'reptile': .* noise \(meta_dropout\) would never be trained",
        ),
        ({"outer": "reptile", "per_step_norm": True}, r"outer 'reptile': .* \(per_step_norm\) would never be trained"),
        ({"outer": "reptile", "scope": "head"}, r"outer 'reptile' moves .*body.0.weight.*: choose scope 'all'"),
        (
            {"outer": "first_order", "loss": "metal"},
            r"outer 'first_order': .* inner loss \(MeTAL\) would never be trained",
        ),
        (
            {"outer": "first_order", "loss": "learned"},
            r"outer 'first_order': .* \(LearnedLoss\) would never be trained",
        ),
        ({"outer": "first_order", "meta_dropout": True}, r"outer 'first_order': .* \(meta_dropout\) would never be"),
        ({"outer": "first_order", "per_step_norm": True}, r"outer 'first_order': .* \(per_step_norm\) would never be"),
        ({"outer": "implicit", "proximal": 0.1}, r"outer 'implicit' .* leave out the proximal \(raise pull instead\)"),
        (
            {"outer": "implicit", "loss": "metal"},
            r"outer 'implicit' .* leave out the inner loss \(MeTAL\)",
        ),
        ({"outer": "implicit", "meta_dropout": True}, r"outer 'implicit' .* leave out the noise \(meta_dropout\)"),
        ({"outer": "implicit", "per_step_norm": True}, r"outer 'implicit' .* leave out the shifts \(per_step_norm\)"),
        ({"first_order_until": 7}, "first_order_until 7: needs 0 or more, less than 1"),
        ({"first_order_until": 1.0}, "first_order_until 1.0: needs 0 or more, less than 1"),
        ({"outer": "implicit", "first_order_until": 0.5}, "first_order_until 0.5: .* outer 'unrolled'"),
        ({"pull": 2.0}, "pull 2.0, iterations None: only outer 'implicit' has them"),
        ({"rate": -1}, "rate -1: needs to be above 0"),
        ({"rate": float("nan")}, "rate nan: needs to be above 0"),
        ({"scope": "head", "loss": "contrastive"}, "inner loss Contrastive moves features"),
        ({"scope": "head.*", "loss": "contrastive"}, r"moves features, which scope 'head\.\*' leaves"),
        ({"multi_step": "learned", "steps": 3, "test_steps": 10}, "test_steps 10: .* among the 3 steps"),
        ({"rule": nn.Linear(1, 1)}, r"option rule Linear\(.* needs to be a name \(objects are for GradientLearner\)"),
        ({"rate": (0.1, 0.2)}, r"rate \(0.1, 0.2\): rule 'sgd' begins with one rate"),
        ({"rate": "fast"}, r"option rate 'fast' of learner 'maml': needs to be a number or a range as \[0.1, 0.2\]"),
        ({"steps": 2.5}, "option steps 2.5 of learner 'maml': needs to be a whole number"),
        ({"steps": True}, "option steps True of learner 'maml': needs to be a whole number"),
        ({"early_stop": True}, "option early_stop True of learner 'maml': needs to be a number"),
        ({"proximal": float("nan"), "rate": None}, "proximal nan: needs 0 or more"),
        ({"scope": "body", "head": "prototype"}, "scope 'body': leaves out a head that starts from prototypes"),
        ({"scope": "*bias", "head": "prototype"}, r"scope '\*bias': leaves out a head that starts from prototypes"),
        ({"rule": "meta-sgd", "rate": (0.1, 0.01)}, "rate .0.1, 0.01.: a range needs its lower end first"),
        ({"meta_dropout": "False"}, "option meta_dropout 'False' of learner 'maml': needs to be true or false"),
    ],
)
def test_choices_that_there_are_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        learner(norm=True, **options)


@pytest.mark.parametrize("outer", ["unrolled", "first_order", "implicit"])
@pytest.mark.parametrize(
    ("rule", "loss"), [*((rule, "plain") for rule in RULES), ("sgd", "metal"), ("sgd", "learned"), ("alfa", "metal")]
)
def test_what_is_not_refused_is_trained(outer: str, rule: str, loss: str) -> None:
    """Every parameter of a rule and a loss that have moved a little from their neutral start gets a gradient."""
    learns = rule not in ("sgd", "momentum", "adam")
    if (outer == "first_order" and loss != "plain") or (outer == "implicit" and (learns or loss == "metal")):
        with pytest.raises(BadInput, match=f"outer '{outer}'"):
            learner(outer=outer, rule=rule, loss=loss, steps=2)
        return
    made = learner(outer=outer, rule=rule, loss=loss, steps=2)
    for parameter in [*made.optimizer.parameters(), *made.inner_loss.parameters()]:
        parameter.data += 0.1 * torch.randn_like(parameter)
    gradients = meta_gradient(made, tasks())[2]
    constant = "inner_loss.network.4.bias"  # of a loss, which moves nothing
    assert not [n for n, g in gradients.items() if not g.any() and n != constant]


def test_reptile_leaves_alone_what_no_task_starts_from() -> None:
    made = learner("reptile", head="prototype", steps=2)
    gradients = meta_gradient(made, tasks())[2]
    assert gradients["model.body.0.weight"].any()
    assert not gradients["model.head.weight"].any() and not gradients["model.head.bias"].any()
    with pytest.raises(BadInput, match="a head from prototypes would never be trained"):
        GradientLearner(nn.Identity(), PrototypeHead(4, WAY), WAY, outer="reptile")


def test_an_optimum_is_of_one_loss_not_of_one_drawn_at_each_step() -> None:
    body = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1))
    made, task = build("imaml", 6, WAY, body, rate=RATE).double(), take(tasks(), 0)
    with pytest.raises(BadInput, match=r"dropout 'body.1' draws anew .* set its p to 0"):
        made.loss(task)
    made.eval().loss(task)


def test_a_head_has_parameters_of_its_own() -> None:
    body, head = nn.Linear(4, 4), nn.Linear(4, 4)
    head.weight = body.weight
    with pytest.raises(BadInput, match=r"head.weight is body.weight, one parameter.*give the head a copy"):
        GradientLearner(body, head, 4)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_added_to_a_network_has_its_precision(rule: str) -> None:
    made = build("maml", 6, WAY, nn.Linear(4, 6).double(), rule=rule, loss="metal", meta_dropout=True, rate=RATE)
    assert {p.dtype for p in made.parameters()} == {torch.float64}
    meta_gradient(made, tasks())


def test_where_no_rate_is_named_it_suits_the_rule_and_the_pull() -> None:
    def rate(**options: Any) -> float:
        made = build("anil", 8, WAY, **options)
        return float(next(r.rate for r in made.optimizer.modules() if hasattr(r, "rate")))  # type: ignore[arg-type]

    assert rate(rule="adam") == pytest.approx(0.01) and rate() == pytest.approx(5.0)
    for strength in (0.1, 1.0, 10.0):
        assert rate(proximal=strength) * strength < 1, "a step towards the start ends at it, or before"


def test_norms_that_a_package_calls_its_own_are_norms() -> None:
    class OwnRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()

    body = nn.Sequential(nn.Linear(4, 6), OwnRMSNorm())
    assert build("maml", 6, WAY, body, scope="norm").adapting == ("body.1.weight",)
    assert len(build("maml++", 6, WAY, body).shifts) == 1
    body = nn.Sequential(nn.Unflatten(-1, (2, 2)), nn.InstanceNorm1d(2, affine=True), nn.Flatten(), nn.Linear(4, 6))
    assert build("maml", 6, WAY, body, scope="norm").adapting == ("body.1.weight", "body.1.bias")


@pytest.mark.parametrize("name", ["anil", "protomaml", "maml"])
def test_half_precision_is_the_bodys_too(name: str) -> None:
    body, seen = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), set()
    made = build(name, 6, WAY, body, precision="bf16", rate=RATE)
    body[0].register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    batch = Task(*(part._replace(x=part.x.float()) for part in tasks()))
    made.loss(take(batch, 0))
    assert seen == {torch.bfloat16}


def test_an_implicit_gradient_in_half_precision_goes_through_normalisation() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh())
    batch = Task(*(part._replace(x=part.x.float()) for part in tasks()))
    made = [build("imaml", 6, WAY, body, precision=precision, rate=RATE) for precision in ("bf16", "full")]
    made[1].load_state_dict(made[0].state_dict())
    half, full = (meta_gradient(m, batch, "loop")[2]["model.body.0.weight"] for m in made)
    assert F.cosine_similarity(half.flatten(), full.flatten(), dim=0) > 0.99


def test_numbers_of_numpy_are_options_that_can_be_saved() -> None:
    made = build("maml", 6, WAY, steps=np.int64(3), rate=np.float32(0.5))
    assert json.loads(json.dumps(made.recipe))["options"] == {"steps": 3, "rate": 0.5}


def test_weights_may_be_of_any_type() -> None:
    made, task = learner(), take(tasks(), 0)
    counted = [torch.tensor([1, 1, 0, 1, 1, 1]).to(kind) for kind in (torch.float64, torch.int64, torch.bool)]
    losses = [made.loss(task._replace(support=task.support._replace(weight=w)))[0] for w in counted]
    assert losses[0] == losses[1] == losses[2] != made.loss(task)[0]


def test_tasks_that_a_learner_is_not_made_for_are_told_before_the_training() -> None:
    classes = TaskSampler(from_arrays(torch.randn(40, 4).numpy(), [i % 8 for i in range(40)]), 5, 1, 2, batch=2)
    for made, drawn, message in (
        (learner(), classes, "tasks of 5 classes: the learner tells 3 apart"),
        (build("maml", 4, None), classes, "tasks of 5 classes: the learner is for regression; build it with way=5"),
        (build("maml", 1, WAY), Sinusoids(), "tasks of a regression: the learner tells classes apart"),
    ):
        for run in (lambda m, d: meta_train(m, d, steps=1), lambda m, d: evaluate(m, d, 1)):
            with pytest.raises(BadInput, match=message):
                run(made, drawn)
    for augment in (["metamix"], MetaMix()):
        with pytest.raises(BadInput, match=r"needs a list of changes, such as \[MetaMix\(\)\]"):
            meta_train(build("maml", 4, 5), classes, steps=1, augment=augment)  # type: ignore[arg-type]


def test_a_network_that_cannot_be_differentiated_within_a_task_is_told() -> None:
    class Old(torch.autograd.Function):
        """Of the kind without ``setup_context``, as some networks of transformers have."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return 2 * grads[0]

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Old.apply(x)  # type: ignore[no-any-return]

    body, task = nn.Sequential(nn.Linear(4, 4), Twice()), take(tasks(), 0)
    with pytest.raises(BadInput, match=r"autograd\.Function without setup_context.*scope head"):
        build("maml", 4, WAY, body).double().loss(task)
    with pytest.raises(BadInput, match=r"autograd\.Function without setup_context.*scope head"):
        meta_gradient(build("maml", 4, WAY, body).double(), tasks(), Plan("loop", 1, True))
    assert meta_gradient(build("anil", 4, WAY, body).double(), tasks())[0].isfinite()


def test_what_would_have_no_effect_or_never_end_is_refused_before_the_training() -> None:
    tasks = TaskSampler(from_arrays(torch.randn(40, 4), [str(i % 4) for i in range(40)], name="numbers"), WAY, 1, 3, 4)
    with pytest.raises(BadInput, match=r"MetaMix changes the queries alone, which the learner \(reptile\)"):
        meta_train(learner("reptile").float(), tasks, steps=1, augment=[MetaMix()])
    made = learner("maml").float()
    made.criterion = LearnedLoss(WAY)
    with pytest.raises(BadInput, match="LearnedLoss: as an outer loss it would learn to be small"):
        meta_train(made, tasks, steps=1)


def test_a_metric_of_outputs_that_are_no_targets_is_refused() -> None:
    task = take(Sinusoids(batch=1).tasks(0, 1), 0)
    made = GradientLearner(nn.Linear(1, 8), nn.Linear(8, 2), None, inner_loss=GaussianNLL())
    made.criterion = GaussianNLL()
    with pytest.raises(BadInput, match=r"targets of shape .* for outputs"):
        made.loss(task)
    made.gaussian = True
    assert made.loss(task)[1]["mse"] >= 0
    made = build("maml", 1, None)
    made.criterion = GaussianNLL()
    with pytest.raises(BadInput, match="give the head twice as many outputs"):
        made.loss(task)
    made = GradientLearner(nn.Linear(1, 8), nn.Linear(8, 2), None, inner_loss=lambda p: MeTAL(p, None, 1))
    with pytest.raises(BadInput, match="MeTAL: 2 outputs, made for 1"):
        made.adapt(task.support)


def test_class_weights_of_the_training_are_none_of_the_models(tmp_path: Path) -> None:
    made = build("maml", 6, WAY)
    made.criterion = CrossEntropy(class_weight=[1.0, 2.0, 3.0])  # type: ignore[arg-type]
    save_model(tmp_path, made, Recipe())
    loaded = load_model(tmp_path).learner
    assert all(torch.equal(p, loaded.state_dict()[n]) for n, p in made.state_dict().items() if "class_weight" not in n)
    with pytest.raises(BadInput, match=r"with a network of your own \(pass it as body=\)"):
        save_model(tmp_path, build("maml", 6, WAY, nn.Linear(4, 6)), Recipe())
        load_model(tmp_path)


def test_a_regression_has_no_classes_to_compare() -> None:
    with pytest.raises(BadInput, match=r"head 'cosine'.*a regression takes the linear head"):
        build("maml", 4, None, head="cosine")


@pytest.mark.parametrize("peer", ["torchopt", "higher"])
def test_maml_is_that_of_other_libraries(peer: str) -> None:
    pytest.importorskip(peer)
    from metafit.bench import peers
    from metafit.bench.problem import Problem

    made, batch = learner(steps=3), tasks()
    problem = Problem(made.model, WAY, batch, 3, float(made.optimizer.rate), 2)
    loss, gradients = getattr(peers, peer).step(problem)()
    ours = meta_gradient(made, batch)
    torch.testing.assert_close(loss, ours[0], rtol=1e-8, atol=0)
    for n, g in gradients.items():
        torch.testing.assert_close(g, ours[2][f"model.{n}"], rtol=1e-8, atol=1e-12)


def test_the_pull_of_implicit_gradients_does_not_overshoot() -> None:
    """A step of rate η/(1 + ηλ) on loss and pull is the plain step, with the pull taken where it ends."""
    for pull in (0.5, 2.0, 50.0):
        learner, plain = (build(name, 4, 3, **more) for name, more in (("imaml", {"pull": pull}), ("maml", {})))
        rate, plain_rate = float(learner.optimizer.rate), float(plain.optimizer.rate)
        assert rate * pull < 1 and rate == pytest.approx(plain_rate / (1 + plain_rate * pull))
