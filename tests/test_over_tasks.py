"""Backends give the same numbers, and second-order gradients are right for what models are made of."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafit.errors import BadInput
from metafit.learners import GradientLearner, Learner, PrototypeLearner
from metafit.optim import SGD
from metafit.over_tasks import double_backward, meta_gradient, over_tasks, run
from metafit.over_tasks.run import chunk_size
from metafit.task import Examples, Task, count, take, weighted_mean, weights


class Op(nn.Module):
    """A linear layer, an operation, and all that it gives as features: second order flows through the operation."""

    def __init__(self, shape: tuple[int, ...], op: nn.Module | Callable[[Tensor], Tensor]):
        super().__init__()
        self.shape, self.op = shape, op
        self.first = nn.Linear(6, int(torch.tensor(shape).prod()))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.first(x).unflatten(-1, self.shape)).flatten(1)


class Attention(nn.Module):
    """Self-attention by ``nn.MultiheadAttention``, as in most transformers."""

    def __init__(self, mask: bool = False):
        super().__init__()
        self.attention, self.mask = nn.MultiheadAttention(4, 2, batch_first=True), mask

    def forward(self, x: Tensor) -> Tensor:
        padded = torch.zeros(x.shape[:2], dtype=torch.bool)
        padded[:, -1] = True
        return self.attention(x, x, x, key_padding_mask=padded if self.mask else None, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            hidden = self.cell(x[:, t], hidden)
        return hidden


def attend(x: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(x, x.flip(-1), x.sin(), **options)


IMAGE, TOKENS, FLAT = (2, 4, 4), (3, 4), (6,)
OPS: dict[str, tuple[tuple[int, ...], Callable[[], Any]]] = {
    "batch_norm 1d": (FLAT, lambda: nn.BatchNorm1d(6, track_running_stats=False)),
    "batch_norm 2d": (IMAGE, lambda: nn.BatchNorm2d(2, track_running_stats=False)),
    "batch_norm without affine": (IMAGE, lambda: nn.BatchNorm2d(2, affine=False, track_running_stats=False)),
    "batch_norm in evaluation": (IMAGE, lambda: nn.BatchNorm2d(2).eval()),
    "instance_norm": (IMAGE, lambda: nn.InstanceNorm2d(2, affine=True)),
    "layer_norm": (TOKENS, lambda: nn.LayerNorm(4)),
    "layer_norm over two": (TOKENS, lambda: nn.LayerNorm((3, 4), bias=False)),
    "torch.layer_norm": (TOKENS, lambda: Direct(torch.layer_norm)),
    "torch.batch_norm": (IMAGE, lambda: Direct(torch.batch_norm)),
    "torch.instance_norm": (IMAGE, lambda: Direct(torch.instance_norm)),
    "torch.native_layer_norm": (TOKENS, lambda: Direct(torch.native_layer_norm)),
    "group_norm": (IMAGE, lambda: nn.GroupNorm(1, 2)),
    "rms_norm": (TOKENS, lambda: nn.RMSNorm(4)),
    "local_response_norm": (IMAGE, lambda: nn.LocalResponseNorm(2)),
    "attention": (TOKENS, lambda: lambda x: attend(x)),
    "attention, causal": (TOKENS, lambda: lambda x: attend(x, is_causal=True)),
    "attention, masked": (TOKENS, lambda: lambda x: attend(x, attn_mask=torch.ones(3, 3).tril().bool())),
    "multihead": (TOKENS, Attention),
    "multihead, masked": (TOKENS, lambda: Attention(mask=True)),
    "transformer layer": (
        TOKENS,
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True),
    ),
    "gru": (TOKENS, Recurrent),
    "conv 1d": (TOKENS, lambda: nn.Conv1d(3, 2, 2)),
    "conv 2d": (IMAGE, lambda: nn.Conv2d(2, 3, 3, padding=1)),
    "conv, depthwise": (IMAGE, lambda: nn.Conv2d(2, 2, 3, padding=1, groups=2)),
    "conv, strided": (IMAGE, lambda: nn.Conv2d(2, 3, 3, stride=2, dilation=1)),
    "conv, transposed": (IMAGE, lambda: nn.ConvTranspose2d(2, 2, 2, stride=2)),
    "max_pool": (IMAGE, lambda: nn.MaxPool2d(2)),
    "avg_pool": (IMAGE, lambda: nn.AvgPool2d(2)),
    "adaptive_avg_pool": (IMAGE, lambda: nn.AdaptiveAvgPool2d(1)),
    "interpolate": (IMAGE, lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
    "gelu": (FLAT, lambda: nn.GELU()),
    "gelu, tanh": (FLAT, lambda: nn.GELU("tanh")),
    "silu": (FLAT, lambda: nn.SiLU()),
    "mish": (FLAT, lambda: nn.Mish()),
    "elu": (FLAT, lambda: nn.ELU()),
    "softplus": (FLAT, lambda: nn.Softplus()),
    "sigmoid": (FLAT, lambda: nn.Sigmoid()),
    "leaky_relu": (FLAT, lambda: nn.LeakyReLU()),
    "prelu": (FLAT, lambda: nn.PReLU()),
    "glu": (FLAT, lambda: nn.GLU()),
    "softmax": (TOKENS, lambda: nn.Softmax(-1)),
    "log_softmax": (TOKENS, lambda: nn.LogSoftmax(-1)),
    "logsumexp": (TOKENS, lambda: lambda x: x.logsumexp(-1)),
    "normalize": (TOKENS, lambda: lambda x: F.normalize(x, dim=-1)),
    "cosine_similarity": (TOKENS, lambda: lambda x: F.cosine_similarity(x[:, :1], x[:, 1:], dim=-1)),
    "distances": (TOKENS, lambda: lambda x: (x[:, :, None] - x[:, None]).square().sum(-1)),
    "einsum": (TOKENS, lambda: lambda x: torch.einsum("nij,nkj->nik", x, x)),
    "solve": (TOKENS, lambda: lambda x: torch.linalg.solve(x @ x.mT + torch.eye(3), x)),
    "embedding": (FLAT, lambda: Looked()),
    "weight_norm": (FLAT, lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Tanh())),
    "weight_norm over all": (
        FLAT,
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4), dim=None), nn.Tanh()),
    ),
    "weight_norm from the end": (
        IMAGE,
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3), dim=-3), nn.Tanh()),
    ),
    "weight_norm, the older hook": (FLAT, lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 4)), nn.Tanh())),
    "hardsigmoid": (FLAT, lambda: nn.Hardsigmoid()),
    "tanh": (FLAT, lambda: nn.Tanh()),
}


class Direct(nn.Module):
    """A model that calls torch's function, and not that of torch.nn.functional."""

    def __init__(self, function: Any):
        super().__init__()
        size = 4 if "layer" in function.__name__ else 2
        self.function, self.weight, self.bias = function, nn.Parameter(torch.rand(size)), nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        if "layer" in self.function.__name__:
            out = self.function(x, (4,), self.weight, self.bias, 1e-5)
            return out[0] if isinstance(out, tuple) else out
        return self.function(x, self.weight, self.bias, None, None, True, 0.1, 1e-5, False)


class Looked(nn.Module):
    """Token embeddings, whose table adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.table(torch.arange(len(x)) % 5)).tanh()


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tasks_of(tasks: int = 3, shot: int = 2, dim: int = 6, way: int = 3) -> Task:
    generator = torch.Generator().manual_seed(1)

    def examples(n: int) -> Examples:
        x = torch.randn(tasks, way * n, dim, generator=generator)
        return Examples(x, torch.arange(way).repeat(n).expand(tasks, -1).clone(), torch.ones(tasks, way * n))

    return Task(examples(shot), examples(shot + 1))


def maml_through(name: str) -> GradientLearner:
    torch.manual_seed(0)
    shape, make = OPS[name]
    body = Op(shape, make())
    dim = body(torch.randn(6, 6)).shape[1]
    learner = GradientLearner(body, nn.Linear(dim, 3), 3, optimizer=SGD(0.5), steps=2)
    for p in learner.model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return learner


def differences(learner: Learner, tasks: Task, directions: dict[str, Tensor], step: float = 1e-5) -> Tensor:
    """The derivative of the loop's loss along the directions, by central differences."""
    ends = []
    for steps in (1, -2):
        with torch.no_grad():
            for name, p in learner.named_parameters():
                if name in directions:
                    p += steps * step * directions[name]
            ends.append(over_tasks(learner.loss, tasks, "loop")[0].mean())
    return (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("name", OPS)
def test_second_order(name: str) -> None:
    learner, tasks = maml_through(name), tasks_of()
    loss, _, loop = meta_gradient(learner, tasks, "loop")
    vmapped_loss, _, vmapped = meta_gradient(learner, tasks, "vmap", None)
    torch.testing.assert_close(vmapped_loss, loss, rtol=1e-10, atol=0)
    for key, value in loop.items():
        torch.testing.assert_close(vmapped[key], value, rtol=1e-9, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
    directions = {key: torch.randn_like(value) / value.numel() for key, value in loop.items()}
    expected = sum((loop[key] * directions[key]).sum() for key in loop)
    torch.testing.assert_close(differences(learner, tasks, directions), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["batch_norm 2d", "layer_norm", "instance_norm"])
def test_the_error_that_double_backward_mends(name: str) -> None:
    """PyTorch's batched rules for fused normalisation lose a part of the second-order gradient, silently."""
    learner, tasks = maml_through(name), tasks_of()
    parameters = dict(learner.model.named_parameters())
    reference = meta_gradient(learner, tasks, "loop")[2]

    def error() -> float:
        loss = torch.vmap(lambda task: learner.loss(task)[0])(tasks).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return max(
            float((g - reference[f"model.{key}"]).abs().max()) for key, g in zip(parameters, gradients, strict=True)
        )

    with double_backward(vmapped=True):
        assert error() < 1e-10
    if error() < 1e-10:
        pytest.xfail(f"torch {torch.__version__} differentiates {name} twice under vmap: the swap can go")


@pytest.mark.parametrize("name", ["batch_norm 2d", "layer_norm", "attention"])
def test_first_order_needs_no_mending(name: str) -> None:
    """Adaptation without an outer gradient (evaluation) differentiates once: plain vmap is right."""
    learner, tasks = maml_through(name), tasks_of()
    with torch.no_grad():
        loop, _ = over_tasks(learner.loss, tasks, "loop")
        vmapped, _ = over_tasks(learner.loss, tasks, "vmap")
    torch.testing.assert_close(vmapped, loop, rtol=1e-10, atol=0)


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 4, 5, 7, 100, "auto"])
def test_chunks_make_no_difference(chunk: Any) -> None:
    learner, tasks = maml_through("layer_norm"), tasks_of(tasks=7)
    expected = meta_gradient(learner, tasks, "loop")
    torch.testing.assert_close(meta_gradient(learner, tasks, "vmap", chunk), expected, rtol=1e-9, atol=1e-11)
    losses, metrics = over_tasks(learner.loss, tasks, "vmap", chunk)
    assert losses.shape == metrics["accuracy"].shape == (7,)
    torch.testing.assert_close(losses.mean(), expected[0], rtol=1e-10, atol=0)


