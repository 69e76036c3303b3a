"""A predictor that goes on learning: new labelled examples, new classes, feedback, and classes to forget."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.utils._pytree import tree_map

from metafit.apps.calibration import held_out, temperature
from metafit.apps.coreset import Known, Means, joined, moments, more, nearness
from metafit.apps.drift import Drift, ranks
from metafit.apps.estimators import FewShotClassifier, distinct, laid_out
from metafit.apps.inputs import Inputs, parts
from metafit.backbones.base import Backbone
from metafit.errors import BadInput, unknown
from metafit.learners.prototype import PrototypeLearner
from metafit.task import Examples
from metafit.training.store import Model

if TYPE_CHECKING:
    from typing import Self


class OnlineClassifier(FewShotClassifier):
    """A :class:`FewShotClassifier` that goes on learning after ``fit``, or without it, example by example.

    It remembers frozen features, not inputs, in bounded room: examples of a class that are alike as their weighted
    mean (:class:`metafit.apps.coreset.Means`); over a network that is trained, which reads the inputs themselves, a
    uniform sample of them. ``partial_fit`` adapts the learner anew to what is remembered, in a time that does not grow
    with the stream. Class means over frozen features (``centroid``, ``protonet``) are exact, those of all examples, and
    cost only the new ones.

    How classes alternate does not matter at all; the order within a class does not while there is room for every
    example, and little beyond. On BANKING77 with MiniLM, logistic regression with 5/10/20 rows a class has an accuracy
    of 90.0/91.2/91.8 percent, with as many real examples chosen by herding 87.1/88.7/90.6, with all 130 a class 93.1
    (``benchmarks/online.py``).

    Args:
        model, learner, backbone, options, random_state: as :class:`FewShotClassifier`.
        per_class: rows to remember of a class, at most.
        in_all: rows to remember of all classes together, shared evenly; as many again at most of rejected predictions.
        alarm_every: labelled examples to a false alarm of drift, at least, on average.

    Attributes:
        memory_: what is remembered, by class.
        rejected_: what is remembered of inputs that are not of a class, by that class.
        drift_: the test of drift: ``drift_.alarms``, ``drift_.strength`` (see :class:`metafit.apps.drift.Drift`).
        classes_, temperature_, ...: as :class:`FewShotClassifier`. The temperature is fitted when it is asked for.

    >>> few = OnlineClassifier().partial_fit([[0.0], [0.2], [1.0], [1.2]], ["off", "off", "on", "on"])
    >>> few.partial_fit([[5.0]], ["broken"]).predict([[0.1], [1.1], [4.8]]).tolist()
    ['off', 'on', 'broken']
    >>> few.forget("broken").classes_.tolist()
    ['off', 'on']
    """

    memory_: dict[Any, Known]
    rejected_: dict[Any, Known]
    drift_: Drift
    _temperature: float | None
    _sums: dict[Any, dict[str, Tensor]]
    _meta_trained: bool

    def __init__(
        self,
        model: str | os.PathLike[str] | Model | None = None,
        learner: str = "auto",
        backbone: str | Backbone | None = "auto",
        options: dict[str, Any] | None = None,
        random_state: Any = None,
        per_class: int = 50,
        in_all: int = 1000,
        alarm_every: int = 10_000,
    ):
        super().__init__(model, learner, backbone, options, random_state)
        self.per_class = per_class
        self.in_all = in_all
        self.alarm_every = alarm_every

    def fit(self, X: Any, y: Any) -> Self:
        """Learns the classes, from all examples at once, and forgets what was learned before.

        Raises:
            BadInput: as of :class:`FewShotClassifier`; more classes than can be remembered.
        """
        super().fit(X, y)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Learns from more examples, one or many, of known classes or new ones; where there was no ``fit``, the first.

        An example of a known class is a test of drift before it is learned.

        Args:
            X, y: as of ``fit``; one class is enough.
            classes: classes that will come. None has to be announced; one without examples has probability 0.

        Raises:
            BadInput: inputs of another kind than were learned from, a missing label, labels of another type than
                those known, more classes than can be remembered, or than the model can tell. Nothing is learned then.
        """
        first = not self.__sklearn_is_fitted__()
        model, inputs = self._plan(X) if first else (None, self.inputs_)
        X, labels = self._check(X, y, inputs, numeric=False, reset=first)
        known = distinct(labels)[0] if first else _union(self.classes_, labels)
        known = known if classes is None else _union(known, column_or_1d(classes))
        if first:
            index = torch.as_tensor(np.searchsorted(known, labels))
            kept, _ = self._learn(X, index, model, inputs, max(2, len(known)))
            self.classes_, self.usual_ = known, None
            self._learned(kept, labels)
        else:
            self._check_room(len(known))
            if self._meta_trained:
                self._suits(self.learner_, max(2, len(known)), 1)
            kept = inputs.kept(X)
            for label, rank in self._ranks(kept, labels.tolist()):
                self.drift_.test(label, rank)
            self.classes_ = known
            self._remember(kept, labels.tolist())
            self.drift_.meet(labels.tolist())
        self._adapt()
        return self

    def feedback(self, X: Any, predicted: Any, right: Any) -> Self:
        """Learns from whether predictions were right.

        A right one is a labelled example. A wrong one says what an input is not, and is remembered as that: whenever
        the learner adapts, it counts for the likeliest of the other classes, with the probability that this one has
        among them by what the labels teach (of two classes, as a labelled example of the other). Learners that know no
        weights (k nearest neighbours, in-context, MANN, SNAIL, CAML) learn from right ones alone. Feedback is no test
        of drift: what it confirms, the predictor has chosen.

        Args:
            X: the inputs.
            predicted: what ``predict`` said of them ``(N,)``.
            right: booleans ``(N,)``.

        Raises:
            BadInput: a prediction that is none of the classes, ``right`` that is not boolean, or inputs of another
                kind than were learned from. Nothing is learned then.
        """
        check_is_fitted(self)
        X, labels = self._check(X, predicted, self.inputs_, numeric=False, reset=False)
        right = column_or_1d(right)
        check_consistent_length(labels, right)
        if right.dtype.kind != "b":
            raise BadInput(f"right holds {right.dtype}, not booleans; give True where the prediction was right")
        for label in np.unique(labels).tolist():
            self._known(label)
        kept, yes, no = self.inputs_.kept(X), np.flatnonzero(right), np.flatnonzero(~right)
        self._remember(_rows(kept, yes), labels[yes].tolist())
        for label, examples in _by_class(_rows(kept, no), labels[no].tolist()):
            self.rejected_[label] = more(self.rejected_.get(label), examples, self._room)
        self._adapt()
        return self

    def forget(self, label: Any) -> Self:
        """Forgets a class: from now on, predictions are to the bit as if it had never been seen.

        But for one thing: where the class had left the others less room (``in_all``), what they were merged into to
        make some stays so. The test of drift keeps what it knows of the others.

        Raises:
            BadInput: no such class, or no other with examples.
        """
        check_is_fitted(self)
        label = self._known(label)
        if not self.memory_.keys() - {label}:
            raise BadInput(f"forget {label!r}: no other class has examples; fit anew in place of it")
        self.classes_ = self.classes_[self.classes_ != label]
        for part in (self.memory_, self.rejected_, self._sums):
            part.pop(label, None)
        self.drift_.forget(label)
        self._adapt()
        return self

    @property
    def temperature_(self) -> float:
        """What logits are divided by: fitted to what is remembered, when it is asked for."""
        if self._temperature is None:
            with torch.no_grad():
                held = held_out(self.learner_, self._support())
            self._temperature = temperature(held, *self._usual_temperature(self._meta_trained))
        return self._temperature

    @temperature_.setter
    def temperature_(self, value: float) -> None:
        self._temperature = value

    def _learn(self, X: Any, y: Tensor, model: Model | None, inputs: Inputs, way: int | None) -> tuple[Any, Examples]:
        self._check_room(way or 0)
        return super()._learn(X, y, model, inputs, way)

    def _learned(self, kept: Any, labels: np.ndarray) -> None:
        """After ``fit``, which has adapted to all examples: remembers them."""
        self._meta_trained = self.model is not None
        self.memory_, self.rejected_, self._sums = {}, {}, {}
        self.drift_ = Drift(self.alarm_every)
        self._remember(kept, labels.tolist())
        self.drift_.meet(labels.tolist())
        for label, rank in self._ranks(kept, labels.tolist(), learned=True):
            self.drift_.learn(label, rank)

    def _ranks(self, kept: Any, labels: list[Any], learned: bool = False) -> list[tuple[Any, int]]:
        """Each example of a class that is remembered, as its label and the rank of that class among the others.

        Classes are ranked by how near their means are, whatever the learner: a learner's answers would also depend on
        how many examples of each class it has had lately. Over a network that is trained there are no means, and the
        learner answers. ``learned``: the examples are in the means; each is compared with that of the others.
        """
        seen = [i for i, label in enumerate(self.classes_.tolist()) if label in self.memory_]
        least = 2 if learned else 1
        old = [i for i, label in enumerate(labels) if label in self.memory_ and self.memory_[label].seen >= least]
        means = [part for part in self._parts(self.memory_) if isinstance(part, Means)]
        if not old or len(seen) < 2 or (learned and not means):
            return []
        kept, y = _rows(kept, old), torch.as_tensor(np.searchsorted(self.classes_[seen], [labels[i] for i in old]))
        scores = nearness(kept, means) if means else self._answers(kept)[:, seen]
        if learned:
            n = torch.stack([part.weight.sum() for part in means])[y]
            scores[torch.arange(len(y)), y] *= (n / (n - 1)).square()  # so much farther is the mean of the others
        met = torch.tensor([self.drift_.met[label] for label in self.classes_[seen].tolist()])
        scores = scores.masked_fill(met > met[y][:, None], -torch.inf)
        return [(labels[i], rank) for i, rank in zip(old, ranks(scores, y), strict=True)]

    def _remember(self, kept: Any, labels: list[Any]) -> None:
        """Takes labelled examples into memory, and into the sums of a learner that is settled by sums."""
        for memory in (self.memory_, self.rejected_):
            memory.update({label: part.within(self._room) for label, part in memory.items()})
        for label, examples in _by_class(kept, labels):
            self.memory_[label] = more(self.memory_.get(label), examples, self._room)
            if self._adds:  # class by class, so that no other one is in its rounding
                assert isinstance(self.learner_, PrototypeLearner)
                one_class = Examples(self.inputs_.read(examples), torch.zeros(len(examples), dtype=torch.int64))
                with torch.no_grad():
                    sums = {name: total[0] for name, total in self.learner_.sums(one_class).items()}
                old = self._sums.get(label)
                self._sums[label] = sums if old is None else {name: old[name] + sums[name] for name in sums}

    def _adapt(self) -> None:
        """Adapts the learner to what is remembered."""
        self._temperature, way = None, max(2, len(self.classes_))
        if self._meta_trained:
            self._suits(self.learner_, way, 1)
        else:
            rows = sum(len(part.weight) for part in self.memory_.values())
            if (self._chosen(self.inputs_, rows, way)[0], way) != (self.learner_.recipe["name"], self.learner_.way):
                self.learner_ = self._build(self.learner_.recipe["dim"], self.inputs_, rows, way, 1)
        rejected = self._parts(self.rejected_) if self.learner_.weighs else []
        if self.inputs_.mean is not None and not self._meta_trained:
            parts = self._parts(self.memory_) + rejected
            self.inputs_.rescale(*moments([part for part in parts if isinstance(part, Means)]))
        with torch.no_grad():
            self.adapted_ = self._adapted()
            if rejected and len(self.memory_) > 1:
                self.adapted_ = self._adapted(*self._guess())

    def _adapted(self, *guess: Tensor) -> Any:
        """What the learner makes of labelled examples and, with a guess, of rejected ones."""
        if not self._adds:
            return tree_map(laid_out, self.learner_.adapt(self._support(*guess)))
        assert isinstance(self.learner_, PrototypeLearner)
        none = {name: torch.zeros_like(total) for name, total in next(iter(self._sums.values())).items()}
        rows = [self._sums.get(label, none) for label in self.classes_.tolist()]
        sums = {name: torch.stack([row[name] for row in rows]) for name in none}
        if guess:
            y, weight = guess
            x = self.inputs_.read(joined(self._parts(self.rejected_))[0])
            sums = {
                name: sums[name] + new[: len(rows)] for name, new in self.learner_.sums(Examples(x, y, weight)).items()
            }
        return self.learner_.settle(sums)

    def _guess(self) -> tuple[Tensor, Tensor]:
        """The likeliest other class of each rejected row; the weight of the row, times the probability of that class.

        The temperature is the usual one: that of this very predictor would take five more adaptations.
        """
        kept, weight = joined(self._parts(self.rejected_))
        logits = self._answers(kept).double() / self._usual_temperature(self._meta_trained)[0]
        logits.scatter_(1, self._classes_of(self.rejected_)[:, None], -torch.inf)
        probability, y = logits.softmax(1).max(1)
        return y, (weight * probability).to(self.inputs_.dtype)

    def _support(self, *guess: Tensor) -> Examples:
        """What is remembered of labelled examples and, with a guess, of rejected ones."""
        kept, weight = joined(self._parts(self.memory_) + (self._parts(self.rejected_) if guess else []))
        y, weight = self._classes_of(self.memory_), weight.to(self.inputs_.dtype)
        if guess:
            y, weight = torch.cat([y, guess[0]]), torch.cat([weight[: len(y)], guess[1]])
        return Examples(self.inputs_.read(kept), y, weight if self.learner_.weighs else None)

    def _parts(self, memory: dict[Any, Known]) -> list[Known]:
        """In the order of the classes, whatever the order they came in."""
        return [memory[label] for label in self.classes_.tolist() if label in memory]

    def _classes_of(self, memory: dict[Any, Known]) -> Tensor:
        """The class index of each row of ``_parts``."""
        index = torch.tensor([i for i, label in enumerate(self.classes_.tolist()) if label in memory])
        return index.repeat_interleave(torch.tensor([len(part.weight) for part in self._parts(memory)]))

    def _answers(self, kept: Any) -> Tensor:
        with torch.no_grad():
            batches = (self.inputs_.read(kept[part]) for part in parts(len(kept), bool(self.transductive_)))
            logits = torch.cat([self.learner_.predict(self.adapted_, batch) for batch in batches])
        return logits[:, : len(self.classes_)]

    @property
    def _adds(self) -> bool:
        """Whether the learner is settled by sums over examples, in features whose scale does not change."""
        fixed = self.inputs_.mean is None or self._meta_trained
        return fixed and isinstance(self.learner_, PrototypeLearner)

    @property
    def _room(self) -> int:
        return min(self.per_class, self.in_all // len(self.classes_))

    def _check_room(self, classes: int) -> None:
        for name, value in (("per_class", self.per_class), ("alarm_every", self.alarm_every)):
            if value < 1:
                raise BadInput(f"{name} {value}: needs to be at least 1")
        if classes > self.in_all:
            raise BadInput(f"in_all {self.in_all}: {classes} classes need at least one row each; raise it")

    def _known(self, label: Any) -> Any:
        """The label as ``classes_`` has it."""
        found = [known for known in self.classes_.tolist() if known == label]
        if not found:
            raise unknown("class", str(label), map(str, self.classes_))
        return found[0]


def _union(known: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The sorted classes of both."""
    new, _ = distinct(labels)
    if (known.dtype.kind in "OUS") != (new.dtype.kind in "OUS"):
        raise BadInput(f"y holds labels of type {new.dtype}, and those known are of type {known.dtype}; pass the same")
    return distinct(np.concatenate([known, new]))[0]


def _rows(kept: Any, index: Any) -> Any:
    """Those of the inputs, which are rows of a tensor or texts."""
    return kept[torch.as_tensor(index)] if isinstance(kept, Tensor) else [kept[i] for i in index]


def _by_class(kept: Any, labels: list[Any]) -> list[tuple[Any, Any]]:
    """Each class with its examples, in the order that they came in."""
    rows: dict[Any, list[int]] = {}
    for i, label in enumerate(labels):
        rows.setdefault(label, []).append(i)
    return [(label, _rows(kept, index)) for label, index in rows.items()]
