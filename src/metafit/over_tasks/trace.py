"""What a function does to tensors, gradients included, as a graph of operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

_aten = torch.ops.aten
_MARKS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def trace(fn: Callable[..., list[Tensor | None]], example: Sequence[Tensor], share: bool) -> fx.GraphModule:
    """The graph of ``fn(*example)``, for tensors of the shapes of the example.

    Args:
        fn: from tensors to tensors; what it branches on must not be in their values.
        share: compute equal sub-expressions once. Without it, what mixed mode computes again stays computed again.
    """
    traced = make_fx(fn)(*example)
    graph = traced.graph
    _as_values(graph)
    graph.eliminate_dead_code()
    _sum_in_stages(graph)
    if share and not any(map(_changes, graph.nodes)):  # of a value that changes, equal uses may differ
        _split_convolutions(graph)
        _share(graph)
    for node in graph.nodes:
        node.meta.clear()  # each value was noted in a mode of its own, which the compiler takes for a contradiction
    return fx.GraphModule(traced, graph)


def _as_values(graph: fx.Graph) -> None:
    """What changes a tensor in place makes a new one, where no view of the tensor would see the change."""
    for node in list(graph.nodes):
        if not _changes(node):
            continue
        changed, operator = node.args[0], _out_of_place(node.target)
        if operator is None or any(map(_is_view, (changed, *changed.users))):
            continue
        if operator is _aten.copy.default and _same_kind(*node.args[:2]):
            new = node.args[1]
        else:
            with graph.inserting_before(node):
                new = graph.call_function(operator, node.args, node.kwargs)
                new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        changed.replace_all_uses_with(new, lambda user, node=node: user > node)
        graph.erase_node(node)


def _out_of_place(operator: Any) -> Any:
    packet = getattr(_aten, operator._schema.name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, operator._overloadname, None)


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _same_kind(*nodes: fx.Node) -> bool:
    one, other = (node.meta["val"] for node in nodes)
    return (one.shape, one.stride(), one.dtype, one.device) == (other.shape, other.stride(), other.dtype, other.device)


def _changes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _sum_in_stages(graph: fx.Graph) -> None:
    """Sums over several dimensions go over the last of them first.

    The compiler adds up to 4,096 numbers one after another: over a flat picture the rounding errors are alike, and grow
    with their number, to a relative 1e-4. In two stages they are what the eager kernels have.
    """
    for node in list(graph.nodes):
        if node.target not in (torch.ops.aten.sum.dim_IntList, torch.ops.aten.mean.dim):
            continue
        arguments: Any = (*node.args, False)
        value, over, keep = arguments[:3]
        if len(over) < 2 or node.kwargs:
            continue
        *others, last = sorted(d % value.meta["val"].dim() for d in over)
        with graph.inserting_before(node):
            inner = graph.call_function(node.target, (value, [last], True))
            outer = graph.call_function(node.target, (inner, others, True))
            outer = outer if keep else graph.call_function(torch.ops.aten.squeeze.dims, (outer, [*others, last]))
        node.replace_all_uses_with(outer)
        graph.erase_node(node)


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
    return torch.Tag.nondeterministic_seeded not in target.tags
