"""Trials that are run once, whoever runs them: their results lie in a storage that machines may share."""

from __future__ import annotations

import json
import math
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metafit.environment import alive
from metafit.errors import BadInput
from metafit.feedback.diagnose import Figures
from metafit.feedback.propose import Setting

if TYPE_CHECKING:
    import optuna

WAIT = 2.0  # seconds between looks at what other machines are at
WORST = -1e9  # of a setting that diverged: no database holds a NaN
BEAT = 30.0  # seconds between signs that a trial is being made
ABANDONED = 900.0  # seconds without one after which a trial that another machine began is begun again


@dataclass(frozen=True)
class Attempt:
    """What came of a setting.

    Attributes:
        rewards: of the validation tasks that candidates are chosen by ``(T,)``, or the first of them; higher is better.
        judged: of other validation tasks, that the choice is judged by ``(J,)``, or the first of them.
        figures: of ``diagnose``.
        seconds: that it took.
    """

    rewards: Tensor
    judged: Tensor
    figures: Figures
    seconds: float


Try = Callable[[Setting, float, float], Attempt]  # a setting, the share of its training, and the seconds granted


class Trials:
    """Attempts at settings, each made once and kept in an optuna study.

    Several processes or machines with one storage share the work: each takes a trial that nobody is at, and waits for
    the others' where none is left. Decisions are made from what the storage holds, so that all come to the same.

    Args:
        attempt: makes one.
        storage: URL of a database of optuna (``sqlite:///file``, ``postgresql://...``), or ``journal:FILE``.
        study: its name: the same work has the same.

    Raises:
        BadInput: a storage that cannot be opened.
    """

    def __init__(self, attempt: Try, storage: str, study: str):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.attempt, self.me = attempt, f"{platform.node()}:{os.getpid()}"
        try:
            self.study = optuna.create_study(
                storage=_storage(storage), study_name=study, direction="maximize", load_if_exists=True
            )
        except ImportError as error:
            driver = "its driver is not installed; that of PostgreSQL is: pip install 'psycopg[binary]'"
            raise BadInput(f"storage {storage!r}: {driver}") from error
        except Exception as error:  # of whichever driver the URL names
            reason = " ".join(str(error).split())[:200]
            raise BadInput(f"storage {storage!r}: cannot be opened ({type(error).__name__}: {reason})") from error

    def run(
        self, settings: Sequence[Setting], share: float, grant: Callable[[], float] = lambda: math.inf
    ) -> list[Attempt | None]:
        """Attempts at each setting with that share of its training; ``None`` where time was up before it began.

        Args:
            settings: in the order that they are tried.
            share: of the outer steps, above 0 and up to 1.
            grant: the seconds that the next trial may train for, where any are left.
        """
        keys = [key(setting, share) for setting in settings]
        while True:
            done, running = self._by_state()
            seconds = grant()
            if all(k in done for k in keys) or seconds <= 0:
                return [_read(done[k]) if k in done else None for k in keys]
            free = [i for i, k in enumerate(keys) if k not in done and k not in running]
            if free:
                self._one(keys[free[0]], settings[free[0]], share, seconds)
            else:
                time.sleep(WAIT)

    def spent(self) -> float:
        """Seconds of all trials so far, on all machines."""
        return sum(trial.user_attrs["seconds"] for trial in self._by_state()[0].values())

    def longest(self) -> float:
        """Seconds of the longest whole training so far that came to its end."""
        whole = (trial.user_attrs for trial in self._by_state()[0].values() if trial.user_attrs["share"] == 1.0)
        return max((about["seconds"] for about in whole if "failed" not in about["figures"]), default=0.0)

    def _one(self, name: str, setting: Setting, share: float, seconds: float) -> None:
        """Makes an attempt, unless another machine was faster to claim it; its result is kept whole or not at all."""
        from optuna.trial import TrialState, create_trial

        claim = self._claim(name)
        if claim is None:
            return
        try:
            with self._signs():
                made = self.attempt(setting, share, seconds)
            kept = {"key": name, "setting": dict(setting), "share": share, "by": self.me}
            for part in ("rewards", "judged"):
                kept[part] = [round(v, 6) if math.isfinite(v) else None for v in getattr(made, part).tolist()]
            kept |= {"figures": made.figures, "seconds": round(made.seconds, 3)}
            value = float(made.rewards.double().mean().nan_to_num(WORST, WORST, WORST))
            self.study.add_trial(create_trial(state=TrialState.COMPLETE, value=value, user_attrs=kept))
        finally:  # stopped, or broken: the next to come tries again, or meets the same error
            self.study.tell(claim, state=TrialState.FAIL, skip_if_finished=True)

    @contextmanager
    def _signs(self) -> Iterator[None]:
        """Signs of life in the storage for as long as a trial is being made."""
        over = threading.Event()

        def give() -> None:
            while not over.wait(BEAT):
                with suppress(Exception):  # a storage that cannot be reached now may be reached the next time
                    self.study.set_user_attr(f"sign of {self.me}", time.time())

        thread = threading.Thread(target=give, name="signs of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _claim(self, name: str) -> int | None:
        """The number of the claim to that attempt, where it came first; claims are trials that never end well.

        Databases make trials one after another. To take one that waits is not as safe: two processes may both find it
        waiting, and both take it, in SQLite. A claim that the storage took too long to write has been told as failed.
        """
        from optuna.trial import TrialState, create_trial

        about = {"key": name, "by": self.me, "claim": uuid.uuid4().hex}
        self.study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=about))
        done, running = self._by_state()
        first = running.get(name)
        if name not in done and first is not None and first.user_attrs["claim"] == about["claim"]:
            return first.number
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.user_attrs["claim"] == about["claim"]:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        return None

    def _by_state(self) -> tuple[dict[str, optuna.trial.FrozenTrial], dict[str, optuna.trial.FrozenTrial]]:
        """The trials that are done, and the first claims to those that are being made, by key. Claims of processes
        that are gone are told as failed."""
        from optuna.trial import TrialState

        done: dict[str, Any] = {}
        running: dict[str, Any] = {}
        for trial in self.study.get_trials(deepcopy=False):
            name = trial.user_attrs.get("key", "")
            if trial.state == TrialState.COMPLETE:
                done.setdefault(name, trial)
            elif trial.state == TrialState.RUNNING and self._left(trial):
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            elif trial.state == TrialState.RUNNING:
                running.setdefault(name, trial)
        return done, running

    def _left(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether nobody is at it any more: its process is gone from this machine, or it has given no sign of life."""
        by, begun = trial.user_attrs["by"], trial.datetime_start
        host, _, process = by.rpartition(":")
        if alive({"host": host, "pid": int(process), "born": None}) is False:
            return True
        assert begun is not None  # as of every trial that runs
        return time.time() - max(begun.timestamp(), self.study.user_attrs.get(f"sign of {by}", 0.0)) > ABANDONED


def key(setting: Setting, share: float) -> str:
    """The same for the same setting, however it was come by."""
    return json.dumps([dict(sorted(setting.items())), round(share, 6)])


def _read(trial: optuna.trial.FrozenTrial) -> Attempt:
    about = trial.user_attrs
    rewards, judged = (_numbers(about[name]) for name in ("rewards", "judged"))
    return Attempt(rewards, judged, about["figures"], about["seconds"])


def _numbers(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)


def studies(storage: str) -> list[str]:
    """The names of the studies that a storage holds."""
    import optuna

    return optuna.get_all_study_names(_storage(storage))


def _storage(url: str) -> Any:
    if url.startswith("journal:"):
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        return JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
    return url
