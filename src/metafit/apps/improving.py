"""The feedback loop on a user's data: `metafit improve`."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from metafit.apps.comparing import GAUGED, tell
from metafit.apps.meta_training import TEST_SEED, check_train_way, outer_loop, tasks_of, train, unseen_tasks, wide_task
from metafit.apps.packed import packed
from metafit.apps.preparing import Prepared
from metafit.apps.protocol import Protocol
from metafit.data import Source
from metafit.data.families import domain_sources
from metafit.data.sampler import Tasks
from metafit.disk import writable_folder, write_json
from metafit.errors import FAULTS, BadInput, in_short, unknown
from metafit.evaluation import Contender, Evaluation, evaluate, result, write_result
from metafit.feedback import Attempt, Chain, Proposal, Setting, Trials, diagnose, improve, propose, write_chain
from metafit.feedback.diagnose import Figures
from metafit.feedback.trials import key, studies
from metafit.learners import GradientLearner, Learner, build, entry
from metafit.learners.choices import inner_rate
from metafit.learners.inputs import Inputs
from metafit.progress import say
from metafit.training import Model, Training, save_model

Reward = Callable[[Model, Tasks, int], Tensor]  # a trained model, tasks and how many of them: rewards ``(T,)``

SELECT_SEED, JUDGE_SEED = 3, 4  # streams of validation tasks: what chooses, and what judges the choice
FEWEST = 30  # validation tasks that a candidate is measured on, however small its share
UNTRAINED = ("centroid", "linear")
log = logging.getLogger("metafit.apps")
WORDS = ("learner", "backbone", "train_backbone", "steps", "rate", "train_way", "augment", "balance")


class Improvement:
    """One loop: what it starts from, what it may spend, where it keeps what it found.

    Args:
        data: from the name of a backbone, and whether the learner trains it, to the split classes: ``prepare`` with a
            source, say.
        start: the setting to begin with: words of the command line, ``option.NAME`` for those of the learner.
        protocol: ways, shots, test episodes, seed.
        out: folder for ``improve.json``, ``result.json``, ``report.html``, ``model`` and the trials.
        storage: of the trials, see ``Trials``; a file in ``out`` where ``None``.
        reward: in place of accuracy (of the negative squared error); higher is better. It gets the trained model, the
            tasks, and how many of them; ``Verdicts`` is one.
        tasks: validation tasks that choose; as many others judge.
        clock: what trials are timed by; ``time.process_time`` counts the processor's time, not that of other work.

    Raises:
        BadInput: an unknown word, too few classes to keep some for validation, or a folder that cannot be written.
    """

    def __init__(
        self,
        data: Callable[[str | None, bool], Prepared],
        start: Setting,
        protocol: Protocol,
        out: str | os.PathLike[str],
        storage: str | None = None,
        reward: Reward | None = None,
        tasks: int = 300,
        clock: Callable[[], float] = time.perf_counter,
    ):
        for word in start:
            if word not in WORDS and not word.startswith("option."):
                raise unknown("word of the setting", word, [*WORDS, "option.NAME"])
        self.start = {"learner": "protonet", "backbone": "auto", **start}
        if not entry(self.start["learner"]).meta_trained:
            raise BadInput(f"learner {self.start['learner']!r} has nothing to improve by training: start from another")
        self.folder, self.reward, self.tasks = writable_folder(out), reward, tasks
        self.clock = clock
        self._prepare = functools.cache(data)
        self._rivals = functools.cache(self._untrained)
        first = self._prepared(self.start)
        if first.splits.validation is None:
            raise BadInput(
                f"{first.source['name']}: too few classes to keep some for validation, which the loop decides by: give "
                "10 or more"
            )
        self.protocol = protocol.over(first.splits)
        chosen, way = len(first.splits.validation.classes), self.protocol.most_ways
        if chosen < 2 * way:
            say(
                f"the validation part has {chosen} classes, for tasks of {way}: what is better on so few may not be on "
                "others; give data of more classes, or ask for fewer ways"
            )
        unseen_tasks(first, self.protocol)  # bad input is told before the training, not after it
        self._learner(first, self.start)
        check_train_way([self.start["learner"]], self._protocol(self.start))
        self.storage = storage or f"sqlite:///{self.folder.resolve() / 'trials.db'}"

    def check_begun(self) -> None:
        """Whether there is this loop to go on with, where the storage is the file in ``out``.

        Raises:
            BadInput: the file holds loops of other words alone, whose results a new one would replace.
        """
        begun = studies(self.storage)
        if begun and self._name() not in begun:
            raise BadInput(
                f"cannot resume from {self.folder}: the loop there began with other words, data or verdicts; give the "
                "same, or name another folder"
            )

    def run(
        self,
        seconds: float,
        proposer: Callable[[Figures, Setting], Sequence[Proposal]] = propose,
        most_rounds: int = 20,
    ) -> tuple[Chain, dict[str, Any]]:
        """Runs the loop, then looks at the test tasks, once.

        Args:
            seconds: of trials; those of an earlier run of the same loop count.
            proposer, most_rounds: see ``improve``.

        Returns:
            The chain of decisions, and the content of ``result.json``: the last setting's learner against the first's
            and against what nothing was trained for.
        """
        trials = Trials(self.attempt, self.storage, self._name())
        chain = improve(self.start, trials, seconds, most_rounds, proposer)
        made = self._test(chain)
        write_json(self.folder / "improve.json", {"schema": 1, **asdict(chain)})
        write_result(made, self.folder)
        write_chain(chain, made, self.folder / "report.html")
        tell(made)
        return chain, made

    def attempt(self, setting: Setting, share: float, seconds: float = math.inf) -> Attempt:
        """Trains with the setting, for a share of its steps, and measures it on that share of the validation tasks.

        Training that has not come to its share after so many seconds is given up, as one that diverges is.

        Raises:
            BadInput: the setting is the start, and cannot be trained.
        """
        begin = self.clock()
        try:
            rewards, judged, figures = self._measure(setting, share, seconds)
        except (BadInput, *FAULTS) as fault:
            if setting == self.start:  # there is nothing to compare with
                raise
            log.info("%s has failed", setting, exc_info=True)
            rewards = judged = torch.tensor([torch.nan])
            figures = {"failed": in_short(fault)}
        return Attempt(rewards, judged, figures, self.clock() - begin)

    def _measure(self, setting: Setting, share: float, seconds: float) -> tuple[Tensor, Tensor, Figures]:
        prepared = self._prepared(setting)
        learner, trained = self._train(prepared, setting, share, seconds)
        chooses, judges = (self._validation(prepared, stream) for stream in (SELECT_SEED, JUDGE_SEED))
        count = max(min(FEWEST, self.tasks), math.ceil(share * self.tasks))
        unseen = evaluate(learner, chooses, count, show_progress=False)
        model = Model(learner, prepared.recipe)
        rewards, judged = self._rewards(model, chooses, count, unseen), self._rewards(model, judges, count, None)
        if share < 1.0:  # nothing goes on from it
            return rewards, judged, {}
        known = self._drawn(prepared, prepared.splits.train, TEST_SEED)
        seen = evaluate(learner, known, min(GAUGED, self.tasks), show_progress=False)
        rivals = self._rivals(setting["backbone"], bool(setting.get("train_backbone")))
        figures = diagnose(learner, unseen, chooses, seen, trained.history, rivals, self._families(prepared))
        return rewards, judged, {**figures, "in_force": self._in_force(prepared, setting, learner)}

    def _train(
        self, prepared: Prepared, setting: Setting, share: float, seconds: float = math.inf
    ) -> tuple[Learner, Training]:
        protocol, options = self._protocol(setting), _options(setting)
        folder = self.folder / "trials" / hashlib.sha256(key(setting, share).encode()).hexdigest()[:12]
        limit = None if math.isinf(seconds) else seconds
        learner, trained = train(
            prepared, setting["learner"], protocol, folder, True, options, seconds=limit, share=share, clock=self.clock
        )
        too_slow = trained.stopped == "seconds"
        if share < 1.0 or too_slow:
            shutil.rmtree(folder)
        if too_slow:
            reached = f"outer step {trained.history[-1]['step']}"
            raise BadInput(f"given up after {seconds:.3g} s of training, at {reached}")
        return learner, trained

    def _test(self, chain: Chain) -> dict[str, Any]:
        """The look at the test tasks: the last setting against the first, and the frozen model."""
        contenders, drawn = [], None
        for name, setting in (("improved", chain.setting), ("start", self.start)):
            prepared = self._prepared(setting)
            drawn = packed(unseen_tasks(prepared, self.protocol), prepared.body)
            learner, trained = self._train(prepared, setting, 1.0)
            if name == "improved":
                recipe = replace(prepared.recipe, training=asdict(self._protocol(setting)))
                save_model(self.folder / "model", learner, recipe, trained.history)
            evaluation = evaluate(learner, drawn, self.protocol.episodes, title=f"test {name}")
            contenders.append(Contender(name, learner, evaluation, trained.history))
        prepared = self._prepared(chain.setting)
        for name in UNTRAINED:
            learner = self._learner(prepared, {"learner": name})
            drawn = packed(unseen_tasks(prepared, self.protocol), prepared.body)
            evaluation = evaluate(learner, drawn, self.protocol.episodes, title=f"test {name}")
            contenders.append(Contender(name, learner, evaluation))
        assert drawn is not None
        made = result(contenders, drawn, backbone=prepared.recipe.backbone, source=prepared.source)
        made["protocol"]["seed"] = self.protocol.seed
        return made

    def _prepared(self, setting: Setting) -> Prepared:
        return self._prepare(setting["backbone"], bool(setting.get("train_backbone")))

    def _protocol(self, setting: Setting) -> Protocol:
        given = {name: setting[name] for name in ("steps", "rate", "train_way", "balance") if name in setting}
        return replace(self.protocol, augment=tuple(setting.get("augment", ())), **given)

    def _learner(self, prepared: Prepared, setting: Setting) -> Learner:
        torch.manual_seed(self.protocol.seed)
        way, body = self.protocol.most_ways, prepared.body
        return build(setting["learner"], prepared.dim, way, body, **_options(setting))

    def _drawn(self, prepared: Prepared, source: Source, stream: int) -> Tasks:
        return packed(tasks_of(source, self.protocol, stream), prepared.body)

    def _validation(self, prepared: Prepared, stream: int) -> Tasks:
        assert prepared.splits.validation is not None  # the constructor refuses data without
        return self._drawn(prepared, prepared.splits.validation, stream)

    def _untrained(self, backbone: str | None, trained: bool) -> dict[str, Evaluation]:
        prepared = self._prepare(backbone, trained)
        drawn = self._validation(prepared, SELECT_SEED)
        learners = {name: self._learner(prepared, {"learner": name}) for name in UNTRAINED}
        return {n: evaluate(learner, drawn, self.tasks, show_progress=False) for n, learner in learners.items()}

    def _families(self, prepared: Prepared) -> dict[str, Tasks]:
        """Tasks within each domain of the validation classes."""
        validation = prepared.splits.validation
        if validation is None or validation.domains is None:
            return {}
        try:
            parts = domain_sources(validation)
        except BadInput:
            return {}
        return {name: self._drawn(prepared, part, SELECT_SEED) for name, part in parts.items()}

    def _rewards(self, model: Model, tasks: Tasks, count: int, known: Evaluation | None) -> Tensor:
        if self.reward is not None:
            return self.reward(model, tasks, count)
        measured = known or evaluate(model.learner, tasks, count, show_progress=False)
        return measured.score[:, -1] * (-1.0 if measured.metric == "mse" else 1.0)

    def _in_force(self, prepared: Prepared, setting: Setting, learner: Learner) -> Figures:
        options = _options(setting)
        steps, rate = outer_loop(prepared, setting["learner"], self._protocol(setting), options)
        way = self._validation(prepared, SELECT_SEED).way
        found: Figures = {
            "way": way if isinstance(way, int) else way[1],
            "steps": steps,
            "rate": rate,
            "frozen": prepared.body is None,
        }
        found["modality"] = prepared.source["modality"]
        if entry(setting["learner"]).wide:
            taken = self._protocol(setting)
            most = replace(taken, train_way=len(prepared.splits.train.classes))
            found["train_way"], _ = wide_task(prepared, setting["learner"], taken)
            found["most_train_way"], _ = wide_task(prepared, setting["learner"], most)
        if isinstance(learner, GradientLearner):
            chosen = {**entry(setting["learner"]).options(), **options}
            inputs = Inputs(prepared.body, prepared.dim, learner.way)
            pull = learner.pull if learner.outer == "implicit" else chosen["proximal"]
            default = inner_rate(inputs, chosen["scope"], chosen["rule"], pull)
            found |= {"inner_steps": learner.steps, "inner_rate": options.get("rate") or default}
        return found

    def _name(self) -> str:
        """Of the study: the same work, by whichever machine, has the same."""
        source = self._prepared(self.start).source
        about = [source["name"], source["classes"], asdict(self.protocol), sorted(self.start.items()), self.tasks]
        if self.reward is not None:
            about.append(getattr(self.reward, "about", type(self.reward).__name__))
        return "improve-" + hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def _options(setting: Setting) -> dict[str, Any]:
    return {k.removeprefix("option."): v for k, v in setting.items() if k.startswith("option.")}
