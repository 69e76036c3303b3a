"""The meta-gradient of a piece of a batch as generated code: traced once for a shape, then compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from metafit.over_tasks.double_backward import double_backward
from metafit.over_tasks.inner import mixed_mode
from metafit.over_tasks.part import Part, part_of
from metafit.over_tasks.plan import Plan
from metafit.over_tasks.settings import settings
from metafit.over_tasks.threads import side_by_side
from metafit.over_tasks.trace import trace
from metafit.task import Task

SMALL = 1 << 20  # bytes of parameters and tasks


class Program(NamedTuple):
    """Code for one piece."""

    run: Callable[[list[Tensor]], Sequence[Tensor]]
    result: TreeSpec  # what its flat results are of


_programs: WeakKeyDictionary[nn.Module, dict[Any, Program]] = WeakKeyDictionary()


def compiles(device: torch.device) -> bool:
    """Whether code can be generated here; on a processor it takes a C++ compiler."""
    if device.type != "cpu":
        return True
    from torch._inductor.cpp_builder import get_cpp_compiler  # seconds to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def parts(learner: nn.Module, pieces: Sequence[Task], plan: Plan) -> Iterator[Part]:
    """The parts of the pieces, side by side as the plan says.

    Code is generated where there is none yet for the learner, its settings and these shapes.
    """
    state = {**dict(learner.named_parameters()), **dict(learner.named_buffers())}
    tensors = [value.detach() for value in state.values()]
    known, now = _programs.setdefault(learner, {}), settings(learner)
    work = []
    for piece in pieces:
        leaves, spec = tree_flatten(piece)
        inputs = [*tensors, *(leaf for leaf in leaves if leaf is not None)]
        key = (plan, now, spec, layouts(inputs), torch.get_num_threads())
        if key not in known:
            known[key] = _program(learner, state, leaves, spec, inputs, plan)
        work.append((known[key], inputs))
    with torch.no_grad():
        results = side_by_side(_run, work, plan.abreast)
        for (program, _), flat in zip(work, results, strict=True):
            yield Part(*tree_unflatten(list(flat), program.result))


def layouts(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What code is generated for."""
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)


def _run(work: tuple[Program, list[Tensor]]) -> Sequence[Tensor]:
    program, inputs = work
    with torch.no_grad():  # the mode is a thread's own
        return program.run(inputs)


def _program(
    learner: nn.Module, state: dict[str, Tensor], leaves: list[Any], spec: TreeSpec, inputs: list[Tensor], plan: Plan
) -> Program:
    loss = _Loss(learner)
    trained = [name for name, value in state.items() if value.requires_grad]
    result: list[TreeSpec] = []

    def flat_part(*tensors: Tensor) -> list[Tensor | None]:
        given = dict(zip(state, tensors, strict=False))
        given.update({name: given[name].detach().requires_grad_() for name in trained})
        rest = iter(tensors[len(state) :])
        piece = tree_unflatten([None if leaf is None else next(rest) for leaf in leaves], spec)
        named = {f"learner.{name}": value for name, value in given.items()}
        part = part_of(
            lambda task: functional_call(loss, named, (task,)), [given[name] for name in trained], piece, "vmap"
        )
        flat, structure = tree_flatten(part)
        result[:] = [structure]
        return flat

    second_order = getattr(learner, "second_order", False)
    with mixed_mode(second_order), double_backward(vmapped=True, compiled=True), torch.enable_grad():
        graph = trace(flat_part, inputs, share=not plan.mixed)
    small = sum(t.nbytes for t in inputs) < SMALL  # threads would cost more than they share
    return Program(generate(graph, inputs, one_thread=plan.abreast > 1 or small), result[0])


def generate(
    graph: fx.GraphModule, example: Sequence[Tensor], one_thread: bool
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """Code for a graph: a CUDA graph on a GPU; for pieces side by side, on one thread and without Python's lock."""
    import torch._inductor  # seconds to import

    options: dict[str, Any] = {}
    if example[0].is_cuda:
        options = {"triton.cudagraphs": True}
    elif one_thread:
        options = {"cpp_wrapper": True, "cpp.threads": 1}
    with torch.no_grad():
        run = torch._inductor.compile(graph, list(example), options)
    return partial(_call, run)


def _call(run: Callable[..., Any], tensors: list[Tensor]) -> Sequence[Tensor]:
    return run(*tensors)


class _Loss(nn.Module):
    """A learner's loss as a forward pass, which ``functional_call`` runs with other parameters."""

    def __init__(self, learner: nn.Module):
        super().__init__()
        self.learner = learner

    def forward(self, task: Task) -> Any:
        return self.learner.loss(task)  # type: ignore[operator]