def test_the_gradient_is_that_of_the_mean_loss() -> None:
    learner, tasks = maml_through("tanh"), tasks_of(tasks=4)
    losses = torch.stack([learner.loss(take(tasks, t))[0] for t in range(4)])
    expected = torch.autograd.grad(losses.mean(), [p for p in learner.parameters() if p.requires_grad])
    loss, metrics, gradients = meta_gradient(learner, tasks)
    torch.testing.assert_close(loss, losses.mean().detach())
    torch.testing.assert_close(list(gradients.values()), list(expected), rtol=1e-9, atol=1e-12)
    assert not loss.requires_grad and not metrics["accuracy"].requires_grad
    assert all(p.grad is None for p in learner.parameters())


def test_parameters_without_a_part_in_the_loss() -> None:
    learner, tasks = PrototypeLearner(nn.Linear(6, 4), 3), tasks_of()
    learner.idle = nn.Parameter(torch.ones(2))
    learner.body.bias.requires_grad_(False)
    _, _, gradients = meta_gradient(learner, tasks)
    assert set(gradients) == {"idle", "body.weight", "log_temperature"} and not gradients["idle"].any()
    learner.requires_grad_(False)
    loss, _, gradients = meta_gradient(learner, tasks)
    assert gradients == {} and torch.isfinite(loss)


