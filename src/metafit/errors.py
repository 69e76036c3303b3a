"""The one error a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class BadInput(ValueError):
    """Input that metafit cannot use: the message says what, where, and the mend, on one line."""


class Diverged(BadInput):
    """Training that came to a figure that is not finite."""


FAULTS = (Diverged, RuntimeError, MemoryError)
"""What may befall one of many trainings, and should not end the others: it diverges, it finds no memory."""


def in_short(fault: BaseException) -> str:
    """On one line.

    >>> in_short(RuntimeError("out of memory:\\n8 GiB"))
    'RuntimeError: out of memory: 8 GiB'
    """
    text = " ".join(str(fault).split())[:300]
    return text if isinstance(fault, BadInput) else f"{type(fault).__name__}: {text}"


def some(words: Sequence[str], most: int) -> str:
    """The first of them, and dots where there are more.

    >>> some(["a", "b", "c"], 2)
    'a, b, ...'
    """
    return ", ".join(words[:most]) + ", ..." * (len(words) > most)


def unknown(kind: str, name: str, known: Iterable[str]) -> BadInput:
    """The error for a name that is not in a catalogue, with the nearest names that are.

    >>> str(unknown("learner", "protonett", ["protonet", "maml"]))
    "unknown learner 'protonett': did you mean 'protonet'? (known: maml, protonet)"
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return BadInput(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")
