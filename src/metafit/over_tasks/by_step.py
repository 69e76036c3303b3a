"""The meta-gradient with generated code for one inner step, which all steps and tasks share."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_leaves

from metafit.over_tasks.compiled import generate, layouts
from metafit.over_tasks.double_backward import double_backward
from metafit.over_tasks.inner import Half, Loss, directly, mixed_mode
from metafit.over_tasks.part import Part, part_of
from metafit.over_tasks.plan import Plan
from metafit.over_tasks.settings import settings
from metafit.over_tasks.threads import side_by_side
from metafit.over_tasks.trace import trace
from metafit.task import Task

Program = Callable[[list[Tensor]], Sequence[Tensor | None]]


class _Code:
    """Of a learner's steps, by what is computed and for which shapes; two steps of the same operations share it."""

    def __init__(self) -> None:
        self.ready: set[Any] = set()
        self.programs: dict[Any, Program] = {}
        self.generated: dict[Any, Program] = {}

    def run(
        self, learner: nn.Module, half: Half, loss: Loss, spec: TreeSpec, leaves: tuple[Any, ...]
    ) -> list[Tensor | None]:
        if not (isinstance(loss, partial) and isinstance(loss.func, MethodType) and not loss.keywords):
            return directly(half, loss, spec, leaves)  # what else its steps depend on is not known
        fixed = {name: t for name, t in _state(learner).items() if not t.requires_grad}
        given = [_plain(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = [*given, *(t.detach() for t in fixed.values())]
        key = (half.__name__, loss.func.__qualname__, loss.args, settings(learner), spec, layouts(inputs))
        if key not in self.programs:
            self.programs[key] = self._program(learner, half, loss, spec, leaves, list(fixed), inputs)
        with torch.no_grad():
            return list(self.programs[key](inputs))

    def _program(
        self,
        learner: nn.Module,
        half: Half,
        loss: Loss,
        spec: TreeSpec,
        leaves: tuple[Any, ...],
        fixed: list[str],
        inputs: list[Tensor],
    ) -> Program:
        tensors = sum(isinstance(leaf, Tensor) for leaf in leaves)
        steps = _Steps(learner, half, loss, spec)

        def flat(*values: Tensor) -> list[Tensor | None]:
            given = iter(values[:tensors])
            filled = tuple(next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
            named = {f"learner.{name}": value for name, value in zip(fixed, values[tensors:], strict=True)}
            return functional_call(steps, named, filled)

        with mixed_mode(False), double_backward(vmapped=True, compiled=True), torch.enable_grad():
            graph = trace(flat, inputs, share=True)
        same = (graph.code, layouts(inputs))
        if same not in self.generated:
            self.generated[same] = generate(graph, inputs, one_thread=True)
        return self.generated[same]


class _Steps(nn.Module):
    """A half of a step as a forward pass, which ``functional_call`` runs with other tensors of the learner."""

    def __init__(self, learner: nn.Module, half: Half, loss: Loss, spec: TreeSpec):
        super().__init__()
        self.learner = learner
        self.compute, self.inner_loss, self.spec = half, loss, spec

    def forward(self, *leaves: Any) -> list[Tensor | None]:
        return self.compute(self.inner_loss, self.spec, *leaves)


_codes: WeakKeyDictionary[nn.Module, _Code] = WeakKeyDictionary()


def parts(learner: nn.Module, pieces: Sequence[Task], plan: Plan) -> Iterator[Part]:
    """The parts of pieces of one task each. The first that needs code that there is not yet generates it."""
    code = _codes.setdefault(learner, _Code())
    parameters = [p for p in learner.parameters() if p.requires_grad]
    twins = threading.local()

    def part(piece: Task, mine: nn.Module | None = None) -> Part:
        if mine is None:  # functional_call changes a module while it runs, so each thread has its own
            mine = twins.mine = getattr(twins, "mine", None) or _twin(learner)
        with mixed_mode(run=partial(code.run, mine)), double_backward(vmapped=True), torch.enable_grad():
            return part_of(mine.loss, parameters, piece, "loop")  # type: ignore[arg-type]

    key = (settings(learner), layouts([leaf for leaf in tree_leaves(pieces[0]) if leaf is not None]))
    if key not in code.ready:
        yield part(pieces[0], learner)
        code.ready.add(key)
        pieces = pieces[1:]
    yield from side_by_side(part, pieces, plan.abreast)


def _twin(learner: nn.Module) -> nn.Module:
    return copy.deepcopy(learner, {id(t): t for t in _state(learner).values()})


def _state(learner: nn.Module) -> dict[str, Tensor]:
    return {**dict(learner.named_parameters()), **dict(learner.named_buffers())}


def _plain(leaf: Tensor) -> Tensor:
    """In the layout of its shape alone, so that all steps share one."""
    return leaf.detach().contiguous().view(-1).view(leaf.shape)