def test_chunks_shrink_as_models_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CHUNK_BYTES", 1 << 20)
    tasks, sizes = tasks_of(tasks=64, shot=5), []
    for width in (4, 64, 256, 2048):
        body = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 16))
        sizes.append(chunk_size(PrototypeLearner(body, 3).loss, tasks, "auto"))
    assert sizes[0] > 50 and sizes == sorted(sizes, reverse=True) and 1 <= sizes[-1] < sizes[1]
    steps = [GradientLearner(nn.Linear(6, 64), nn.Linear(64, 3), 3, steps=s) for s in (1, 10)]
    one, ten = (chunk_size(learner.loss, tasks, "auto") for learner in steps)
    assert ten < one, "an unrolled step holds memory"


def test_the_probe_is_made_once_and_leaves_no_trace() -> None:
    calls = []

    class Counting(PrototypeLearner):
        def adapt(self, support: Examples) -> Any:
            calls.append(torch.rand(()))
            return super().adapt(support)

    learner, tasks = Counting(nn.Linear(6, 4), 3), tasks_of()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in range(3):
        chunk_size(learner.loss, tasks, "auto")
    assert len(calls) == 1 and torch.equal(torch.get_rng_state(), before)
    chunk_size(learner.loss, tasks_of(shot=4), "auto")
    assert len(calls) == 2, "other shapes are probed anew"
    key = id(learner)
    del learner
    gc.collect()
    assert key not in {id(owner) for owner in run._probes}, "what is remembered goes with its learner"


def test_functions_of_any_kind() -> None:
    x = torch.arange(12.0).view(4, 3)
    torch.testing.assert_close(over_tasks(torch.sum, x), x.sum(1))
    torch.testing.assert_close(over_tasks(lambda t: {"a": (t * 2, t.sum())}, x), {"a": (x * 2, x.sum(1))})
    torch.testing.assert_close(over_tasks(nn.Linear(3, 2).forward, x, "vmap", 3).shape, torch.Size([4, 2]))
    bare = Examples(x[:, :, None], torch.zeros(4, 3, dtype=torch.int64))
    for backend in ("auto", "loop", "vmap"):
        torch.testing.assert_close(over_tasks(lambda e: e.x.sum() + len(e.y), bare, backend), x.sum(1) + 3)


def test_errors() -> None:
    x = torch.ones(3, 2)
    with pytest.raises(BadInput, match="backend 'vamp': choose"):
        over_tasks(torch.sum, x, "vamp")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="chunk 0: needs at least one"):
        over_tasks(torch.sum, x, "vmap", 0)
    learner = PrototypeLearner(nn.Linear(6, 4), 3)
    with pytest.raises(BadInput, match="backend 'vamp'"):
        meta_gradient(learner, tasks_of(), "vamp")  # type: ignore[arg-type]

    def broken(t: Tensor) -> Tensor:
        raise RuntimeError("a fault of its own")

    with pytest.raises(RuntimeError, match="a fault of its own"):
        over_tasks(broken, x, chunk=None)
    assert broken not in run._refused, "what the loop cannot run either is no refusal of vmap's"


def test_weights_and_means() -> None:
    task = take(tasks_of(), 0)
    assert torch.equal(weights(task.query), task.query.weight)
    bare = weights(Examples(torch.zeros(2, 3, dtype=torch.float32), torch.zeros(2)))
    assert torch.equal(bare, torch.ones(2, dtype=torch.float32)) and count(task.support) == 6
    values = torch.tensor([1.0, torch.inf, 5.0], requires_grad=True)
    mean = weighted_mean(values, torch.tensor([1.0, 0.0, 3.0]))
    assert mean.item() == 4.0
    (gradient,) = torch.autograd.grad(mean, values)
    assert gradient.tolist() == [0.25, 0.0, 0.75]
    assert float(weighted_mean(values, torch.zeros(3))) == 0.0


def test_threads_that_leave_in_another_order_give_the_fused_attention_back() -> None:
    inside, leave = threading.Barrier(2), threading.Event()
    seen: list[bool] = []

    def first() -> None:
        with double_backward(vmapped=False):
            inside.wait(10)
        leave.set()

    def second() -> None:
        with double_backward(vmapped=False):
            inside.wait(10)
            leave.wait(10)
            seen.append(torch.backends.cuda.flash_sdp_enabled())  # the same switch on a CPU

    before = torch.backends.cuda.flash_sdp_enabled()
    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before and seen == [False] and torch.backends.cuda.flash_sdp_enabled()
