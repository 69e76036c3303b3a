"""What a function does to tensors, gradients included, as a graph of operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

_aten = torch.ops.aten
_ELEMENTWISE = {
    _aten.add.Tensor,
    _aten.sub.Tensor,
    _aten.mul.Tensor,
    _aten.div.Tensor,
    _aten.neg.default,
    _aten.pow.Tensor_Scalar,
}
_NEW = _aten._new_zeros_with_same_feature_meta.default
_MARKS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def trace(fn: Callable[..., list[Tensor | None]], example: Sequence[Tensor], share: bool) -> fx.GraphModule:
    """The graph of ``fn(*example)``, for tensors of the shapes of the example.

    Args:
        fn: from tensors to tensors; what it branches on must not be in their values.
        share: compute equal sub-expressions once. Without it, what mixed mode computes again stays computed again.
    """
    traced = make_fx(fn)(*example)
    graph = traced.graph
    _read_copies(graph)
    graph.eliminate_dead_code()
    _sum_in_stages(graph)
    if share:
        _split_convolutions(graph)
        _share(graph)
    for node in graph.nodes:
        node.meta.clear()  # each value was noted in a mode of its own, which the compiler takes for a contradiction
    return fx.GraphModule(traced, graph)


def _read_copies(graph: fx.Graph) -> None:
    """Forward-mode differentiation copies a tangent into new memory: what follows can read the original."""
    for node in list(graph.nodes):
        if node.target is not _aten.copy_.default or node.args[0].target is not _NEW or len(node.args[0].users) > 1:
            continue
        new, original = (argument.meta["val"] for argument in node.args[:2])
        if (new.shape, new.dtype) == (original.shape, original.dtype):
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)


def _sum_in_stages(graph: fx.Graph) -> None:
    """Sums over several dimensions go over the last of them first, and lie as the channels do: innermost.

    The compiler adds up to 4,096 numbers one after another: over a flat picture the rounding errors are alike, and grow
    with their number, to a relative 1e-4. In two stages they are what the eager kernels have. What it only adds up it
    would first write with the channels outermost, and that costs more than the sum.
    """
    for node in list(graph.nodes):
        if node.target not in (torch.ops.aten.sum.dim_IntList, torch.ops.aten.mean.dim):
            continue
        arguments: Any = (*node.args, False)
        value, over, keep = arguments[:3]
        if len(over) < 2 or node.kwargs:
            continue
        dims = value.meta["val"].dim()
        reduced = sorted(d % dims for d in over)
        order = sorted(range(dims), key=lambda d: (d > 0 and d not in reduced, d))
        back = [order.index(d) for d in range(dims)]
        *others, last = sorted(back[d] for d in reduced)
        with graph.inserting_before(node):
            inner = graph.call_function(node.target, (_permuted(graph, value, order), [last], True))
            outer = graph.call_function(node.target, (inner, others, True))
            total = graph.call_function(torch.ops.aten.permute.default, (outer, back))
            total = total if keep else graph.call_function(torch.ops.aten.squeeze.dims, (total, reduced))
        node.replace_all_uses_with(total)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _permuted(graph: fx.Graph, value: fx.Node, order: list[int]) -> fx.Node:
    """The value with its dimensions in that order; what nothing else uses is computed so from the start."""
    if value.target not in _ELEMENTWISE or len(value.users) > 1:
        missing = len(order) - value.meta["val"].dim()
        if missing and not value.meta["val"].dim():
            return value
        for _ in range(missing):
            value = graph.call_function(torch.ops.aten.unsqueeze.default, (value, 0))
        return graph.call_function(torch.ops.aten.permute.default, (value, order))
    operands = [_permuted(graph, x, order) if isinstance(x, fx.Node) else x for x in value.args]
    return graph.call_function(value.target, tuple(operands), value.kwargs)


def _split_convolutions(graph: fx.Graph) -> None:
    """One node for each gradient of a convolution, so that each is computed once, and where it is used."""
    operator = torch.ops.aten.convolution_backward.default
    for node in list(graph.nodes):
        if node.target is not operator:
            continue
        for gradient in list(node.users):
            which = gradient.args[1]
            with graph.inserting_before(gradient):
                alone = graph.call_function(operator, (*node.args[:-1], [i == which for i in range(3)]))
            gradient.args = (alone, which)
        graph.erase_node(node)


def _share(graph: fx.Graph) -> None:
    """Merges nodes of the same pure operation on the same inputs; what only marks a tensor is left out."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _pure(node.target):
            continue
        if node.target in _MARKS:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        twin = seen.setdefault((node.target, _comparable(node.args), _comparable(node.kwargs)), node)
        if twin is not node:
            node.replace_all_uses_with(twin)
            graph.erase_node(node)


def _comparable(value: Any) -> Any:
    """Equal for equal arguments, and for those alone: to Python 1, 1.0 and True are equal."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_comparable, value))
    if isinstance(value, dict):
        return tuple((key, _comparable(item)) for key, item in sorted(value.items()))
    return value if isinstance(value, fx.Node) else (type(value), value)


def _pure(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") == "_operator"  # getitem
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable
