"""One-task functions over a batch of tasks: a loop, vmap, and vmap in chunks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from metafit.errors import BadInput
from metafit.over_tasks.measure import fastest
from metafit.over_tasks.plan import Backend, check_backend
from metafit.over_tasks.remember import keep, recall
from metafit.over_tasks.settings import identity
from metafit.task import count, take

log = logging.getLogger("metafit.over_tasks")

# Bytes that the operations of one vmapped chunk may produce: past it a chunk falls out of the caches.
CHUNK_BYTES = 1 << 28
TIMED = 8  # tasks that a measurement runs

_refused: WeakKeyDictionary[Any, dict[Any, str]] = WeakKeyDictionary()


def over_tasks(
    fn: Callable[[Any], Any], tasks: Any, backend: Backend = "auto", chunk: int | Literal["auto"] | None = "auto"
) -> Any:
    """Applies ``fn``, written for one task, to every task of a batch; differentiable, with dropout drawn per task.

    Args:
        fn: from one task (a pytree of tensors) to a pytree of tensors. A method of a module, or a ``partial`` of a
            function and a module, is remembered by its module: what vmap refused once is looped from then on.
        tasks: a pytree whose leaves share a leading dimension of T tasks.
        backend: ``"loop"`` runs the tasks one after another; ``"vmap"`` all at once, or ``chunk`` at a time;
            ``"auto"`` is vmap, or the loop where that was measured to be faster, and (the reason logged) for a
            function that vmap refuses: one that calls ``.item()``, branches on data, or updates BatchNorm's running
            statistics. What was measured is remembered by module and shape; a function of no module is not measured.
        chunk: tasks at a time under vmap; ``None`` is all of them, ``"auto"`` as many as keep the chunk's
            intermediate results within 256 MiB.

    Returns:
        The outputs with a leading dimension of T.

    >>> over_tasks(lambda t: t.sum(), torch.arange(6.0).view(3, 2))
    tensor([1., 5., 9.])
    """
    check_backend(backend)
    if backend == "compile":
        raise BadInput("backend 'compile' is of meta_gradient, which a training repeats: choose 'loop' or 'vmap' here")
    if backend == "auto" and not vmappable(fn):
        backend = "loop"
    if backend == "loop":
        return _loop(fn, tasks)
    size = chunk_size(fn, tasks, chunk)
    try:
        if backend == "auto" and _loop_is_faster(fn, tasks, size):
            return _loop(fn, tasks)
        return _vmap(fn, tasks, size)
    except (RuntimeError, NotImplementedError, TypeError) as refusal:
        if backend == "vmap" or isinstance(refusal, torch.OutOfMemoryError):
            raise
        results = _loop(fn, tasks)  # where the loop fails too, the fault is the function's, and this raises it
        refuse(fn, refusal)
        return results


def _vmap(fn: Callable[[Any], Any], tasks: Any, size: int) -> Any:
    if size == 1:  # vmap over a single task only costs: the plain call is the same function
        return _loop(fn, tasks)
    dims = tree_map(lambda leaf: None if leaf is None else 0, tasks)  # None: weights that are all one
    return torch.vmap(fn, (dims,), randomness="different", chunk_size=size)(tasks)


def _loop_is_faster(fn: Callable[[Any], Any], tasks: Any, size: int) -> bool:
    """Whether it is over a few tasks, measured once for a module's function and a shape."""
    if size == 1 or not isinstance(_owner(fn), torch.nn.Module):
        return size == 1
    owner, key = _owner(fn), (_call(fn), torch.is_grad_enabled(), shapes(tasks), size)
    known = _faster.setdefault(owner, {})
    if key not in known:
        kept = ("forward", identity(owner), *key)
        faster = recall(kept)
        if faster is None:
            few = take(tasks, slice(0, min(size, TIMED)))
            ways = {"vmap": lambda: _vmap(fn, few, size), "loop": lambda: _loop(fn, few)}
            faster = next(iter(fastest(ways, _devices(tasks)))) == "loop"
            keep(kept, faster)
        known[key] = faster
    return known[key]


