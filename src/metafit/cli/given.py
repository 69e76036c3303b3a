"""What was given on the command line, read: a range, an option of a learner, data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import typer

from metafit.errors import BadInput, unknown


def source_of(data: str, text: str | None, label: str, features: str | None, domain: str | None = None) -> Any:
    from metafit.data import read

    return read(data, text, label, None if features is None else by_commas(features), domain)


def training_choices(
    augment: str | None, balance: str | None, unsupervised: str | None
) -> tuple[tuple[str, ...], Any, Any]:
    """The augmentations, the balance and the way to do without labels, all known names."""
    from metafit.apps.tasks import Balance
    from metafit.apps.unsupervised import Unsupervised
    from metafit.training.augment import augments

    names = tuple(by_commas(augment or ""))
    augments(names, None)
    if balance is not None and balance not in get_args(Balance):
        raise unknown("balance", balance, get_args(Balance))
    if unsupervised is not None and unsupervised not in get_args(Unsupervised):
        raise unknown("way to do without labels", unsupervised, get_args(Unsupervised))
    return names, balance, unsupervised


def by_commas(given: str) -> list[str]:
    return [name.strip() for name in given.split(",") if name.strip()]


def backbone_or_none(name: str) -> str | None:
    return None if name == "none" else name


def ways_of(text: str | None) -> int | tuple[int, int] | None:
    return None if text is None else number_or_range("way", text)


def number_or_range(what: str, text: str) -> int | tuple[int, int]:
    try:
        low, dash, high = text.partition("-")
        found = (int(low), int(high)) if dash else int(low)
        if isinstance(found, tuple) and found[0] > found[1]:
            raise ValueError
        return found
    except ValueError:
        raise BadInput(f"--{what} {text!r}: give a number, or a range as 3-5") from None


def options_of(
    learners: Sequence[str], given: list[str] | None, baselines: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Each option goes to the learners that have it, or as ``LEARNER:name=value`` to that one, which it outweighs.
    Baselines take those that name them."""
    from metafit.learners import entry

    chosen: dict[str, dict[str, Any]] = {name: {} for name in (*baselines, *learners)}
    for item in sorted(given or [], key=_of_one):
        name, value = _pair(item)
        owner, of_one, name = name.rpartition(":")
        if of_one and owner not in chosen:
            raise unknown(f"option {item!r}: learner", owner, chosen)
        asked = [owner] if of_one else learners
        takers = [learner for learner in asked if name in entry(learner).options()]
        if not takers:
            raise unknown(
                f"option of {owner}" if of_one else "option", name, {o for a in asked for o in entry(a).options()}
            )
        for learner in takers:
            chosen[learner][name] = value
    return chosen


def _of_one(item: str) -> bool:
    return ":" in item.partition("=")[0]


def pairs(given: list[str] | None) -> dict[str, Any]:
    return dict(map(_pair, given or []))


def _pair(item: str) -> tuple[str, Any]:
    """An option given as name=value."""
    from metafit.cli.config import parsed

    name, equals, value = item.partition("=")
    if not equals:
        raise BadInput(f"--option {item!r}: write it as name=value")
    return name, parsed(value)


def only_these(context: typer.Context, *words: str) -> None:
    """With ``--env`` a command has these words.

    Raises:
        BadInput: another one is on the command line.
    """
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in (*words, "env", "config", "as_json") and source is not None and source.name == "COMMANDLINE":
            known = ", ".join("--" + word.replace("_", "-") for word in words)
            raise BadInput(f"--{name.replace('_', '-')} is not for environments; with --env there are {known}")
