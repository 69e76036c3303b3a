"""A comparison within a given time: how long each learner may train, and how many tasks the rest is enough for."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from contextlib import suppress

import torch

from metafit.data import Tasks
from metafit.errors import FAULTS, BadInput, in_short
from metafit.evaluation import evaluate
from metafit.learners import ENTRIES, Learner, entry
from metafit.progress import say
from metafit.task import Task

TRAINING = 0.7  # of the time
ADAPTATIONS = 100  # that a learner must have time for
LEAST_EPISODES, TRIED = 50, 10
UNITS = {"s": 1, "m": 60, "h": 3600}


class Budget:
    """Shares of a time.

    What one learner leaves of its share, the others get. A step and a look at the validation tasks are not cut off, so
    that a slow learner may take more than its share.

    Args:
        seconds: in all; ``None`` is as long as it takes.
        trainings: learners that will train.
    """

    def __init__(self, seconds: float | None, trainings: int):
        self.seconds, self.trainings, self.started = seconds, trainings, time.perf_counter()
        self.share = (seconds or 0) / max(1, trainings)

    def training(self) -> float | None:
        """Seconds that the next learner may train."""
        if self.seconds is None:
            return None
        left = TRAINING * self.seconds - (time.perf_counter() - self.started)
        self.trainings -= 1
        return max(0.0, left / (self.trainings + 1))

    def refuses(self, name: str, learner: Learner, task: Task) -> str | None:
        """Why the learner is left out, if it cannot adapt often enough in one share of the time."""
        try:
            for _ in range(2):  # the first call pays for warming up
                begin = time.perf_counter()
                with torch.no_grad():
                    learner.eval().path(task)
                took = time.perf_counter() - begin
                if took * ADAPTATIONS <= self.share:
                    return None
            why = f"one task takes {took:.2g} s, its share of the time is {self.share:.2g} s"
        except FAULTS as fault:
            why = in_short(fault)
        self.trainings -= entry(name).meta_trained
        return why

    def episodes(self, learners: Iterable[Learner], tasks: Tasks, wanted: int, gauged: int) -> int:
        """Test tasks that all of the learners have time for, 50 or more, the same for each, so that they pair; beside
        up to ``gauged`` tasks of the training classes."""
        if self.seconds is None:
            return wanted
        learners, tried = list(learners), min(TRIED, wanted)
        begin = time.perf_counter()
        for learner in learners:
            with suppress(*FAULTS):  # told when it is evaluated
                evaluate(learner, tasks, tried, show_progress=False)
        now = time.perf_counter()
        enough = int((self.seconds - (now - self.started)) / ((now - begin) / tried))
        enough -= min(gauged, enough // 2)
        episodes = min(wanted, max(LEAST_EPISODES, enough // 10 * 10))
        if episodes < wanted:
            say(f"the time is enough for {episodes} test tasks of {wanted}")
        return episodes


def seconds(text: str) -> float:
    """Of a time as 90s, 10m or 1.5h.

    Raises:
        BadInput: it is written otherwise, or not above 0.

    >>> seconds("10m")
    600.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if found is None or float(found[1]) == 0:
        raise BadInput(f"budget {text!r}: write a time as 90s, 10m or 1.5h")
    return float(found[1]) * UNITS[found[2]]


def fitting(body: bool) -> tuple[list[str], list[str]]:
    """The learners that classify, and the baselines. From scratch is for a network, frozen features have none."""
    names = [e.name for e in ENTRIES.values() if "classification" in e.tasks and (body or e.name != "scratch")]
    return [n for n in names if ENTRIES[n].family != "baseline"], [n for n in names if ENTRIES[n].family == "baseline"]
