"""How a batch of tasks is run: which backend, in what pieces, with which derivative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from metafit.errors import BadInput

Backend = Literal["auto", "loop", "vmap", "compile"]


@dataclass(frozen=True)
class Plan:
    """A way to run a batch of tasks. All plans give the same numbers, up to the order of sums.

    Attributes:
        backend: ``"loop"`` one task after another; ``"vmap"`` one batched call a piece; ``"compile"`` generated code
            for the whole step of a piece.
        chunk: tasks in a piece; ``None`` is all of them.
        mixed: inner steps keep no graph (``mixed_mode``): less memory, more arithmetic. Not for
            inner steps that draw random numbers, which would be drawn anew for their derivative.
        abreast: compiled pieces that run side by side, each on one thread; 1 is one after another, on all threads.
        by_step: code is generated for one inner step, and used at each, where the whole takes too long to compile;
            such steps keep no graph.
        thrift: what is freed goes back to the system at once (``thriftily``): less memory, more page faults.
    """

    backend: Literal["loop", "vmap", "compile"] = "loop"
    chunk: int | None = None
    mixed: bool = False
    abreast: int = 1
    by_step: bool = False
    thrift: bool = False

    def __str__(self) -> str:
        """As messages and the benchmark show it."""
        tasks = "all tasks at once" if self.chunk is None else f"{self.chunk} at a time"
        side = f", {self.abreast} side by side" if self.abreast > 1 else ""
        how = ", step by step" if self.by_step else ", mixed mode" if self.mixed else ""
        thrift = ", thrifty" if self.thrift else ""
        return f"{self.backend} ({tasks}{side}{how}{thrift})"


def check_backend(backend: str) -> None:
    """
    Raises:
        BadInput: there is no such backend.
    """
    if backend not in get_args(Backend):
        raise BadInput(f"backend {backend!r}: choose 'auto', 'loop', 'vmap' or 'compile'")
