"""Whole settings drawn at random: what a diagnosis must beat."""

from __future__ import annotations

import numpy as np

from metafit.feedback.diagnose import Figures
from metafit.feedback.propose import Proposal, Setting, of_its_learner

SPACE = {  # a choice of values, or the ends of a logarithmic range; a learner takes what it has
    "learner": ("maml", "protonet", "r2d2"),
    "option.rate": (1e-3, 30.0),
    "option.steps": ("1", "2", "5", "10"),
    "option.scope": ("all", "head", "body", "norm"),
    "option.rule": ("sgd", "alfa", "meta-sgd"),
    "option.head": ("linear", "prototype"),
    "option.loss": ("plain", "metal"),
    "steps": ("100", "300", "1000"),
    "rate": (1e-5, 1e-1),
    "train_way": ("20", "60"),
}


class AtRandom:
    """A proposer that looks at no symptom: each call draws ``count`` whole settings, uniformly from ``SPACE``."""

    def __init__(self, seed: int, count: int = 9):
        self.rng, self.count = np.random.default_rng(seed), count

    def __call__(self, figures: Figures, setting: Setting) -> list[Proposal]:
        return [Proposal(self._draw(), "drawn at random", "random search") for _ in range(self.count)]

    def _draw(self) -> dict[str, object]:
        made: dict[str, object] = {}
        for word, values in SPACE.items():
            if isinstance(values[0], float):
                low, high = np.log(np.asarray(values, dtype=float))
                made[word] = float(f"{np.exp(self.rng.uniform(low, high)):.2g}")
            else:
                value = values[self.rng.integers(len(values))]
                made[word] = int(value) if str(value).isdigit() else value
        if made["option.head"] == "prototype" and made["option.scope"] in ("body", "norm"):
            made["option.scope"] = "all"  # such a head is a start to adapt from
        return of_its_learner(made)
