"""How a batch of tasks is run: what is chosen, what it costs, and that the numbers are the same."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from metafit import backbones, build
from metafit.bench.memory import peak, status
from metafit.context import Context
from metafit.data import Sinusoids
from metafit.errors import BadInput
from metafit.learners import ENTRIES, GradientLearner, Learner
from metafit.learners.implicit import conjugate_gradients
from metafit.losses import Loss
from metafit.optim import SGD, Params, Proximal, State
from metafit.over_tasks import Plan, by_step, choice, compiled, compiles, meta_gradient, mixed_mode, plan_for
from metafit.over_tasks.inner import gradient_along, inner_gradient
from metafit.over_tasks.measure import fastest
from metafit.over_tasks.memory import budget, parse
from metafit.over_tasks.threads import side_by_side
from metafit.over_tasks.thrift import thriftily
from metafit.over_tasks.trace import trace
from metafit.over_tasks.vectorised import conv2d, max_pool2d
from metafit.task import Examples, Task, take
from metafit.training import meta_train

PLANS = [
    Plan("loop", 1),
    Plan("loop", 1, mixed=True),
    Plan("loop", 1, mixed=True, thrift=True),
    Plan("vmap", None),
    Plan("vmap", 2, mixed=True),
    Plan("compile", None),
    Plan("compile", 1, abreast=2),
    Plan("compile", 2, mixed=True),
    Plan("compile", 1, mixed=True, by_step=True),
    Plan("compile", 1, mixed=True, abreast=2, by_step=True),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The traced graph is run as it is: what the compiler makes of it is for the slow tests."""

    def generate(graph: fx.GraphModule, example: Any, one_thread: bool) -> Callable[[list[Tensor]], Sequence[Tensor]]:
        return lambda tensors: graph(*tensors)

    monkeypatch.setattr(compiled, "generate", generate)
    monkeypatch.setattr(by_step, "generate", generate)


def images(tasks: int = 3, way: int = 3, dtype: torch.dtype = torch.float64) -> Task:
    generator = torch.Generator().manual_seed(0)

    def examples(n: int) -> Examples:
        x = torch.randn(tasks, way * n, 1, 16, 16, generator=generator, dtype=dtype)
        return Examples(x, torch.arange(way).repeat(n).expand(tasks, -1), torch.ones(tasks, way * n, dtype=dtype))

    return Task(examples(1), examples(2))


def conv(norm: str = "batch", steps: int = 2, **options: Any) -> Learner:
    torch.manual_seed(0)
    body = backbones.load("conv4", image_size=16, width=4, norm=norm)
    return build("maml", body.out_dim, 3, body, steps=steps, **options).double()


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize(
    ("norm", "plan"),
    # forward mode over a vmapped group normalisation is refused by PyTorch 2.13 where channels come last
    [("batch", plan) for plan in PLANS]
    + [("group", plan) for plan in PLANS if plan.chunk == 1 or plan == Plan("vmap")],
    ids=str,
)
def test_every_plan_gives_the_same_numbers(norm: str, plan: Plan) -> None:
    learner, tasks = conv(norm), images()
    expected = meta_gradient(learner, tasks, "loop")
    torch.testing.assert_close(meta_gradient(learner, tasks, plan), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize(
    "name", [name for name, entry in ENTRIES.items() if entry.meta_trained and "classification" in entry.tasks]
)
def test_every_learner_is_traced(name: str) -> None:
    torch.manual_seed(0)
    body = backbones.load("conv4", image_size=16, width=4)
    steps = {"steps": 2} if "steps" in ENTRIES[name].options() else {}  # as many graphs again would be the same ones
    learner, tasks = build(name, body.out_dim, 3, body, **steps).double().eval(), images()
    expected = meta_gradient(learner, tasks, "loop")
    torch.testing.assert_close(meta_gradient(learner, tasks, Plan("compile", None)), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan.backend == "compile"], ids=str)
