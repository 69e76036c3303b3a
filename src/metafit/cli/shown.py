"""What a command shows and keeps: for people, for programs, in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import typer

from metafit import processes
from metafit.cli.given import by_commas
from metafit.progress import say

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from metafit.training import Run


def tracked(context: typer.Context) -> AbstractContextManager[Run]:
    """Tracks what the command does in its folder, from the configuration that it runs with."""
    from metafit.cli.config import complete
    from metafit.training import track
    from metafit.training.descend import KIND as PRETRAINING
    from metafit.training.store import STATE, STATE_KIND
    from metafit.weights import check_kind, free_for

    given = context.params
    acts, trains = bool(given.get("env")), context.info_name == "train"
    free_for(given["out"], ("agent" if acts else "learner") if trains else None)
    if trains or context.info_name == "pretrain":
        check_kind(given["out"], "agent" if acts else STATE_KIND if trains else PRETRAINING, STATE)
    return track(
        given["out"],
        complete(context),
        command=str(context.info_name),
        resume=given.get("resume", False),
        also=by_commas(given["track"] or ""),
    )


def tell_run(run: Run, made: dict[str, Any]) -> None:
    """The figures of the first learner on the test tasks."""
    figures = {name: figure["mean"] for name, figure in made["metrics"].items()}
    metric = next(name for name in ("accuracy", "mse", "return") if name in figures)
    run.tell(figures[metric], f"test {metric}", **figures)


def show_trained(trained: Any, out: Path, as_json: bool) -> None:
    best = "" if trained.best is None else f", validation {trained.best:.4f}"
    ended = {"patience": "; no look was better for as long as --patience asks", "seconds": "; time was up"}
    last = f" of {trained.history[-1]['step']}{ended.get(trained.stopped, '')}" if trained.history else ""
    say(f"model in {out}: best at step {trained.best_step}{last}{best}, {trained.seconds:.0f} s")
    if trained.best is not None and trained.best_step == 0:
        say("no step made the validation tasks better: the model is as it was before the training")
    if as_json and processes.first():
        print_json(
            {"model": str(out), "best_step": trained.best_step, "validation": trained.best, "history": trained.history}
        )


def show_result(made: dict[str, Any], out: Path, as_json: bool) -> None:
    from metafit.apps.comparing import tell
    from metafit.evaluation import verdict

    tell(made)
    say(verdict(made))
    say(f"{out / 'report.html'}")
    if as_json:
        print_json(made)


def print_json(value: Any) -> None:
    print(json.dumps(value, allow_nan=False))  # in ASCII, whatever the terminal's encoding


def show_table(header: tuple[str, ...], rows: list[tuple[Any, ...]], as_json: bool) -> None:
    if as_json:
        print_json([dict(zip(header, row, strict=True)) for row in rows])
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    Console().print(table)


def in_words(kind: Any) -> str:
    """What an option takes, by its annotation.

    >>> in_words(float | None), in_words(Literal["last", "learned"]), in_words(tuple[float, float] | int)
    ('float', 'last, learned', 'tuple[float, float] or int')
    """
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    parts = (
        [part for part in get_args(kind) if part is not type(None)] if get_origin(kind) in (Union, UnionType) else []
    )
    if parts:
        return " or ".join(map(in_words, parts))
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind or "")


def first_sentence(made: Any) -> str:
    """The first sentence of what it says of itself."""
    return " ".join((made.__doc__ or "").split()).replace("``", "").partition(". ")[0].rstrip(".")
