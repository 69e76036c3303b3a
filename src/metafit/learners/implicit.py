"""The outer gradient at an inner optimum, without the path that led to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from metafit.optim import Params
from metafit.over_tasks.double_backward import in_force
from metafit.over_tasks.inner import gradient_along


def at_optimum(
    loss: Callable[..., Tensor], start: Params, found: Params, pull: float, iterations: int, *given: Any
) -> Params:
    """``found``, with the derivatives of argmin_φ loss(φ, *given) + λ/2 ‖φ − start‖² in ``start`` and ``given``.

    With the Hessian H of the loss at φ, dφ/dstart = (I + H/λ)⁻¹ and dφ/dgiven = −(λI + H)⁻¹ ∂(∇loss)/∂given; products
    with the inverse are solved for by conjugate gradients, so that memory does not depend on the number of inner steps
    (Rajeswaran et al., 2019, iMAML, arXiv:1909.04630, lemma 1 and algorithm 2).

    Args:
        loss: of one task.
        start, found: the parameters that the inner loop started from and ended at, by name.
        pull: λ, above 0.
        iterations: of conjugate gradients.
        given: pytrees of tensors that the loss depends on.
    """
    leaves, spec = tree_flatten((start, found, given))
    return dict(zip(found, _AtOptimum.apply(loss, spec, pull, iterations, *leaves), strict=True))


class _AtOptimum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(loss: Any, spec: TreeSpec, pull: float, iterations: int, *leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.clone() for value in tree_unflatten(leaves, spec)[1].values())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.loss, ctx.spec, ctx.pull, ctx.iterations, *leaves = inputs
        ctx.context = in_force()
        ctx.save_for_backward(*leaves)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        _, found, given = tree_unflatten(ctx.saved_tensors, ctx.spec)
        target = dict(zip(found, outer, strict=True))

        def times(v: Params) -> Params:
            along, _ = gradient_along(ctx.loss, found, given, v)
            return {name: value + along[name] / ctx.pull for name, value in v.items()}

        with ctx.context():
            solved = conjugate_gradients(times, target, ctx.iterations)
            _, along_given = gradient_along(ctx.loss, found, given, solved)
        products = [None if product is None else -product / ctx.pull for product in along_given]
        return None, None, None, None, *solved.values(), *(None for _ in found), *products


def conjugate_gradients(times: Callable[[Params], Params], target: Params, iterations: int) -> Params:
    """x with ``times(x)`` near ``target``, for a symmetric positive definite map (Hestenes and Stiefel, 1952)."""
    x = {name: torch.zeros_like(value) for name, value in target.items()}
    residual, direction = target, target
    size = _dot(residual, residual)
    for _ in range(iterations):
        image = times(direction)
        curvature = _dot(direction, image)
        step = torch.where(curvature > 0, size / curvature.clamp_min(torch.finfo(size.dtype).tiny), 0.0)
        x = {name: value + step * direction[name] for name, value in x.items()}
        residual = {name: value - step * image[name] for name, value in residual.items()}
        smaller = _dot(residual, residual)
        ratio = torch.where(size > 0, smaller / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0)
        direction = {name: value + ratio * direction[name] for name, value in residual.items()}
        size = smaller
    return x


def _dot(a: Params, b: Params) -> Tensor:
    return torch.stack([(value * b[name]).sum() for name, value in a.items()]).sum()
