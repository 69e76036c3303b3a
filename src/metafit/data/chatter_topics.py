"""How conversations begin, by topic: the English part of the ChatterBot corpus."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePosixPath

import torch

from metafit import wheels
from metafit.data.source import Source

WHEEL = "chatterbot-corpus"
FEWEST = 10


def load() -> Source:
    """The distinct first lines of the conversations of each topic that has 10 or more; lines of two topics left out."""
    openers = {
        PurePosixPath(path).stem: _distinct(first_lines(wheels.member(WHEEL, path).decode("utf-8")))
        for path in wheels.members(WHEEL, "chatterbot_corpus/data/english/*.yml")
    }
    shared = Counter(key for texts in openers.values() for key in texts)
    clear = {
        topic: [text for key, text in texts.items() if shared[key] == 1] for topic, texts in sorted(openers.items())
    }
    kept = [(topic, texts) for topic, texts in clear.items() if len(texts) >= FEWEST]
    return Source(
        "chatter-topics",
        [text for _, texts in kept for text in texts],
        torch.tensor([index for index, (_, texts) in enumerate(kept) for _ in texts], dtype=torch.int64),
        tuple(topic for topic, _ in kept),
        "text",
    )


def first_lines(corpus: str) -> list[str]:
    """The first line of every conversation of a corpus file: a YAML list of lists of strings, read line by line.

    >>> first_lines("conversations:\\n- - What is\\n    life?\\n  - 42\\n- - 'It''s me'\\n  - Hi\\n")
    ['What is life?', "It's me"]
    """
    found: list[str] = []
    open_line = False
    for line in corpus.splitlines():
        if line.startswith("- - "):
            found.append(line[4:].strip())
            open_line = True
        elif open_line and line.startswith("    ") and line.strip():
            found[-1] += " " + line.strip()
        else:
            open_line = False
    return [_unquoted(text) for text in found]


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'").strip()
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1].replace('\\"', '"').strip()
    return text


def _distinct(texts: list[str]) -> dict[str, str]:
    """The first of those that differ only by case and punctuation, by what they share."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(re.sub(r"[\W_]+", " ", text.casefold()).strip(), text)
    return found
