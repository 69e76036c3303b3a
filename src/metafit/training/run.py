"""The state of a meta-training, from which it goes on."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metafit.learners import Learner
from metafit.over_tasks import Plan
from metafit.training.average import Average
from metafit.training.outer import Outcome, OuterStep


@dataclass
class Training:
    """What meta-training did.

    Attributes:
        history: a row for each look at the validation tasks: step, validation metric (``None`` without validation
            tasks), seconds since the start; and of the steps since the last look (``None`` at the first) the mean
            training loss, the mean norm of the meta-gradient before clipping, the share of steps that were clipped and
            (fp16 alone) skipped; the outer rate of the last one; and the weight of each family, where it is learned.
        best_step, best: the step whose parameters were kept, and its validation metric.
        stopped: why training ended: "steps", "patience", "seconds".
        plan: how the batches were run; a resumed training goes on by it, so that its bits are the same.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    best: float | None = None
    stopped: str = "steps"
    plan: Plan | None = None

    @property
    def seconds(self) -> float:
        return self.history[-1]["seconds"] if self.history else 0.0


@dataclass
class Since:
    """Sums over the steps since the last look."""

    steps: int = 0
    loss: float = 0.0
    norm: float = 0.0
    clipped: int = 0
    skipped: int = 0
    rate: float | None = None

    def add(self, outcome: Outcome, rate: float) -> None:
        self.steps += 1
        self.loss += sum(outcome.losses) / len(outcome.losses)
        self.norm += 0.0 if outcome.skipped else outcome.norm
        self.clipped += outcome.clipped
        self.skipped += outcome.skipped
        self.rate = rate

    def row(self, scaled: bool) -> dict[str, float | None]:
        """What a row of the history says of them."""
        taken = self.steps - self.skipped
        row = {
            "loss": self.loss / self.steps if self.steps else None,
            "gradient_norm": self.norm / taken if taken else None,
            "rate": self.rate,
            "clipped": self.clipped / self.steps if self.steps else None,
        }
        return {**row, "skipped": self.skipped / self.steps if self.steps else None} if scaled else row


class Run:
    """The step that a training is at, and everything that the next one depends on.

    Attributes:
        best_state: the best parameters so far.
        average: of the parameters, validated and kept in their place.
        kept: other tensors that belong to the state.
        seconds: that it took, before it was resumed.
    """

    def __init__(self, learner: Learner, outer: OuterStep, average: Average | None, kept: dict[str, Tensor]):
        self.learner, self.outer, self.average, self.kept = learner, outer, average, kept
        self.step, self.seconds, self.since, self.training = 0, 0.0, Since(), Training()
        self.best_state = {name: value.detach().clone() for name, value in learner.state_dict().items()}

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the learner is the one to validate and to keep."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def note(self, row: dict[str, Any]) -> bool:
        """Adds a row of the history, within ``averaged``; true where it is the best so far."""
        self.since = Since()
        self.training.history.append(row)
        better = self._better(row["validation"])
        if better:
            self.training.best, self.training.best_step = row["validation"], self.step
            with torch.no_grad():
                for name, value in self.learner.state_dict().items():
                    self.best_state[name].copy_(value)
        return better

    def out_of_patience(self, patience: int | None) -> bool:
        since_best = sum(row["step"] > self.training.best_step for row in self.training.history)
        return patience is not None and since_best >= patience

    def restore_best(self) -> None:
        self.learner.load_state_dict(self.best_state)

    def _better(self, value: float | None) -> bool:
        best = self.training.best
        if value is None or best is None:
            return True
        return value < best if self.learner.measured_by == "mse" else value > best
