"""The gradient of an inner step, and two ways to differentiate it again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from metafit.errors import BadInput
from metafit.over_tasks.double_backward import in_force

Params = dict[str, Tensor]
Loss = Callable[..., Tensor]
Half = Callable[..., list[Tensor | None]]  # of a step: from its loss, a structure and leaves of that structure
Run = Callable[[Half, Loss, TreeSpec, tuple[Any, ...]], list[Tensor | None]]
_mode = threading.local()


def inner_gradient(loss: Loss, params: Params, *given: Any) -> Params:
    """The gradient in ``params`` of ``loss(params, *given)``, differentiable in ``params`` and in ``given``.

    Reverse mode over the graph of the gradient, which stays in memory until the outer gradient is taken; under
    ``mixed_mode``, forward mode over a gradient that is computed again: what stays in memory is what was given.

    Args:
        loss: of one task; it reads every tensor that it is to be differentiated in, or that differs between tasks,
            from its arguments.
        params: what the inner loop adapts, by name.
        given: pytrees of tensors.

    Raises:
        BadInput: the loss goes through an autograd function of the older kind.
    """
    run = getattr(_mode, "run", None)
    if run is None:
        return _grad(loss, params, given)
    leaves, spec = tree_flatten((params, given))
    gradients = _MixedMode.apply(run, loss, spec, *leaves)
    return dict(zip(params, gradients, strict=True))


def directly(half: Half, loss: Loss, spec: TreeSpec, leaves: tuple[Any, ...]) -> list[Tensor | None]:
    """A half of a step as it is written."""
    return half(loss, spec, *leaves)


@contextlib.contextmanager
def mixed_mode(on: bool = True, run: Run = directly) -> Iterator[None]:
    """A context in which ``inner_gradient`` keeps no graph: memory does not grow by a graph with each inner step.

    Args:
        on: whether it does so.
        run: how the two halves of a step, the gradient and its derivative, are computed.
    """
    before = getattr(_mode, "run", None)
    _mode.run = run if on else None
    try:
        yield
    finally:
        _mode.run = before


class _MixedMode(torch.autograd.Function):
    """∇L(θ, ω), whose vector-Jacobian product is the directional derivative of the gradient.

    The Hessian is symmetric: v·∂(∇_θ L)/∂(θ, ω) = d/dε ∇_(θ, ω) L(θ + εv, ω), forward over reverse (Pearlmutter, 1994;
    for meta-learning, Kemaev et al., 2025, MixFlow-MG, arXiv:2505.00793).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(run: Run, loss: Loss, spec: TreeSpec, *leaves: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(run(_gradient, loss, spec, leaves))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.run, ctx.loss, ctx.spec, *leaves = inputs
        ctx.context = in_force()
        ctx.save_for_backward(*leaves)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Any, ...]:
        with ctx.context():
            return None, None, None, *ctx.run(_along, ctx.loss, ctx.spec, (*ctx.saved_tensors, *directions))


def _grad(loss: Loss, params: Params, given: tuple[Any, ...]) -> Params:
    try:
        return grad(loss)(params, *given)
    except RuntimeError as refusal:
        if "setup_context" not in str(refusal):
            raise
        raise BadInput(
            "the network, or the inner loss, has a torch.autograd.Function without setup_context, which no inner step "
            "can go through: adapt what comes after it (scope head, by the loop or auto), or take another"
        ) from refusal


def _gradient(loss: Loss, spec: TreeSpec, *leaves: Any) -> list[Tensor | None]:
    params, given = tree_unflatten(leaves, spec)
    return list(_grad(loss, params, given).values())


def _along(loss: Loss, spec: TreeSpec, *leaves: Any) -> list[Tensor | None]:
    """The leaves of the structure, then the directions: one a parameter."""
    params, given = tree_unflatten(leaves[: spec.num_leaves], spec)
    directions = leaves[spec.num_leaves :]
    along, along_given = gradient_along(loss, params, given, dict(zip(params, directions, strict=True)))
    return [*along.values(), *along_given]


def gradient_along(
    loss: Loss, params: Params, given: tuple[Any, ...], direction: Params
) -> tuple[Params, list[Tensor | None]]:
    """d/dε ∇ loss(params + ε direction, *given) at ε = 0, in ``params`` and in each leaf of ``given``.

    The first is the product of the Hessian and the direction; the second is ``None`` for leaves that are no floats.
    """
    rest, spec = tree_flatten(given)
    needed = [i for i, leaf in enumerate(rest) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def total(params: Params, chosen: list[Tensor]) -> Tensor:
        filled = list(rest)
        for i, leaf in zip(needed, chosen, strict=True):
            filled[i] = leaf
        return loss(params, *tree_unflatten(filled, spec))

    def gradient(params: Params) -> tuple[Params, list[Tensor]]:
        return grad(total, argnums=(0, 1))(params, [rest[i] for i in needed])

    _, (along, chosen) = jvp(gradient, (params,), (direction,))  # type: ignore[misc]
    along_given: list[Tensor | None] = [None] * len(rest)
    for i, product in zip(needed, chosen, strict=True):
        along_given[i] = product
    return along, along_given