def vmappable(fn: Callable[[Any], Any]) -> bool:
    """False where the function's module says so (``vmappable = False``) or vmap has refused it before."""
    return getattr(_owner(fn), "vmappable", True) and _call(fn) not in _refused.get(_owner(fn), {})


def chunk_size(fn: Callable[[Any], Any], tasks: Any, chunk: int | Literal["auto"] | None) -> int:
    """How many tasks to run at once: see ``over_tasks``. ``"auto"`` runs one task to count what it allocates."""
    total = count(tasks)
    if chunk is None:
        return total
    if chunk != "auto":
        if chunk < 1:
            raise BadInput(f"chunk {chunk}: needs at least one task at a time")
        return min(chunk, total)
    return min(max(1, CHUNK_BYTES // max(1, probe(fn, tasks).bytes)), total)


class Probe(NamedTuple):
    """What one task costs: bytes of new memory, and operations; and whether it draws random numbers."""

    bytes: int
    operations: int
    random: bool = False


def probe(fn: Callable[[Any], Any], tasks: Any) -> Probe:
    """Runs one task to count what it allocates and does; once for a function and a shape."""
    key = (_call(fn), torch.is_grad_enabled(), shapes(tasks))
    known = _probes.setdefault(_owner(fn), {})
    if key not in known:
        with _Counting() as counted, torch.random.fork_rng(devices=_devices(tasks)):
            fn(take(tasks, 0))
        known[key] = Probe(counted.bytes, counted.operations, counted.random)
    return known[key]


_probes: WeakKeyDictionary[Any, dict[Any, Probe]] = WeakKeyDictionary()
_faster: WeakKeyDictionary[Any, dict[Any, bool]] = WeakKeyDictionary()


class _Counting(TorchDispatchMode):
    """Adds up operations, and the bytes of their results that are new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0
        self.random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.operations += 1
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        if not func.is_view:
            self.bytes += sum(t.nbytes for t in tree_leaves(results) if isinstance(t, torch.Tensor))
        return results


def _loop(fn: Callable[[Any], Any], tasks: Any) -> Any:
    results = [fn(take(tasks, i)) for i in range(count(tasks))]
    return tree_map(lambda *leaves: torch.stack(leaves), *results)


def refuse(fn: Callable[[Any], Any], refusal: Exception) -> None:
    """Remembers that vmap refused the function, and logs it."""
    reason = str(refusal).strip().splitlines()[0]
    owner = _owner(fn)
    name = type(owner).__name__ if isinstance(owner, torch.nn.Module) else getattr(owner, "__name__", repr(owner))
    log.warning("vmap refused %s, its tasks run one by one from now on: %s", name, reason)
    _refused.setdefault(owner, {})[_call(fn)] = reason


def _owner(fn: Callable[[Any], Any]) -> Any:
    """What a function is remembered by: the module that it is a method of, or was bound to by ``partial``."""
    bound = fn.args[0] if isinstance(fn, partial) and fn.args else getattr(fn, "__self__", None)
    return bound if isinstance(bound, torch.nn.Module) else fn


def _call(fn: Callable[[Any], Any]) -> tuple[str, bool]:
    """Which of its owner's functions, and in which mode: BatchNorm does in training what vmap refuses, then not."""
    name = getattr(fn.func if isinstance(fn, partial) else fn, "__name__", "")
    return name, getattr(_owner(fn), "training", False)


def shapes(tasks: Any) -> tuple[Any, ...]:
    """Of one task: what a measurement depends on."""
    leaves = (leaf for leaf in tree_leaves(tasks) if leaf is not None)
    return tuple((tuple(leaf.shape[1:]), str(leaf.dtype), str(leaf.device)) for leaf in leaves)


def _devices(tasks: Any) -> list[torch.device]:
    return list({cast(torch.Tensor, leaf).device for leaf in tree_leaves(tasks) if leaf is not None and leaf.is_cuda})
