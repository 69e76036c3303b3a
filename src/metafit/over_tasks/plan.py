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
        chunk: tasks in a piece; ``None`` is all of them. Compiled pieces of one task run side by side, one a thread.
        mixed: inner steps keep no graph (``mixed_mode``): less memory, more arithmetic.
    """

    backend: Literal["loop", "vmap", "compile"] = "loop"
    chunk: int | None = None
    mixed: bool = False

    def __str__(self) -> str:
        """As messages and the benchmark show it."""
        tasks = "all tasks at once" if self.chunk is None else f"{self.chunk} at a time"
        side = ", side by side" if self.backend == "compile" and self.chunk == 1 else ""
        return f"{self.backend} ({tasks}{side}{', mixed mode' if self.mixed else ''})"


def check_backend(backend: str) -> None:
    """
    Raises:
        BadInput: there is no such backend.
    """
    if backend not in get_args(Backend):
        raise BadInput(f"backend {backend!r}: choose 'auto', 'loop', 'vmap' or 'compile'")
