"""Trials that are run once, whoever runs them: their results lie in a storage that machines may share."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metafit.errors import BadInput
from metafit.feedback.diagnose import Figures
from metafit.feedback.propose import Setting

if TYPE_CHECKING:
    import optuna

WAIT = 2.0  # seconds between looks at what other machines are at
WORST = -1e9  # of a setting that diverged: no database holds a NaN
ABANDONED = 3600.0  # seconds after which a trial that another machine began is begun again


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
        self.attempt, self.me = attempt, f"{socket.gethostname()}:{os.getpid()}"
        try:
            self.study = optuna.create_study(
                storage=_storage(storage), study_name=study, direction="maximize", load_if_exists=True
            )
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
            found = self._by_state()
            seconds = grant()
            if all(k in found["done"] for k in keys) or seconds <= 0:
                return [_read(found["done"][k]) if k in found["done"] else None for k in keys]
            for k, setting in zip(keys, settings, strict=True):
                if not any(k in found[state] for state in found):
                    about = {"key": k, "setting": dict(setting), "share": share}
                    self.study.enqueue_trial({}, user_attrs=about)
            if self._by_state()["waiting"]:
                self._one(seconds)
            else:
                time.sleep(WAIT)

    def spent(self) -> float:
        """Seconds of all trials so far, on all machines."""
        return sum(trial.user_attrs["seconds"] for trial in self._by_state()["done"].values())

    def _one(self, seconds: float) -> None:
        """Takes the next waiting trial, if it is still there, and makes it."""
        from optuna.trial import TrialState

        trial = self.study.ask()
        about, found = trial.user_attrs, self._by_state()
        first = found["running"].get(about.get("key", ""))
        # another machine was faster: it made this, or asked for the same at the same moment
        if first is None or first.number != trial.number or about["key"] in found["done"]:
            self.study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_user_attr("by", self.me)
        try:
            made = self.attempt(about["setting"], about["share"], seconds)
        except BaseException:  # stopped, or broken: the next to come tries again, or meets the same error
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        for name in ("rewards", "judged"):
            trial.set_user_attr(name, [round(v, 6) if math.isfinite(v) else None for v in getattr(made, name).tolist()])
        trial.set_user_attr("figures", made.figures)
        trial.set_user_attr("seconds", round(made.seconds, 3))
        value = float(made.rewards.double().mean())
        self.study.tell(trial, value if math.isfinite(value) else WORST)

    def _by_state(self) -> dict[str, dict[str, optuna.trial.FrozenTrial]]:
        """The trials that are done, waiting and being made, by key. What was begun and left is told as failed."""
        from optuna.trial import TrialState

        found: dict[str, dict[str, Any]] = {"done": {}, "waiting": {}, "running": {}}
        states = {TrialState.COMPLETE: "done", TrialState.WAITING: "waiting", TrialState.RUNNING: "running"}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state not in states or "key" not in trial.user_attrs:
                continue
            if trial.state == TrialState.RUNNING and self._left(trial):
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                continue
            found[states[trial.state]].setdefault(trial.user_attrs["key"], trial)
        return found

    def _left(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether nobody is at it any more: its process is gone from this machine, or it began too long ago."""
        host, _, process = trial.user_attrs.get("by", ":").rpartition(":")
        if host == socket.gethostname() and process != str(os.getpid()):
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                pass
        begun = trial.datetime_start
        return begun is not None and time.time() - begun.timestamp() > ABANDONED


def key(setting: Setting, share: float) -> str:
    """The same for the same setting, however it was come by."""
    return json.dumps([dict(sorted(setting.items())), round(share, 6)])


def _read(trial: optuna.trial.FrozenTrial) -> Attempt:
    about = trial.user_attrs
    rewards, judged = (_numbers(about[name]) for name in ("rewards", "judged"))
    return Attempt(rewards, judged, about["figures"], about["seconds"])


def _numbers(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)


def _storage(url: str) -> Any:
    if url.startswith("journal:"):
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        return JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
    return url
