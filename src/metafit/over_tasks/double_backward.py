"""Makes fused operations right, and possible, where a gradient is differentiated again."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from metafit.over_tasks import vectorised
from metafit.over_tasks.batch_norm import batch_norm

LARGE = 1 << 16  # entries of a batch from which a call of our own repays its own cost


@contextlib.contextmanager
def double_backward(vmapped: bool, compiled: bool = False) -> Iterator[None]:
    """A context in which second-order gradients are right for any model, unmodified.

    Attention takes its math kernel, the one with a double backward; weight normalisation, whose second derivative is
    wrong, and the hard sigmoid, which has none, are primitives (PyTorch 2.13). Under vmap, batch, instance and layer
    normalisation are swapped for primitives: PyTorch 2.13's batched rules for the fused ones save statistics that no
    longer depend on the input, so that the loss is right and its second-order gradient silently is not (pytorch
    #175754, #186256, #196699; functorch #534). Without vmap the fused ones are right, and stay, but for large batches
    under batch normalisation on a CPU, which one of our own differentiates faster. Group normalisation is right under
    vmap, and refuses images whose channels come last: it is swapped too.

    Args:
        vmapped: whether the operations run under vmap.
        compiled: whether they are traced for the compiler, which fuses primitives: then they are swapped for speed too.
    """
    swap = {**_swap, **_vectorised} if compiled else _swap if vmapped else None
    before = getattr(_in_force, "arguments", None)
    _in_force.arguments = (vmapped, compiled)
    try:
        with _process_wide(), _Primitives(swap) if swap else contextlib.nullcontext():
            yield
    finally:
        _in_force.arguments = before


_in_force = threading.local()
_lock, _holders, _kernels = threading.Lock(), [0], contextlib.ExitStack()


@contextlib.contextmanager
def _process_wide() -> Iterator[None]:
    """The math kernel of attention and the primitives that do without vmap are the whole process's: of threads side by
    side the first takes them and the last gives them back, or one would leave while another is within, and that one
    then keep them for good. A mode of PyTorch's would be the thread's, and make each small operation a third slower."""
    with _lock:
        if not _holders[0]:
            _kernels.enter_context(sdpa_kernel(SDPBackend.MATH))
            for module, name, primitive in _always:
                _kernels.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, primitive)
        _holders[0] += 1
    try:
        yield
    finally:
        with _lock:
            _holders[0] -= 1
            if not _holders[0]:
                _kernels.close()


def in_force() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Makes the context that is in force once more: ``torch.autograd.grad`` runs what it calls outside of it."""
    arguments = getattr(_in_force, "arguments", None)
    return contextlib.nullcontext if arguments is None else partial(double_backward, *arguments)


def within_double_backward() -> bool:
    """Whether what runs now does so in that context: of generated code, learners without inner steps do too."""
    return getattr(_in_force, "arguments", None) is not None


class _Primitives(TorchFunctionMode):
    def __init__(self, swap: dict[Any, Callable[..., Any]]):
        super().__init__()
        self.swap = swap

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.swap.get(func, func)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    shape = [1, -1] + [1] * (input.dim() - 2)
    if not training and running_mean is not None and running_var is not None:
        normal = (input - running_mean.view(shape)) * torch.rsqrt(running_var.view(shape) + eps)
        return _affine(normal, weight, bias, shape)
    if running_mean is not None:  # it updates them in place, which vmap refuses, and the loop that follows can do
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _normalise(input, [0, *range(2, input.dim())], weight, bias, shape, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is not None:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _normalise(input, list(range(2, input.dim())), weight, bias, [1, -1] + [1] * (input.dim() - 2), eps)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    groups = input.unflatten(1, (num_groups, -1))
    normal = _normalise(groups, list(range(2, groups.dim())), None, None, [], eps)
    return _affine(normal.reshape(input.shape), weight, bias, [-1] + [1] * (input.dim() - 2))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _normalise(input, list(range(-len(normalized_shape), 0)), weight, bias, list(normalized_shape), eps)


def _normalise(
    x: Tensor, over: list[int], weight: Tensor | None, bias: Tensor | None, shape: list[int], eps: float
) -> Tensor:
    """In single precision where the input has half of it; the result has the input's precision."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    centred = wide - wide.mean(over, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(over, keepdim=True) + eps)
    return _affine(normal, weight, bias, shape).to(x.dtype)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]) -> Tensor:
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _torch_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _layer_norm(input, normalized_shape, weight, bias, eps)


def _native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    over = list(range(-len(normalized_shape), 0))
    mean = input.mean(over, keepdim=True)
    scale = torch.rsqrt((input - mean).square().mean(over, keepdim=True) + eps)
    return _layer_norm(input, normalized_shape, weight, bias, eps), mean, scale


def _cheap_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    eager = getattr(_in_force, "arguments", None) == (False, False)  # of this thread
    if not eager or not training or running_mean is not None or not _worth_it(input):
        return _torchs_batch_norm(
            input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled
        )
    return batch_norm(input, weight, bias, eps)


_torchs_batch_norm = torch.batch_norm


def _worth_it(input: Tensor) -> bool:
    return input.numel() >= LARGE and input.device.type == "cpu" and input.dtype in (torch.float32, torch.float64)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    if dim == -1:  # not the last, but over all, and g is a number
        return v * (g / v.square().sum().sqrt())
    over = [d for d in range(v.dim()) if d != dim % v.dim()]
    return v * (g / v.square().sum(over, keepdim=True).sqrt())


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(input + 3) / 6


_always: list[tuple[Any, str, Callable[..., Any]]] = [
    (torch, "_weight_norm", _weight_norm),  # what the parametrization calls
    (sys.modules["torch.nn.utils.weight_norm"], "_weight_norm", _weight_norm),  # and the older hook
    (F, "hardsigmoid", _hardsigmoid),
    (torch, "batch_norm", _cheap_batch_norm),
]

# models call them by torch.nn.functional, which calls torch, and some call torch
_swap: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    torch.batch_norm: _torch_batch_norm,
    torch.instance_norm: _torch_instance_norm,
    torch.layer_norm: _torch_layer_norm,
    torch.native_layer_norm: _native_layer_norm,
}

_vectorised: dict[Any, Callable[..., Any]] = {
    F.conv2d: vectorised.conv2d,
    F.max_pool2d: vectorised.max_pool2d,
    torch.max_pool2d: vectorised.max_pool2d,
}
