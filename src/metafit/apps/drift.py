"""Whether labelled examples still look like those before: a conformal test with a stated rate of false alarms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

POWERS = np.arange(1, 10) / 10
RANKS = 10  # further down is counted as the last


@dataclass
class Drift:
    """A test of each new example against the earlier ones of its class.

    The score of an example is the rank that its class had for it before it was learned: 0 where it was the first. If
    the examples of a class are exchangeable, the score of the newest is as likely to be any of those so far; a bet on
    its being among the worst then wins 1 on average. Bets are on the conformal p-value p, f(p) = εp^(ε−1) with ε = 0.1
    to 0.9, averaged over the p that ties leave open: (b^ε − a^ε) / (b − a), for a share a of worse scores and a share b
    of scores as bad or worse, its own among them. Evidence gathers by Shiryaev and Roberts: R ← (R + 1)·f, so that R
    minus the number of tests is a martingale, and an alarm at R ≥ ``every`` is false once in ``every`` tests at most,
    on average, however long the stream (Vovk, 2021, arXiv:1906.09256).

    Classes may come in any order and share: each is compared with itself, and ranked among those met by then, so that
    a new class changes nothing for the others. Ranks that get better, as more is learned or a class is forgotten, make
    p larger, which delays an alarm and does not cause one.

    Attributes:
        every: tests to a false alarm, at least, on average.
        met: by class, when it was met: it is ranked among the classes whose number is not higher.
        scores: by class, how many of its examples were at each rank.
        evidence: R of each power.
        tested: examples so far.
        alarms: after how many of them there was an alarm. What was before is then no measure any more: scores and
            evidence begin anew.
    """

    every: int
    met: dict[Any, int] = field(default_factory=dict)
    scores: dict[Any, list[int]] = field(default_factory=dict)
    evidence: list[float] = field(default_factory=lambda: [0.0] * len(POWERS))
    tested: int = 0
    alarms: list[int] = field(default_factory=list)

    def meet(self, labels: Iterable[Any]) -> None:
        """Classes, of which some may be new."""
        now = 1 + max(self.met.values(), default=0)
        for label in labels:
            self.met.setdefault(label, now)

    def forget(self, label: Any) -> None:
        self.met.pop(label, None)
        self.scores.pop(label, None)

    def learn(self, label: Any, rank: int) -> None:
        """One more earlier example of the class, without a test."""
        self.scores.setdefault(label, [0] * RANKS)[min(rank, RANKS - 1)] += 1

    def test(self, label: Any, rank: int) -> None:
        """The next example of the class."""
        self.learn(label, rank)
        scores, rank = self.scores[label], min(rank, RANKS - 1)
        worse, equal = sum(scores[rank + 1 :]), scores[rank]
        a, b = worse / sum(scores), (worse + equal) / sum(scores)
        bets = (b**POWERS - a**POWERS) / (b - a)
        self.evidence = ((np.array(self.evidence) + 1) * bets).tolist()
        self.tested += 1
        if self.strength >= self.every:
            self.alarms.append(self.tested)
            self.evidence, self.scores = [0.0] * len(POWERS), {}
            self.met = dict.fromkeys(self.met, 0)

    @property
    def strength(self) -> float:
        """The evidence for a change since the last alarm; there is one at ``every``."""
        return float(np.mean(self.evidence))


def ranks(scores: Tensor, y: Tensor) -> list[int]:
    """How many classes have a higher score ``(N, C)`` than the true one ``(N,)``."""
    return (scores > scores.gather(1, y[:, None])).sum(1).tolist()
