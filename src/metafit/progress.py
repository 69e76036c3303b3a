"""Progress of long work, on standard error, with rate and time left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from metafit import processes

Advance = Callable[..., None]


@contextlib.contextmanager
def progress(what: str, total: int, unit: str = "it", enabled: bool = True) -> Iterator[Advance]:
    """Yields ``advance(n=1, **figures)``; the figures (loss, accuracy, ...) are shown beside the bar.

    Nothing is drawn where standard error is not a terminal, where ``enabled`` is false, or by another process than the
    first.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    figures: dict[str, Any] = {}
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
        disable=not (enabled and console.is_terminal and processes.first()),
        transient=True,
    ) as bar:
        task = bar.add_task(what, total=total, rate="", figures="")

        def advance(n: int = 1, **shown: Any) -> None:
            figures.update({k: v for k, v in shown.items() if v is not None})
            text = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
            bar.update(task, advance=n, figures=text)
            speed = bar.tasks[0].speed
            if speed:
                bar.update(task, rate=f"{speed:.3g} {unit}/s")

        yield advance


def say(message: str) -> None:
    """One line to the user, on standard error, so that standard output stays machine-readable; of several processes
    the first one's."""
    from rich.console import Console

    if processes.first():
        Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)
