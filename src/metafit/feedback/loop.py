"""The loop: diagnose, propose, try, accept only what is better beyond chance; and the chain of its decisions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from metafit.evaluation import interval
from metafit.feedback.diagnose import Figures
from metafit.feedback.propose import Proposal, Setting, above, propose
from metafit.feedback.trials import Attempt, Trials
from metafit.progress import say

KEPT = 3  # one in so many candidates gets the next, so many times larger, share of its training
MOST = 9  # candidates a round
DEAR = 0.5  # of the time that is left: the most that a whole training may take, and a share of it the like share


@dataclass
class Round:
    """One turn of the loop.

    Attributes:
        setting, score: what it started from, and its mean reward with its interval, on the judging tasks.
        symptoms: figures of ``diagnose`` of that.
        candidates: each proposal with ``share`` of its training that it came to, ``lead``, the paired interval of its
            reward over that of the start on the same tasks, ``seconds``, and why it ``failed``, if it did.
        chosen: the number of the candidate that came out on top, ``None`` where none was tried.
        judged: the paired interval of its lead on tasks that did not choose it.
        accepted: whether that is above zero.
    """

    setting: dict[str, Any]
    score: dict[str, Any]
    symptoms: Figures
    candidates: list[dict[str, Any]] = field(default_factory=list)
    chosen: int | None = None
    judged: dict[str, Any] | None = None
    accepted: bool = False


@dataclass
class Chain:
    """What the loop decided.

    Attributes:
        rounds: in order.
        setting: what it ended with.
        ended: why: nothing left to propose, the time up, or all rounds made.
        seconds: of all trials.
    """

    rounds: list[Round]
    setting: dict[str, Any]
    ended: str
    seconds: float


def improve(
    start: Setting,
    trials: Trials,
    seconds: float = math.inf,
    most_rounds: int = 20,
    proposer: Callable[[Figures, Setting], Sequence[Proposal]] = propose,
) -> Chain:
    """Changes a setting for as long as changes are better beyond chance on validation tasks.

    In each round the symptoms of the present setting give candidates. They race by successive halving (Jamieson and
    Talwalkar, 2016, arXiv:1502.07943): all get a small share of their training, a third of them three times that, and
    may be measured on a share of the tasks as well. The one that leads at the end is judged on other validation tasks,
    and accepted where the 95 % interval of its paired lead is above zero. What was tried and not accepted is not tried
    again from the same setting; a round whose best is refused goes on with the proposals that were left over, if any. A
    candidate whose whole training would take more than half of the time that is left (and longer than any before) is
    given up, so that none takes it from all the others. Where the time is up within a race, or its last are given up,
    the candidate that leads then is judged as it is, after its share of its training.

    Args:
        start: what to begin with.
        trials: attempts, made and kept.
        seconds: of trials, after which none begins: a resumed loop counts those before.
        most_rounds: after which it ends.
        proposer: from symptoms and setting to candidates.
    """
    setting, rounds, tried = dict(start), [], {_name(start)}
    (now,) = trials.run([setting], 1.0)
    assert now is not None

    def grant(share: float) -> float:
        left, longest = seconds - trials.spent(), trials.longest()
        # Twice the share of the longest: the first look at the validation tasks is as long for any share.
        return 0.0 if left < longest else max(min(1.0, 2 * share) * longest, DEAR * share * left)

    ended = f"it had made {most_rounds} rounds"
    number, late = 0, False
    while number < most_rounds and not late:
        number += 1
        turn = Round(dict(setting), interval(now.judged), now.figures)
        proposals = [p for p in proposer(now.figures, setting) if _name(p.on(setting)) not in tried][:MOST]
        if not proposals:
            ended = "nothing was left to propose"
            rounds.append(turn)
            break
        say(f"round {number}: {_shown(turn.score)}; {len(proposals)} changes to try")
        finalists, late = _race(setting, now, proposals, trials, turn, grant)
        rounds.append(turn)
        tried |= {_name(proposals[i].on(setting)) for i in range(len(proposals))}
        ended = "the time was up" if late else ended
        if not finalists:
            continue
        best = max(finalists, key=lambda i: float(finalists[i].rewards.mean().nan_to_num(-math.inf)))
        champion = finalists[best]
        turn.chosen, turn.judged = best, _lead(champion.judged, now.judged)
        turn.accepted = above(turn.judged)
        verdict = "accepted" if turn.accepted else "refused"
        say(f"  {describe(proposals[best].change)}: leads by {_shown(turn.judged)}, {verdict}")
        if turn.accepted:
            setting, now = proposals[best].on(setting), champion
    return Chain(rounds, setting, ended, round(trials.spent(), 1))


def _race(
    setting: Setting,
    now: Attempt,
    proposals: Sequence[Proposal],
    trials: Trials,
    turn: Round,
    grant: Callable[[float], float],
) -> tuple[dict[int, Attempt], bool]:
    """Successive halving. Writes down what came of each candidate; returns those of the last share that all of them
    reached, or that some did when the time was up, and whether it was."""
    turn.candidates = [{**p._asdict(), "share": 0.0, "lead": None, "seconds": 0.0, "failed": None} for p in proposals]
    alive = list(range(len(proposals)))
    depth = round(math.log(len(alive), KEPT))
    done: dict[int, Attempt] = {}
    for rung in range(depth + 1):
        share = KEPT ** (rung - depth)
        made = trials.run([proposals[i].on(setting) for i in alive], share, partial(grant, share))
        late = any(attempt is None for attempt in made)
        here: dict[int, Attempt] = {}
        for i, attempt in zip(alive, made, strict=True):
            if attempt is None:
                continue
            turn.candidates[i].update(seconds=attempt.seconds, failed=attempt.figures.get("failed"))
            if "failed" not in attempt.figures:
                turn.candidates[i].update(share=share, lead=_lead(attempt.rewards, now.rewards))
                here[i] = attempt
        if not here:
            return done, late or bool(done)  # nothing that led has the time for more
        done = here
        if late:
            return done, late
        leading = sorted(done, key=lambda i: -float(done[i].rewards.mean().nan_to_num(-math.inf)))
        alive = leading[: math.ceil(len(alive) / KEPT)]
    return done, False


def describe(change: dict[str, Any]) -> str:
    """A change in words of the command line.

    >>> describe({"learner": "protonet", "option.rate": 0.1, "train_backbone": True})
    '--learner protonet --option rate=0.1 --train-backbone'
    """
    words = []
    for name, value in change.items():
        if name.startswith("option."):
            words.append(f"--option {name.removeprefix('option.')}={value}")
        else:
            shown = ",".join(value) if isinstance(value, list) else "none" if value is None else value
            words.append("--" + name.replace("_", "-") + ("" if value is True else f" {shown}"))
    return " ".join(words)


def _lead(candidate: Tensor, now: Tensor) -> dict[str, Any]:
    """The paired interval on the tasks of both: one with a share of its training has met the first of them only."""
    return interval(candidate - now[: len(candidate)])


def _name(setting: Setting) -> str:
    return repr(sorted(setting.items()))


def _shown(entry: dict[str, Any]) -> str:
    if entry["mean"] is None:
        return "no number"
    return f"{entry['mean']:.4f}" + ("" if entry["ci95"] is None else f" ± {entry['ci95']:.4f}")
