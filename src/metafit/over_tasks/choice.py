"""Chooses how a batch of tasks is run: by measuring, within a memory budget."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from metafit.errors import BadInput
from metafit.over_tasks.double_backward import double_backward
from metafit.over_tasks.execute import execute
from metafit.over_tasks.measure import fastest
from metafit.over_tasks.memory import budget
from metafit.over_tasks.plan import Backend, Plan, check_backend
from metafit.over_tasks.remember import keep, recall
from metafit.over_tasks.run import Probe, chunk_size, probe, refuse, shapes, vmappable
from metafit.over_tasks.settings import half_precision, identity, settings
from metafit.progress import say
from metafit.task import Task, count

log = logging.getLogger("metafit.over_tasks")

SECONDS_AN_OPERATION = 0.25  # of the loss, that compiling its gradient takes: measured on two cores
LONGEST = 240  # seconds: a graph that takes longer is mostly large products, and has little to save
GAIN = 0.4  # the share of the time that compiling is trusted to save before it has been tried
ROOM = 3  # a step's intermediate results, and their gradients, against those of the loss alone
SIDE_BY_SIDE = 4 << 20  # bytes a task above which one task keeps a core busy, and its tensors fill the core's cache


@dataclass
class _Known:
    """What was measured for a learner and a shape: the best without compiling, and with, and their seconds a step."""

    plan: Plan
    seconds: float
    compiled: Plan | None = None
    compiled_seconds: float = 0.0
    refused: bool = False  # compiling was tried, and was no faster
    failed: bool = False  # or failed


_known: WeakKeyDictionary[nn.Module, dict[Any, _Known]] = WeakKeyDictionary()


def plan_for(
    learner: nn.Module,
    tasks: Task,
    backend: Backend = "auto",
    chunk: int | Literal["auto"] | None = "auto",
    steps: int = 1,
) -> Plan:
    """How ``meta_gradient`` is to run a batch of tasks like this one.

    Args:
        learner: a ``Learner``.
        tasks: a batch of T tasks.
        backend: ``"loop"``; ``"vmap"``; ``"compile"``, generated code, where a C++ compiler is installed; ``"auto"``
            times the first two on this batch, within the memory budget, takes the loop unless vmap is clearly
            faster, and remembers what it found, by shape and device. It compiles where the steps to come repay it.
        chunk: tasks at a time; ``None`` is all of them, ``"auto"`` what memory and caches hold.
        steps: how many batches like this one are to come: compiling takes seconds to minutes.

    Raises:
        BadInput: an unknown backend, a chunk below 1, ``METAFIT_MEMORY`` that is no size, or code to be generated for
            half precision (``torch.autocast``), which it does not know of.
    """
    check_backend(backend)
    half = half_precision(learner)
    if backend == "compile" and half is not None:
        raise BadInput(f"backend 'compile': generated code is not for {half}; choose 'auto', or full precision")
    if backend == "loop" or (backend == "auto" and count(tasks) == 1 and steps == 1):
        return Plan("loop", 1)
    allowed = budget(_device(tasks))
    with double_backward(vmapped=False):
        cost = probe(learner.loss, tasks)  # type: ignore[arg-type]
    scarce = ROOM * cost.bytes > allowed
    # a random loss is not to be computed again: it would be another
    mixed = scarce and bool(getattr(learner, "second_order", False)) and not cost.random
    thrift = scarce and _device(tasks).type == "cpu"
    size = _fitting(chunk_size(learner.loss, tasks, chunk), cost, allowed, chunk)  # type: ignore[arg-type]
    if backend == "vmap":
        return Plan("vmap", size, mixed, thrift=thrift)
    generated = replace(_generated(learner, tasks, cost, size, chunk, allowed, mixed), thrift=thrift)
    if backend == "compile":
        return generated
    eager = [Plan("loop", 1, mixed, thrift=thrift), Plan("vmap", size, mixed, thrift=thrift)]
    return _measured(learner, tasks, eager, generated, cost, steps if half is None else 0)


def _measured(learner: nn.Module, tasks: Task, eager: list[Plan], generated: Plan, cost: Probe, steps: int) -> Plan:
    key = (settings(learner), shapes(tasks), count(tasks), *eager, generated)
    here = _known.setdefault(learner, {})
    kept = ("meta-gradient", identity(learner), *key)
    if key not in here:
        found = recall(kept)
        with _leaving_no_trace(learner, tasks):
            here[key] = _time(learner, tasks, eager) if found is None else _from_json(found)
        if vmappable(learner.loss):  # type: ignore[arg-type]  # what was refused is told to each process
            keep(kept, _as_json(here[key]))
    known, estimate = here[key], _estimate(learner, cost, generated)
    if known.refused or known.failed or not _repays(known, estimate, steps):
        return known.plan
    if known.compiled is None:
        with _leaving_no_trace(learner, tasks):
            _try_compiling(learner, tasks, generated, known, estimate)
        if not known.failed:  # a compiler may be there next time
            keep(kept, _as_json(known))
    return known.plan if known.compiled is None else known.compiled


@contextlib.contextmanager
def _leaving_no_trace(learner: nn.Module, tasks: Task) -> Iterator[None]:
    """Measuring draws no random numbers and moves no running statistics, as far as the training can tell."""
    buffers = [(buffer, buffer.clone()) for buffer in learner.buffers()]
    with torch.random.fork_rng(devices=_devices(tasks)):
        yield
    for buffer, before in buffers:
        buffer.copy_(before)


def _time(learner: nn.Module, tasks: Task, plans: list[Plan]) -> _Known:
    ways = {plan: (lambda plan=plan: execute(learner, tasks, plan)) for plan in plans}
    vmap = next(plan for plan in plans if plan.backend == "vmap")
    if not vmappable(learner.loss):  # type: ignore[arg-type]
        del ways[vmap]
    else:
        try:
            ways[vmap]()
        except (RuntimeError, NotImplementedError, TypeError) as refusal:
            if isinstance(refusal, torch.OutOfMemoryError):
                raise
            del ways[vmap]
            next(iter(ways.values()))()  # where the loop fails too, the fault is the learner's, and this raises it
            refuse(learner.loss, refusal)  # type: ignore[arg-type]
    seconds = fastest(ways, _devices(tasks))
    return _Known(*next(iter(seconds.items())))


def _repays(known: _Known, estimate: float, steps: int) -> bool:
    saved = GAIN * known.seconds if known.compiled is None else known.seconds - known.compiled_seconds
    return estimate < LONGEST and steps * saved > estimate


def _try_compiling(learner: nn.Module, tasks: Task, plan: Plan, known: _Known, estimate: float) -> None:
    if estimate > 5:
        say(f"compiling the step, which the steps to come repay: about {estimate:.0f} s")
    try:
        execute(learner, tasks, plan)
        seconds = fastest(
            {known.plan: lambda: execute(learner, tasks, known.plan), plan: lambda: execute(learner, tasks, plan)},
            _devices(tasks),
        )
    except Exception as error:  # whatever the compiler, or the lack of one, may raise: the other backends go on
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        log.warning("the step was not compiled, it runs by %s: %s", known.plan, reason)
        known.failed = True
        return
    known.refused = next(iter(seconds)) != plan
    if not known.refused:
        known.seconds, known.compiled, known.compiled_seconds = seconds[known.plan], plan, seconds[plan]


def _generated(
    learner: nn.Module,
    tasks: Task,
    cost: Probe,
    size: int,
    chunk: int | Literal["auto"] | None,
    allowed: int,
    mixed: bool,
) -> Plan:
    """One task a thread where a task is large; all of them in one call where they are small, or share large weights.

    Of several large steps, code for one of them: that for the whole takes many minutes to compile, and gains nothing.
    """
    weights = sum(p.nbytes for p in learner.parameters())
    if chunk != "auto" or _device(tasks).type != "cpu" or cost.bytes <= max(SIDE_BY_SIDE, weights):
        return Plan("compile", size, mixed)
    abreast = max(1, min(torch.get_num_threads(), allowed // (ROOM * cost.bytes)))
    by_step = getattr(learner, "steps", 1) > 1 and not cost.random
    return Plan("compile", 1, mixed or by_step, abreast, by_step)


def _estimate(learner: nn.Module, cost: Probe, plan: Plan) -> float:
    """Seconds that compiling takes."""
    return SECONDS_AN_OPERATION * cost.operations / (getattr(learner, "steps", 1) if plan.by_step else 1)


def _fitting(size: int, cost: Probe, allowed: int, chunk: int | Literal["auto"] | None) -> int:
    return size if chunk != "auto" else max(1, min(size, allowed // max(1, ROOM * cost.bytes)))


def _device(tasks: Task) -> torch.device:
    leaf: Tensor = tree_leaves(tasks)[0]
    return leaf.device


def _devices(tasks: Task) -> list[torch.device]:
    return [_device(tasks)] if _device(tasks).type == "cuda" else []


def _as_json(known: _Known) -> dict[str, Any]:
    return {**vars(known), "plan": vars(known.plan), "compiled": known.compiled and vars(known.compiled)}


def _from_json(about: dict[str, Any]) -> _Known:
    return _Known(
        **{**about, "plan": Plan(**about["plan"]), "compiled": about["compiled"] and Plan(**about["compiled"])}
    )
