"""Batch normalisation that is cheap to differentiate twice: against torch's own and finite differences, and where."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp

from metafit.backbones.conv4 import Conv4
from metafit.learners import GradientLearner
from metafit.optim import SGD
from metafit.over_tasks import double_backward, meta_gradient
from metafit.over_tasks.batch_norm import batch_norm
from metafit.task import Examples, Task

BatchNorm = Callable[[Tensor, Tensor, Tensor], Tensor]
SHAPES = [(7, 3), (5, 3, 4), (6, 3, 4, 2), (2, 3, 2, 2, 3)]


def own(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return batch_norm(x, weight, bias, 1e-5)


def torchs(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, True)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """By elementary operations: of torch's, higher derivatives take the statistics for constants (PyTorch 2.13)."""
    over, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    centred = x - x.mean(over, keepdim=True)
    normal = centred * (centred.square().mean(over, keepdim=True) + 1e-5).rsqrt()
    return normal * weight.view(shape) + bias.view(shape)


def drawn(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """An input far from zero, whose variance is not 1."""
    g = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(shape, generator=g, dtype=torch.float64)
    weight, bias = torch.randn(2, shape[1], generator=g, dtype=torch.float64)
    return x, weight, bias


@pytest.mark.parametrize("shape", SHAPES)
def test_both_derivatives_by_finite_differences(shape: tuple[int, ...]) -> None:
    x, weight, bias = (t.requires_grad_() for t in drawn(shape))
    for inputs in ((x, weight, bias), (x, None, None), (x.detach(), weight, bias), (x, weight, None)):
        assert torch.autograd.gradcheck(own, inputs)
        assert torch.autograd.gradgradcheck(own, inputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("argnums", [(0, 1, 2), (0,), (1, 2)], ids=str)
def test_forward_over_reverse_is_that_of_torchs(shape: tuple[int, ...], argnums: tuple[int, ...]) -> None:
    inputs = drawn(shape)
    directions = tuple(torch.cos(inputs[i]) for i in argnums)

    def along(norm: BatchNorm) -> Any:
        def gradient(*chosen: Tensor) -> Any:
            filled = list(inputs)
            for i, value in zip(argnums, chosen, strict=True):
                filled[i] = value
            return grad(lambda *all_of: norm(*all_of).tanh().square().sum(), argnums=argnums)(*filled)

        return jvp(gradient, tuple(inputs[i] for i in argnums), directions)[1]

    for mine, theirs in zip(along(own), along(torchs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_channels_last_stays_so() -> None:
    x, weight, bias = drawn((6, 3, 4, 2))
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    output = own(x, weight, bias)
    (dx,) = torch.autograd.grad(output.tanh().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    for tensor in (output, dx, second):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES)
def test_higher_derivatives(shape: tuple[int, ...]) -> None:
    inputs = drawn(shape)
    fixed = [torch.cos(t) for t in inputs]

    def third(norm: BatchNorm) -> Any:
        def first(*at: Tensor) -> Tensor:
            gradients = grad(lambda *x: (norm(*x).tanh() * fixed[0]).sum(), argnums=(0, 1, 2))(*at)
            return sum(((g * f).sum() for g, f in zip(gradients, fixed, strict=True)), torch.zeros(()))

        def second(*at: Tensor) -> Tensor:
            return sum((g.square().sum() for g in grad(first, argnums=(0, 1, 2))(*at)), torch.zeros(()))

        return grad(second, argnums=(0, 1, 2))(*inputs)

    def reverse_over_forward(norm: BatchNorm) -> Any:
        def along(x: Tensor) -> Tensor:
            return jvp(lambda x: norm(x, *inputs[1:]).tanh(), (x,), (fixed[0],))[1]

        return grad(lambda x: along(x).square().sum())(inputs[0])

    for derivative in (third, reverse_over_forward):
        torch.testing.assert_close(derivative(own), derivative(plain), rtol=1e-9, atol=1e-11)


def test_under_vmap_within_a_task() -> None:
    """As a model or a loss may call it: over inputs, and over what the output is multiplied by."""
    x, weight, bias = drawn((6, 3, 4, 2))
    several = torch.stack([x, x.cos(), x.square()])

    def gradient(norm: BatchNorm) -> Callable[[Tensor], Tensor]:
        return grad(lambda x: norm(x, weight, bias).tanh().sum())

    batched = torch.vmap(gradient(own))(several)
    torch.testing.assert_close(batched, torch.stack([gradient(torchs)(one) for one in several]))

    def by_weight(norm: BatchNorm) -> Any:
        return jacrev(lambda w: norm(x, w, bias).tanh().mean((0, 2, 3)))(weight)

    torch.testing.assert_close(by_weight(own), by_weight(torchs))


def test_it_is_used_for_large_batches_whose_gradient_is_differentiated() -> None:
    large, small = torch.randn(64, 16, 8, 8, requires_grad=True), torch.randn(6, 16, 2, 2, requires_grad=True)
    norm, running = nn.BatchNorm2d(16, track_running_stats=False), nn.BatchNorm2d(16)

    def used(norm: nn.Module, x: Tensor) -> bool:
        return "_BatchNorm" in norm(x).grad_fn.name()

    with double_backward(vmapped=False):
        assert used(norm, large)
        assert not used(norm, small)
        assert not used(running, large)
        assert not used(running.eval(), large)
        assert not used(norm, large.bfloat16())
    assert not used(norm, large)
    with double_backward(vmapped=True):
        assert not used(norm, large)


@pytest.mark.parametrize("outer", ["unrolled", "implicit"])
def test_meta_gradients_are_those_of_torchs(outer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    body = Conv4(channels_in=3, image_size=16, width=4).double()
    learner = GradientLearner(body, nn.Linear(4, 2).double(), 2, optimizer=SGD(0.1), outer=outer, steps=2)
    x = torch.rand(2, 12, 3, 16, 16, dtype=torch.float64)
    y, weight = torch.arange(2).repeat(2, 6), torch.ones(2, 12, dtype=torch.float64)
    tasks = Task(Examples(x[:, :4], y[:, :4], weight[:, :4]), Examples(x[:, 4:], y[:, 4:], weight[:, 4:]))
    context = sys.modules["metafit.over_tasks.double_backward"]
    calls = 0

    def counted(*given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return batch_norm(*given)

    def gradient(large: int) -> dict[str, Tensor]:
        monkeypatch.setattr(context, "LARGE", large)
        return meta_gradient(learner, tasks, "loop")[2]

    expected = gradient(1 << 62)
    monkeypatch.setattr(context, "batch_norm", counted)
    torch.testing.assert_close(gradient(0), expected, rtol=1e-9, atol=1e-11)
    assert calls > 0
