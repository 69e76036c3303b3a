"""The LoRA scope: the algebra, what stays frozen, what is shared over tasks, and that it learns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metafit import backbones
from metafit.apps.packed import packed
from metafit.data import TaskSampler, from_csv
from metafit.errors import BadInput
from metafit.evaluation import evaluate
from metafit.learners import GradientLearner, build, low_rank
from metafit.learners.checks import check_learner
from metafit.over_tasks import meta_gradient, over_tasks
from metafit.task import Examples, Task, take
from metafit.training import Recipe, load_model, meta_train, save_model

DIM, WAY = 6, 4


class Block(nn.Module):
    """A transformer layer over the three tokens of a row, with the names that transformers give."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))
        self.norm, self.up = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        mixed = (self.query(x) @ self.key(x).mT).softmax(-1) @ self.value(x)
        return self.norm(x + nn.functional.gelu(self.up(mixed)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(2, DIM), nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.first(x.unflatten(-1, (3, 2)))).mean(-2)


def body_of() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().double()


def learner_of(name: str = "maml", **options: Any) -> GradientLearner:
    learner = build(name, DIM, WAY, body_of(), scope="lora", **{"rank": 2, "steps": 2} | options).double()
    assert isinstance(learner, GradientLearner)
    return learner.eval()


def stir(learner: nn.Module) -> None:
    """An initialisation as if meta-trained: where B is zero, the gradient in A is too."""
    generator = torch.Generator().manual_seed(1)
    for name, p in learner.named_parameters():
        if p.requires_grad and not name.startswith("optimizer"):
            p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def tasks_of(seed: int = 0) -> Task:
    """Three tasks of three classes; the learners' fourth is absent."""
    generator = torch.Generator().manual_seed(seed)

    def examples(shot: int) -> Examples:
        x = torch.randn(3, 3 * shot, DIM, generator=generator, dtype=torch.float64)
        y = torch.arange(3).repeat(shot).expand(3, -1).clone()
        return Examples(x + y[..., None], y, torch.ones_like(y, dtype=torch.float64))

    return Task(examples(1), examples(2))


def test_the_algebra() -> None:
    """W x + b + α/r · B A x, Hu et al., eq. 3."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 7)).double()
    adapted = low_rank(body, rank=3, alpha=2.0)
    parameters = dict(adapted.named_parameters())
    a, b = parameters["0.lora_A.default.weight"], parameters["0.lora_B.default.weight"]
    assert a.shape == (3, 5) and b.shape == (7, 3) and not b.any() and a.std() > 0
    assert a.dtype == b.dtype == torch.float64
    with torch.no_grad():
        b += torch.randn_like(b)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = x @ (body[0].weight + 2.0 / 3 * b @ a).T + body[0].bias
    torch.testing.assert_close(adapted(x), expected, rtol=1e-12, atol=1e-12)
    torch.manual_seed(0)
    again = dict(low_rank(nn.Sequential(nn.Linear(5, 7)).double(), rank=3).named_parameters())
    assert torch.equal(again["0.lora_A.default.weight"], a), "the same seed gives the same bits"


@pytest.mark.parametrize("name", ["maml", "fomaml", "meta-sgd", "maml++", "alfa+metal"])
def test_conforms(name: str) -> None:
    learner = learner_of(name, rate=0.1)
    stir(learner)
    check_learner(learner, tasks_of(), exact_gradient=name != "fomaml")


def test_before_the_first_step_it_is_the_frozen_network() -> None:
    learner, task = learner_of(), take(tasks_of(), 0)
    start = learner.predict(learner.trajectory(task.support)[0], task.query.x)
    expected = learner.model.get_submodule("head")(body_of()(task.query.x))
    torch.testing.assert_close(start[:, :3], expected[:, :3], rtol=1e-12, atol=1e-12)


def test_what_adapts() -> None:
    learner = learner_of()
    wanted = [f"layers.{i}.{layer}.lora_{m}" for i in (0, 1) for layer in ("query", "value") for m in "AB"]
    assert list(learner.adapting) == [*(f"body.{name}.default.weight" for name in wanted), "head.weight", "head.bias"]
    assert {f"model.{name}" for name in learner.adapting} == {
        n for n, p in learner.named_parameters() if p.requires_grad
    }
    upper = low_rank(body_of(), targets="layers.1.*")
    assert {n.partition(".lora_")[0] for n, p in upper.named_parameters() if p.requires_grad} == {
        f"layers.1.{layer}" for layer in ("query", "key", "value", "up")
    }
    plain = low_rank(nn.Sequential(nn.Linear(3, 4), nn.TransformerEncoderLayer(4, 2), nn.MultiheadAttention(4, 2)))
    names = {n.partition(".lora_")[0] for n, p in plain.named_parameters() if p.requires_grad}
    assert names == {"0"}, "PyTorch's own attention would read the weights past an adapter"


def test_the_base_is_frozen_and_the_users_network_untouched() -> None:
    body = body_of()
    learner = build("maml", DIM, 3, body, scope="lora", rank=2, steps=2, rate=0.5).double()
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    tasks = tasks_of()
    assert not any(".base_layer." in name or ".norm." in name for name in meta_gradient(learner, tasks)[2])
    meta_train(learner, Fixed(tasks), steps=4, rate=0.05, show_progress=False)
    for name, p in learner.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad or name.startswith("optimizer")), name
    for name, p in body.named_parameters():
        assert p.requires_grad and torch.equal(p, dict(body_of().named_parameters())[name])


class Fixed:
    """The same batch, again and again."""

    batch, seed, way, shot, query = 3, 0, 3, 1, 2

    def __init__(self, tasks: Task):
        self.all = tasks

    def tasks(self, start: int, stop: int) -> Task:
        return take(self.all, torch.arange(start, stop) % 3)


class Products(TorchDispatchMode):
    """The shapes that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.mm: list[tuple[int, ...]] = []
        self.bmm: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            self.mm.append(tuple(args[-2].shape) + tuple(args[-1].shape))
        elif name == "bmm":
            self.bmm.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


def test_frozen_layers_run_once_over_the_rows_of_all_tasks() -> None:
    learner, tasks = learner_of(rank=2), tasks_of()
    stir(learner)
    counts = []
    for some in (tasks, take(tasks, slice(0, 2))):
        with Products() as products:
            over_tasks(learner.loss, some, "vmap", None)
        counts.append(len(products.mm))
        assert not any(shape[1:] == (DIM, DIM) for shape in products.bmm), "a copy of a frozen weight for each task"
        rows = len(some.support.y) * 3 * 3  # tasks × examples × tokens
        assert (rows, DIM, DIM, DIM) in products.mm
    assert counts[0] == counts[1], "no more products for more tasks"


@pytest.mark.parametrize("name", ["maml", "meta-sgd"])
def test_saved_and_loaded(name: str, tmp_path: Any) -> None:
    learner, task = learner_of(name, rank=3), take(tasks_of(), 0)
    stir(learner)
    save_model(tmp_path, learner, Recipe())
    torch.manual_seed(9)  # what is drawn anew is replaced
    loaded = load_model(tmp_path, body_of()).learner
    assert loaded.recipe["options"]["rank"] == 3
    answers = [made.predict(made.adapt(task.support), task.query.x) for made in (learner, loaded)]
    assert torch.equal(*answers)
    assert [p.requires_grad for p in learner.parameters()] == [p.requires_grad for p in loaded.parameters()]


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=20, max_position_embeddings=9, **shape))

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(input_ids=x).last_hidden_state.mean(1)

    learner = build("maml", 8, 3, Pooled(), scope="lora", rank=2, steps=2).double().eval()
    stir(learner)
    kinds = {name.split(".")[-4] for name in learner.adapting if ".lora_" in name}
    assert kinds == {"query", "value"}
    ids = torch.randint(0, 20, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    tasks = Task(*(Examples(ids, torch.arange(3).expand(2, -1)) for _ in range(2)))
    loss, _, gradients = meta_gradient(learner, tasks)
    reference, _, expected = meta_gradient(learner, tasks, "loop")
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(gradients, expected)


def test_errors() -> None:
    with pytest.raises(BadInput, match="frozen features: train the backbone"):
        build("maml", DIM, WAY, scope="lora")
    with pytest.raises(BadInput, match="rank 8: only scope 'lora'"):
        build("maml", DIM, WAY, rank=8)
    with pytest.raises(BadInput, match="rank 0: needs at least 1"):
        build("maml", DIM, WAY, body_of(), scope="lora", rank=0)
    with pytest.raises(BadInput, match=r"rank.*'four'"):
        build("maml", DIM, WAY, body_of(), scope="lora", rank="four")
    with pytest.raises(BadInput, match="Conv2d has no linear layer inside"):
        build("maml", DIM, WAY, nn.Conv2d(1, 1, 3), scope="lora")
    with pytest.raises(BadInput, match=r"Encoder has no linear layer inside that 'layer\.\*' matches; it has: first"):
        low_rank(body_of(), targets="layer.*")
    with pytest.raises(BadInput, match="scope 'lora' matches no trainable parameter"):
        GradientLearner(body_of(), nn.Linear(DIM, WAY), WAY, scope="lora")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maml", "alfa+metal"])
def test_learns_on_real_texts(name: str) -> None:
    """Meta-training for a few steps lowers the query loss of intents never met, on the same tasks."""
    data = os.environ.get("METAFIT_DATA")
    if not data:
        pytest.skip("set METAFIT_DATA to the folder of the benchmark data")
    network = backbones.load("minilm-l6")
    source = from_csv(Path(data, "text", "banking77", "test.csv"), text="text", label="category")
    parts = source.with_x(network.preprocess(source.x), "text").split(seed=0)
    unseen = packed(TaskSampler(parts.test, 5, 1, 3, batch=8, seed=1), network)
    torch.manual_seed(0)
    learner = build(name, network.out_dim, 5, network, scope="lora", steps=2)
    before = evaluate(learner, unseen, 48, show_progress=False)
    tasks = packed(TaskSampler(parts.train, 5, 1, 2, batch=4), network)
    meta_train(learner, tasks, steps=25, rate=2e-3, show_progress=False)
    after = evaluate(learner, unseen, 48, show_progress=False)
    gain = before.loss[:, -1] - after.loss[:, -1]
    assert gain.mean() > 0.05 and gain.mean() > 4 * gain.std() / len(gain) ** 0.5
    assert after.score[:, -1].mean() > 0.8 and after.minus(before)["mean"] > -0.02
