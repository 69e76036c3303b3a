"""The conformance suite: what every learner, of the catalogue or a stranger's, must keep to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from metafit.learners.base import Learner
from metafit.over_tasks import Plan, meta_gradient, over_tasks
from metafit.task import Examples, Task, count, take, weights


def check_learner(
    learner: Learner,
    tasks: Task,
    *,
    exact_gradient: bool = True,
    padding: bool = True,
    order: bool = True,
    relabels: bool = False,
    tolerance: float = 1e-9,
) -> None:
    """Runs a learner through the contract, and raises at the first clause that it breaks.

    From one seed it gives the same bits in training mode. In evaluation mode, where nothing is random, its loss,
    metrics and gradient are the same whichever backend runs the tasks, with and without padding, in whatever order
    the support set comes; the gradient is the derivative of the loss; and a task of one class or one example is no
    trouble.

    Args:
        learner: small and in double precision; its parameters, modes and torch's generator are left as they were.
        tasks: a batch of three tasks or more, in double precision, none of which has examples of the class
            ``way - 1``: absent classes are a part of the contract.
        exact_gradient: false for learners whose outer gradient is not the derivative of the loss (first order).
        padding: false for learners that see the other examples of their batch (batch normalisation does).
        order: false for learners that read the support set as a sequence.
        relabels: whether permuting the classes of the support set must permute the logits.
        tolerance: largest difference, absolute and relative.

    Raises:
        AssertionError: the clause, and by how much it is broken.
    """
    modes = [(module, module.training) for module in learner.modules()]
    try:
        with torch.random.fork_rng(devices=[]):
            _check_repeats(learner.train(), tasks)
        learner.eval()
        _check_backends(learner, tasks, tolerance)
        if exact_gradient:
            _check_derivative(learner, tasks)
        if padding:
            _check_padding(learner, tasks, tolerance)
        if order:
            _check_order(learner, tasks, tolerance)
        if relabels and learner.way is not None:
            _check_relabelling(learner, tasks, tolerance)
        _check_small(learner, tasks)
    finally:
        for module, mode in modes:
            module.training = mode


def pad(examples: Examples, way: int | None, by: int = 2) -> Examples:
    """A batch of examples with ``by`` more of weight 0, of the last class (or of targets far away)."""

    def more(leaf: Tensor) -> Tensor:
        return torch.cat([leaf, leaf[:, :by].flip(1)], 1)

    y = torch.cat([examples.y, torch.full_like(examples.y[:, :by], 99 if way is None else way - 1)], 1)
    weight = torch.stack([weights(take(examples, t)) for t in range(count(examples))])
    return Examples(tree_map(more, examples.x), y, torch.cat([weight, torch.zeros_like(weight[:, :by])], 1))


def _check_backends(learner: Learner, tasks: Task, tolerance: float) -> None:
    reference = _measured(learner, tasks, "loop")
    _finite("the loop", reference)
    if not learner.vmappable:
        return
    for chunk in (None, 2):
        _same(f"vmap, chunk={chunk}, against the loop", _measured(learner, tasks, "vmap", chunk), reference, tolerance)
    if learner.second_order:
        for backend in ("loop", "vmap"):
            mixed = meta_gradient(learner, tasks, Plan(backend, None, mixed=True))
            _same(f"mixed mode by the {backend}, against the loop", mixed, reference[1:], tolerance)


def _check_repeats(learner: Learner, tasks: Task) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(_measured(learner, tasks, "vmap" if learner.vmappable else "loop"))
    _same("a second run from the same seed", runs[1], runs[0], 0.0)


def _check_derivative(learner: Learner, tasks: Task, step: float = 1e-5, tolerance: float = 1e-6) -> None:
    """The directional derivative in each parameter tensor, against central differences."""
    _, _, gradients = meta_gradient(learner, tasks)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in learner.named_parameters():
        if not parameter.requires_grad:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        direction = (direction / direction.norm()).to(parameter.device)
        start, ends = parameter.detach().clone(), []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.copy_(start + sign * step * direction)
                ends.append(over_tasks(learner.loss, tasks, "loop")[0].mean())
            parameter.copy_(start)
        difference, derivative = (ends[0] - ends[1]) / (2 * step), (gradients[name] * direction).sum()
        _same(f"the gradient of {name} against finite differences", derivative, difference, tolerance)


def _check_padding(learner: Learner, tasks: Task, tolerance: float) -> None:
    padded = Task(pad(tasks.support, learner.way), pad(tasks.query, learner.way))
    for backend in ("loop", "vmap") if learner.vmappable else ("loop",):
        outputs, *others = _measured(learner, padded, backend)
        _finite(f"padded tasks under {backend}", outputs)
        measured = (outputs[:, : tasks.query.y.shape[1]], *others)
        _same(f"padding under {backend}", measured, _measured(learner, tasks, backend), tolerance)


def _check_order(learner: Learner, tasks: Task, tolerance: float) -> None:
    turned = Task(tree_map(lambda leaf: leaf.flip(1), tasks.support), tasks.query)
    _same("support examples in another order", _outputs(learner, turned), _outputs(learner, tasks), tolerance)


def _check_relabelling(learner: Learner, tasks: Task, tolerance: float) -> None:
    assert learner.way is not None
    turned = torch.arange(learner.way, device=tasks.support.y.device).roll(1)
    support = tasks.support._replace(y=turned[tasks.support.y])
    outputs = _outputs(learner, Task(support, tasks.query))[..., turned]
    _same("relabelled classes", outputs, _outputs(learner, tasks), tolerance)


def _check_small(learner: Learner, tasks: Task) -> None:
    for what, support in _small_supports(take(tasks.support, 0)):
        try:
            outputs = learner.predict(learner.adapt(support), take(tasks.query, 0).x)
        except ValueError:  # BadInput, or PyTorch's own: one example has no variance to normalise by
            continue
        _finite(f"a support set of {what}", outputs if learner.way is None else outputs.softmax(-1))


def _small_supports(support: Examples) -> Iterator[tuple[str, Examples]]:
    yield "one example", take(support, slice(0, 1))
    if not support.y.is_floating_point():
        yield "one class", take(support, support.y == support.y[0])


def _measured(learner: Learner, tasks: Task, backend: Any, chunk: Any = None) -> tuple[Any, ...]:
    return _outputs(learner, tasks, backend, chunk), *meta_gradient(learner, tasks, backend, chunk)


def _outputs(learner: Learner, tasks: Task, backend: Any = "loop", chunk: Any = None) -> Tensor:
    return over_tasks(lambda t: learner.predict(learner.adapt(t.support), t.query.x), tasks, backend, chunk).detach()


def _finite(what: str, values: Any) -> None:
    for leaf in tree_leaves(values):  # minus infinity is the logit of an absent class
        assert not (torch.isnan(leaf) | (leaf == torch.inf)).any(), f"{what}: gives numbers that are not finite"


def _same(what: str, values: Any, reference: Any, tolerance: float) -> None:
    for value, expected in zip(tree_leaves(values), tree_leaves(reference), strict=True):
        try:
            torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None