def test_generated_code_gives_the_same_numbers(plan: Plan) -> None:
    learner, tasks = conv(), images()
    expected = meta_gradient(learner, tasks, "loop")
    torch.testing.assert_close(meta_gradient(learner, tasks, plan), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("name", ["maml", "maml++", "alfa+metal"])
def test_all_steps_share_code_which_reads_what_is_frozen_when_it_runs(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Steps that have norms, rates or networks of their own, too."""
    graphs: list[fx.GraphModule] = []
    generate = by_step.generate
    monkeypatch.setattr(
        by_step, "generate", lambda graph, *rest, **more: (graphs.append(graph), generate(graph, *rest, **more))[1]
    )
    body = backbones.load("conv4", image_size=16, width=4).requires_grad_(True)
    frozen = next(body.parameters()).requires_grad_(False)
    learner, tasks = build(name, body.out_dim, 3, body, steps=3).double(), images()
    plan = Plan("compile", 1, mixed=True, by_step=True)
    meta_gradient(learner, tasks, plan)
    assert len(graphs) == 2  # the gradient and its derivative
    frozen.data.mul_(-1.5)
    torch.testing.assert_close(
        meta_gradient(learner, tasks, plan), meta_gradient(learner, tasks, "loop"), rtol=1e-8, atol=1e-10
    )
    assert len(graphs) == 2


@pytest.mark.usefixtures("_uncompiled")
def test_traced_code_follows_the_learner() -> None:
    """Parameters are read at each call; another setting, or another shape, is traced anew."""
    learner, tasks, plan = conv(), images(), Plan("compile", None)
    for change in (lambda: None, lambda: learner.model[1].weight.data.mul_(2), lambda: setattr(learner, "steps", 1)):
        change()
        expected = meta_gradient(learner, tasks, "loop")
        torch.testing.assert_close(meta_gradient(learner, tasks, plan), expected, rtol=1e-8, atol=1e-10)
    few = take(tasks, slice(0, 2))
    torch.testing.assert_close(
        meta_gradient(learner, few, plan), meta_gradient(learner, few, "loop"), rtol=1e-8, atol=1e-10
    )


def test_mixed_mode_keeps_no_graph_of_the_inner_steps() -> None:
    """The network's own operations are in the graph of the outer gradient, or not."""

    def operations(mixed: bool) -> set[str]:
        torch.manual_seed(0)
        learner = build("maml", 8, 3, nn.Sequential(nn.Linear(8, 8), nn.Tanh()), steps=3)
        with mixed_mode(mixed):
            adapted = learner.adapt(Examples(torch.randn(6, 8), torch.arange(3).repeat(2)))["parameters"]
        seen: dict[Any, str] = {}
        waiting = [value.grad_fn for value in adapted.values()]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen[node] = node.name()
                waiting += [parent for parent, _ in node.next_functions]
        return set(seen.values())

    assert any("Tanh" in name for name in operations(mixed=False))
    assert not any("Tanh" in name or "Mm" in name for name in operations(mixed=True))


def test_the_direction_of_a_gradient_is_the_hessian() -> None:
    torch.manual_seed(0)
    a = torch.randn(4, 4, dtype=torch.float64)
    scale, x = torch.tensor(2.0, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def loss(params: dict[str, Tensor], scale: Tensor) -> Tensor:
        return scale * (params["x"] @ a @ params["x"]) / 2

    v = torch.randn(4, dtype=torch.float64)
    along, (given,) = gradient_along(loss, {"x": x}, (scale,), {"x": v})
    hessian = (a + a.T) / 2
    torch.testing.assert_close(along["x"], 2.0 * hessian @ v)
    torch.testing.assert_close(given, x @ hessian @ v)
    torch.testing.assert_close(inner_gradient(loss, {"x": x}, scale)["x"], 2.0 * hessian @ x)


class Quadratic(Loss):
    """½ (w − c)ᵀ A (w − c) of the head's weight w, whatever the outputs: an inner optimum that is known."""

    def __init__(self, a: Tensor):
        super().__init__()
        self.a = a
        self.c = nn.Parameter(torch.zeros(len(a), dtype=a.dtype))

    def forward(self, outputs: Tensor, y: Tensor, weight: Tensor, context: Any) -> Tensor:
        w = outputs.mean(0)[: len(self.a)] - self.c
        return w @ self.a @ w / 2


def test_the_implicit_gradient_is_that_of_the_optimum() -> None:
    """φ* = (A + λI)⁻¹ (A c + λ θ), differentiated in θ and c; the unrolled gradient of many steps agrees."""
    torch.manual_seed(0)
    root = torch.randn(3, 3, dtype=torch.float64)
    a, pull = root @ root.T + torch.eye(3, dtype=torch.float64), 2.0
    head = nn.Linear(1, 3, bias=False).double()
    nn.init.normal_(head.weight)
    inner = Quadratic(a)
    rule = SGD(0.05)
    learner = GradientLearner(nn.Identity(), head, None, "head", rule, inner, "implicit", 400, pull=pull, iterations=10)
    support = Examples(torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64))
    outer = torch.randn(3, dtype=torch.float64)
    found = learner.adapt(support)["parameters"]["head.weight"][:, 0]
    gradients = torch.autograd.grad(found @ outer, [head.weight, inner.c])
    eye = torch.eye(3, dtype=torch.float64)
    inverse = torch.linalg.inv(a + pull * eye)
    torch.testing.assert_close(found, inverse @ (a @ inner.c + pull * head.weight[:, 0]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients[0][:, 0], pull * inverse @ outer, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(gradients[1], a @ inverse @ outer, rtol=1e-8, atol=1e-9)
    unrolled = GradientLearner(nn.Identity(), head, None, "head", Proximal(rule, pull), inner, "unrolled", 400)
    walked = unrolled.adapt(support)["parameters"]["head.weight"][:, 0]
    torch.testing.assert_close(walked, found)
    torch.testing.assert_close(torch.autograd.grad(walked @ outer, [head.weight, inner.c]), gradients)


@pytest.mark.parametrize("outer", ["implicit", "reptile"])
def test_the_steps_that_are_not_differentiated_are_not_kept(outer: Any) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive = []

    class Watched(SGD):
        def update(self, params: Params, grads: Params, state: State, context: Context) -> tuple[Params, State]:
            alive.append(sum(ref() is not None for ref in made))
            found = super().update(params, grads, state, context)
            made.extend(weakref.ref(value) for value in found[0].values())
            return found

    learner = GradientLearner(nn.Linear(1, 8), nn.Linear(8, 1), None, optimizer=Watched(0.01), outer=outer, steps=40)
    meta_gradient(learner, Sinusoids(shot=5, query=5, batch=1, seed=0).draw(0), "loop")
    assert len(alive) == 40 and max(alive) <= 8  # of four parameters: these and the last


def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_unknowns() -> None:
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    a, b = root @ root.T + torch.eye(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    solved = conjugate_gradients(lambda v: {"x": a @ v["x"]}, {"x": b}, 6)
    torch.testing.assert_close(solved["x"], torch.linalg.solve(a, b), rtol=1e-8, atol=1e-8)
    zero = conjugate_gradients(lambda v: v, {"x": torch.zeros(2)}, 3)
    assert torch.equal(zero["x"], torch.zeros(2))


def test_implicit_meta_training_learns_sinusoids() -> None:
    """After 300 steps the error of unseen functions is below 0.8 of the untrained learner's."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU())
    learner = build("imaml", 40, None, body, steps=5)
    test = Sinusoids(shot=10, query=20, batch=100, seed=9).draw(0)
    before = meta_gradient(learner, test, "vmap")[0]
    meta_train(learner, Sinusoids(shot=10, query=10, seed=0), steps=300, rate=3e-3, show_progress=False)
    assert meta_gradient(learner, test, "vmap")[0] < 0.8 * before


def test_half_precision_is_near_and_leaves_the_rest_whole() -> None:
    def learner(precision: str) -> Learner:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        return build("maml", 32, 3, body, steps=2, rate=0.1, precision=precision)

    tasks = Sinusoids(shot=6, query=6, batch=4, seed=1).draw(0)
    labels = torch.arange(3).repeat(2).expand(4, -1)
    tasks = Task(*(Examples(e.x * torch.ones(8), labels) for e in tasks))
    (loss, _, expected), (near, _, found) = (meta_gradient(learner(p), tasks, "loop") for p in ("full", "bf16"))
    assert loss != near and abs(float(loss - near)) < 0.02 * float(loss)
    assert all(g.dtype == torch.float32 for g in found.values())
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    off = torch.cat([(g - found[name]).flatten() for name, g in expected.items()]).norm()
    assert 0 < off < 0.05 * norm
    with pytest.raises(BadInput, match="precision 'fp8'"):
        build("maml", 4, 2, precision="fp8")


@pytest.mark.parametrize("kernel", [2, 3, (2, 1)])
def test_pooling_by_comparisons_is_pooling(kernel: Any) -> None:
    """Ties included: the first of equal values takes the gradient."""
    x = torch.randint(0, 3, (2, 3, 7, 9)).double().requires_grad_()
    ours, theirs = max_pool2d(x, kernel), F.max_pool2d(x, kernel)
    direction = torch.rand_like(theirs)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(pooled, x, direction)[0] for pooled in (ours, theirs)))
    spoilt = torch.tensor([[1.0, torch.nan], [2.0, 3.0]])[None]
    assert max_pool2d(spoilt, 2).isnan().all()
    assert torch.equal(max_pool2d(x, 3, 2, 1), F.max_pool2d(x, 3, 2, 1)), "windows that overlap are left to torch"


@pytest.mark.parametrize(
    ("channels", "padding", "bias"), [(1, 1, False), (3, (0, 1), True), (3, "same", True), (8, 1, True)]
)
def test_convolution_as_a_product(channels: int, padding: Any, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, channels, 6, 7).double(), torch.randn(5, channels, 3, 3).double().requires_grad_()
    shift = torch.randn(5).double() if bias else None
    ours, theirs = conv2d(x, weight, shift, padding=padding), F.conv2d(x, weight, shift, padding=padding)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y, weight, direction)[0] for y in (ours, theirs)))


def test_equal_work_is_done_once() -> None:
    def twice(x: Tensor) -> list[Tensor]:
        return [x.sin() + x.detach().sin(), x * 1.0, x * 1, torch.rand_like(x), torch.rand_like(x)]

    x = torch.ones(3)
    shared, whole = (trace(twice, [x], share) for share in (True, False))
    names = [[str(node.target) for node in graph.graph.nodes] for graph in (shared, whole)]
    assert [targets.count("aten.sin.default") for targets in names] == [1, 2]
    assert names[0].count("aten.rand_like.default") == 2, "random numbers are not equal work"
    torch.testing.assert_close(shared(x)[0], whole(x)[0])


def test_the_first_way_is_kept_unless_another_is_clearly_faster() -> None:
    ran: list[str] = []
    ways: dict[str, Callable[[], Any]] = {name: (lambda name=name: ran.append(name)) for name in "ab"}
    assert set(fastest(ways, [])) == {"a", "b"} and ran == ["a", "b", "a", "b"]
    state = torch.get_rng_state()
    fastest({"a": lambda: torch.rand(3)}, [])
    assert torch.equal(torch.get_rng_state(), state)


def test_auto_remembers_and_compiles_where_it_repays(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, tasks = conv(), images()
    timed: list[list[str]] = []

    def fake(ways: Any, devices: Any) -> dict[Plan, float]:
        timed.append([way.backend for way in ways])
        seconds = {"loop": 1.0, "vmap": 0.5, "compile": 0.1}
        return dict(sorted(((way, seconds[way.backend]) for way in ways), key=lambda pair: pair[1]))

    monkeypatch.setattr(choice, "fastest", fake)
    monkeypatch.setattr(choice, "execute", lambda *_: None)
    monkeypatch.setattr(choice, "say", lambda _: None)
    assert plan_for(learner, tasks).backend == "vmap"
    assert plan_for(learner, tasks, steps=2).backend == "vmap" and timed == [["loop", "vmap"]]
    assert plan_for(learner, tasks, steps=10**6).backend == "compile"
    assert plan_for(learner, tasks, steps=10**6).backend == "compile" and timed[1:] == [["vmap", "compile"]]
    assert plan_for(conv(), tasks, steps=10**6).backend == "compile" and len(timed) == 2, "remembered for its like"
    assert plan_for(conv(steps=1), tasks).backend == "vmap" and len(timed) == 3, "another setting is measured"


def test_where_nothing_compiles_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def generate(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(compiled, "generate", generate)
    learner, tasks = conv(), images()
    found = meta_gradient(learner, tasks, "auto", steps=10**9)
    torch.testing.assert_close(found, meta_gradient(learner, tasks, "loop"), rtol=1e-8, atol=1e-10)
    assert "no C++ compiler found" in caplog.text


def test_little_memory_means_few_tasks_and_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, tasks = conv(), images(tasks=8)
    monkeypatch.setenv("METAFIT_MEMORY", "1G")
    ample = plan_for(learner, tasks, "vmap")
    monkeypatch.setenv("METAFIT_MEMORY", "10K")
    scarce = plan_for(learner, tasks, "vmap")
    assert (ample.chunk, ample.mixed, ample.thrift) == (8, False, False)
    assert (scarce.chunk, scarce.mixed, scarce.thrift) == (1, True, True)
    monkeypatch.setenv("METAFIT_MEMORY", "plenty")
    with pytest.raises(BadInput, match="METAFIT_MEMORY 'plenty': give a size"):
        plan_for(learner, tasks)
    assert parse("2G") == 2 << 30 and parse("500 MiB") == 500 << 20


def test_thrift_gives_back_what_is_free_between_what_is_not() -> None:
    if peak(lambda: None) is None:
        pytest.skip("this system does not tell the memory of a process")

    def growth() -> int:
        before = status("VmRSS")
        tensors = [torch.ones(1 << 18 if i % 2 else 1 << 10) for i in range(200)]  # 1 MiB, and 4 KiB that pin the heap
        del tensors[1::2]
        return status("VmRSS") - before

    assert thriftily(growth) < 20 << 20
    assert thriftily(torch.get_num_threads) == torch.get_num_threads()


def test_the_budget_is_a_share_of_what_is_free() -> None:
    assert (1 << 20) < budget(torch.device("cpu")) < (1 << 50)


def test_side_by_side_keeps_the_order_and_the_number_of_threads() -> None:
    torch.set_num_threads(2)
    seen: set[tuple[str, int]] = set()

    def work(i: int) -> int:
        seen.add((threading.current_thread().name, torch.get_num_threads()))
        return i * i

    assert list(side_by_side(work, range(20), 2)) == [i * i for i in range(20)]
    assert {threads for _, threads in seen} == {1}
    assert torch.get_num_threads() == 2


def test_a_resumed_training_goes_on_by_the_same_plan(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def learner() -> Learner:
        torch.manual_seed(0)
        return build("maml", 8, None, nn.Sequential(nn.Linear(1, 8), nn.Tanh()))

    first = meta_train(learner(), Sinusoids(), steps=4, out=tmp_path / "run", backend="vmap", show_progress=False)
    assert first.plan is not None and first.plan.backend == "vmap"
    again = meta_train(learner(), Sinusoids(), steps=8, out=tmp_path / "run", resume=True, show_progress=False)
    assert again.plan == first.plan


def test_a_compiled_training_goes_on_where_there_is_no_compiler(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(steps: int, **options: Any) -> Any:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(1, 8), nn.Tanh())
        learner = build("maml", 8, None, body)
        return meta_train(learner, Sinusoids(), steps=steps, out=tmp_path, show_progress=False, **options)

    run(2, backend="loop")
    state = json.loads((tmp_path / "state.json").read_text())
    state["plan"] = vars(Plan("compile"))
    (tmp_path / "state.json").write_text(json.dumps(state))
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", _no_compiler)
    assert not compiles(torch.device("cpu"))
    again = run(4, resume=True, backend="loop")
    assert again.plan == Plan("loop", 1) and again.history[-1]["step"] == 4
    assert "this machine has no compiler" in capsys.readouterr().err


def _no_compiler() -> str:
    from torch._inductor.exc import InvalidCxxCompiler

    raise InvalidCxxCompiler


def test_a_random_loss_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout would be drawn anew for the derivative of the inner step: mixed mode is not for it."""
    monkeypatch.setenv("METAFIT_MEMORY", "1K")
    for dropout, mixed in ((0.0, True), (0.2, False)):
        body = nn.Sequential(nn.Linear(1, 8), nn.Dropout(dropout), nn.Tanh())
        learner = build("maml", 8, None, body, steps=2).train()
        assert plan_for(learner, Sinusoids().tasks(0, 4), "vmap").mixed is mixed


def test_plans_are_told_in_words() -> None:
    assert str(Plan("compile", 1, abreast=2)) == "compile (1 at a time, 2 side by side)"
    assert str(replace(Plan("vmap"), mixed=True)) == "vmap (all tasks at once, mixed mode)"
