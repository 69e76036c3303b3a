"""Sentence templates, expanded at random: ``(turn|switch) on [the] {name}``.

The notation is that of Home Assistant's sentence files: ``(a|b)`` one of several, ``(a;b)`` both in any order,
``[a]`` perhaps, ``{list:slot}`` a value, ``<rule>`` another template. Earlier alternatives are likelier (Zipf's law),
since the authors write the usual wording first.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping

from metafit.errors import BadInput

OPTIONAL = 0.4  # how often a bracketed part is said,
GLUE = 0.9  # and how often where it only holds the sentence together: people say "turn on the light"
_GLUE_WORDS = frozenset({"a", "an", "and", "by", "floor", "for", "in", "is", "it", "like", "list", "my", "of", "on"})
_GLUE_WORDS |= {"percent", "the", "to", "<in>", "<the>"}


def expand(
    template: str, rules: Mapping[str, str], value: Callable[[str, random.Random], str], rng: random.Random
) -> str:
    """One sentence of a template, blanks tidied.

    Args:
        template: the template.
        rules: templates by the name in ``<name>``.
        value: a value for the list named in ``{list:slot}``; it may be a template too.
        rng: every choice comes from it.

    Raises:
        BadInput: a bracket is not closed, or a rule is not known.

    >>> expand("(turn|turn) on [[[]]] {name}", {}, lambda name, rng: "the " + name[:4], random.Random(0))
    'turn on the name'
    """
    pieces: list[str] = []
    _say(template, rules, value, rng, pieces)
    return re.sub(r"\s+", " ", "".join(pieces)).strip()


def _say(
    template: str,
    rules: Mapping[str, str],
    value: Callable[[str, random.Random], str],
    rng: random.Random,
    pieces: list[str],
) -> None:
    together = _split(template, ";")
    if len(together) > 1:
        rng.shuffle(together)
        for part in together:
            pieces.append(" ")
            _say(part, rules, value, rng, pieces)
            pieces.append(" ")
        return
    alternatives = _split(template, "|")
    if len(alternatives) > 1:
        likely = [1 / rank for rank in range(1, len(alternatives) + 1)]
        _say(rng.choices(alternatives, likely)[0], rules, value, rng, pieces)
        return
    position = 0
    while position < len(template):
        start = template[position]
        if start in "([":
            end = _end(template, position)
            inner = template[position + 1 : end]
            if start == "(" or rng.random() < (GLUE if _is_glue(inner) else OPTIONAL):
                _say(inner, rules, value, rng, pieces)
        elif start in "<{":
            end = template.find(">" if start == "<" else "}", position)
            name = template[position + 1 : end].split(":")[0]
            if end < 0 or (start == "<" and name not in rules):
                raise BadInput(f"sentence template {template!r}: {start}{name} is not closed or not known")
            _say(rules[name] if start == "<" else value(name, rng), rules, value, rng, pieces)
        else:
            end = position
            pieces.append(start)
        position = end + 1


def _is_glue(part: str) -> bool:
    return set(re.sub(r"[()\[\]|]", " ", part).split()) <= _GLUE_WORDS


def _split(template: str, separator: str) -> list[str]:
    """Splits at the separators outside brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(template):
        if character in "([":
            depth += 1
        elif character in ")]":
            depth -= 1
        elif character == separator and depth == 0:
            parts.append(template[start:position])
            start = position + 1
    return [*parts, template[start:]]


def _end(template: str, start: int) -> int:
    depth = 0
    for position in range(start, len(template)):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(template[position], 0)
        if depth == 0:
            return position
    raise BadInput(f"sentence template {template!r}: a bracket is not closed")
