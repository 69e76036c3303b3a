"""The catalogue of learners: adding one is a file with the algorithm and an entry here."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from torch import Tensor, nn

from metafit.errors import BadInput, unknown
from metafit.learners.base import Learner
from metafit.learners.gradient import GradientLearner, Outer, Precision
from metafit.learners.linear import LinearLearner
from metafit.learners.lora import low_rank
from metafit.learners.neighbours import NeighbourLearner
from metafit.learners.prototype import Metric, PrototypeLearner
from metafit.optim import SGD, MetaOptimizer, MetaSGD


@dataclass(frozen=True)
class Inputs:
    """What a learner is built over.

    Attributes:
        body: a network from inputs to features ``(N, dim)``, or ``None`` where the inputs are frozen features.
        dim: size of the features.
        way: outputs of a classifier; ``None`` for regression.
        outputs: dimensions of a regression target.
    """

    body: nn.Module | None
    dim: int
    way: int | None
    outputs: int = 1

    def frozen(self) -> nn.Module:
        """A copy: what does not learn is not moved by a learner that trains the same network, nor freezes it."""
        return nn.Identity() if self.body is None else copy.deepcopy(self.body)

    def trainable(self, dropout: float = 0.0) -> nn.Module:
        """The network; over frozen features, a linear map that starts as the identity."""
        return FeatureMap(self.dim, dropout) if self.body is None else self.body

    def head(self) -> nn.Linear:
        return nn.Linear(self.dim, self.way or self.outputs)


class FeatureMap(nn.Module):
    """A learned residual map over frozen features: before training, features are what they were.

    Weight decay pulls it towards the identity, and dropout of the features keeps it from learning the training
    classes by heart.
    """

    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__()
        self.dropout, self.change = nn.Dropout(dropout), nn.Linear(dim, dim)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        return x + self.change(x)


@dataclass(frozen=True)
class Entry:
    """A line of the catalogue.

    Attributes:
        build: from ``Inputs`` and the entry's own options to a learner.
        meta_trained: whether it has anything to learn from the training tasks.
        tasks: what it can be asked for.
        any_way: whether one trained learner serves any number of classes.
        relabels: whether permuting the classes of the support set permutes its logits.
    """

    name: str
    title: str
    family: Literal["baseline", "metric", "gradient"]
    paper: str
    build: Callable[..., Learner]
    meta_trained: bool = True
    tasks: tuple[Literal["classification", "regression"], ...] = ("classification", "regression")
    any_way: bool = False
    relabels: bool = False

    def options(self) -> dict[str, Any]:
        """The options that ``build`` takes, with their defaults."""
        parameters = list(inspect.signature(self.build).parameters.values())[1:]
        return {p.name: p.default for p in parameters}

    def measured(self) -> str:
        """Our row in the benchmarks; empty where there is none yet."""
        return _measured().get(self.name, "")


def centroid(inputs: Inputs, metric: Metric = "cosine", temperature: float = 0.1) -> Learner:
    learner = PrototypeLearner(inputs.frozen(), _way(inputs), metric, temperature)
    return learner.requires_grad_(False)


def neighbours(inputs: Inputs, k: int = 5, temperature: float = 0.1) -> Learner:
    return NeighbourLearner(inputs.frozen(), inputs.way, k, temperature).requires_grad_(False)


def linear(inputs: Inputs, strength: float = 10.0) -> Learner:
    return LinearLearner(inputs.frozen(), inputs.way, strength).requires_grad_(False)


def finetune(inputs: Inputs, rate: float | None = None, steps: int = 50) -> Learner:
    head = inputs.head()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    rate = rate if rate is not None else _plain_rate(inputs)
    return GradientLearner(inputs.frozen(), head, inputs.way, "all", SGD(rate), outer="first_order", steps=steps)


def scratch(inputs: Inputs, rate: float | None = None, steps: int = 50) -> Learner:
    body = nn.Sequential(nn.Linear(inputs.dim, inputs.dim), nn.ReLU()) if inputs.body is None else _anew(inputs.body)
    rate = rate if rate is not None else _plain_rate(inputs)
    return GradientLearner(body, inputs.head(), inputs.way, "all", SGD(rate), outer="first_order", steps=steps)


def protonet(
    inputs: Inputs, metric: Metric | None = None, temperature: float | None = None, dropout: float = 0.5
) -> Learner:
    metric = metric or ("cosine" if inputs.body is None else "euclidean")
    if temperature is None:
        temperature = 0.05 if metric == "cosine" else 1.0
    return PrototypeLearner(inputs.trainable(dropout), _way(inputs), metric, temperature)


def maml(
    inputs: Inputs,
    rate: float | None = None,
    steps: int | None = None,
    test_steps: int | None = None,
    scope: str = "all",
    outer: Outer = "unrolled",
    learned_rate: bool = False,
    rank: int | None = None,
    precision: Precision = "full",
) -> Learner:
    rule: MetaOptimizer = SGD(_inner_rate(inputs, scope) if rate is None else rate, learned_rate)
    return _gradient(inputs, scope, rule, outer, steps, test_steps, rank, precision=precision)


def imaml(
    inputs: Inputs,
    rate: float | None = None,
    steps: int = 16,
    test_steps: int | None = None,
    pull: float = 2.0,
    iterations: int = 5,
) -> Learner:
    rule = SGD(_inner_rate(inputs, "all") if rate is None else rate)
    return _gradient(inputs, "all", rule, "implicit", steps, test_steps, pull=pull, iterations=iterations)


def fomaml(
    inputs: Inputs,
    rate: float | None = None,
    steps: int | None = None,
    test_steps: int | None = None,
    scope: str = "all",
    rank: int | None = None,
) -> Learner:
    return maml(inputs, rate, steps, test_steps, scope, "first_order", rank=rank)


def anil(inputs: Inputs, rate: float | None = None, steps: int | None = None, test_steps: int | None = None) -> Learner:
    return maml(inputs, rate, steps, test_steps, scope="head")


def meta_sgd(
    inputs: Inputs,
    rate: float | None = None,
    steps: int | None = None,
    test_steps: int | None = None,
    scope: str = "all",
    rank: int | None = None,
) -> Learner:
    start = _inner_rate(inputs, scope) if rate is None else rate
    return _gradient(inputs, scope, lambda params: MetaSGD(params, start), "unrolled", steps, test_steps, rank)


_SNELL = "Snell et al., 2017, arXiv:1703.05175"
_FINN = "Finn et al., 2017, arXiv:1703.03400"
_CHEN = "Chen et al., 2019, arXiv:1904.04232"
_CLASSES: tuple[Literal["classification"], ...] = ("classification",)

ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("centroid", "Frozen centroid", "baseline", _SNELL, centroid, False, _CLASSES, True, True),
        Entry("knn", "k nearest neighbours", "baseline", "Cover and Hart, 1967", neighbours, False, any_way=True, relabels=True),
        Entry("linear", "Logistic or ridge regression", "baseline", "Tian et al., 2020, arXiv:2003.11539", linear, False, any_way=True, relabels=True),
        Entry("finetune", "Fine-tuning", "baseline", _CHEN, finetune, False),
        Entry("scratch", "From scratch", "baseline", _CHEN, scratch, False),
        Entry("protonet", "Prototypical network", "metric", _SNELL, protonet, True, _CLASSES, True, True),
        Entry("maml", "MAML", "gradient", _FINN, maml),
        Entry("fomaml", "First-order MAML", "gradient", _FINN, fomaml),
        Entry("imaml", "Implicit MAML", "gradient", "Rajeswaran et al., 2019, arXiv:1909.04630", imaml),
        Entry("anil", "ANIL", "gradient", "Raghu et al., 2020, arXiv:1909.09157", anil),
        Entry("meta-sgd", "Meta-SGD", "gradient", "Li et al., 2017, arXiv:1707.09835", meta_sgd),
    )
}  # fmt: skip


def entry(name: str) -> Entry:
    """The catalogue's line of that name.

    Raises:
        BadInput: no such learner; the message names the nearest.
    """
    if name not in ENTRIES:
        raise unknown("learner", name, ENTRIES)
    return ENTRIES[name]


def build(
    name: str, dim: int, way: int | None, body: nn.Module | None = None, outputs: int = 1, **options: Any
) -> Learner:
    """Builds a learner of the catalogue.

    Args:
        name: its name there.
        dim: size of the features that ``body`` gives, or that the inputs are.
        way: the most classes of a task; ``None`` for regression.
        body: a network that the learner trains or adapts; ``None`` where inputs are frozen features.
        outputs: dimensions of a regression target.
        options: of the learner; see ``entry(name).options()``.

    Raises:
        BadInput: an unknown learner or option, or a task that the learner is not made for.

    >>> build("protonet", dim=384, way=5).recipe["name"]
    'protonet'
    """
    line = entry(name)
    for option in options:
        if option not in line.options():
            raise unknown(f"option of learner {name!r}", option, line.options())
    kind = "regression" if way is None else "classification"
    if kind not in line.tasks:
        able = ", ".join(sorted(other.name for other in ENTRIES.values() if kind in other.tasks))
        raise BadInput(f"learner {name!r} does not do {kind}; choose one of: {able}")
    try:
        learner = line.build(Inputs(body, dim, way, outputs), **options)
    except BadInput:
        raise
    except (TypeError, ValueError) as error:
        raise BadInput(f"learner {name!r}: options {options}: {error}; correct the value") from error
    learner.recipe = {"name": name, "dim": dim, "way": way, "outputs": outputs, "options": options}
    return learner


def _gradient(
    inputs: Inputs,
    scope: str,
    rule: Any,
    outer: Outer,
    steps: int | None,
    test_steps: int | None,
    rank: int | None = None,
    **options: Any,
) -> GradientLearner:
    if steps is None:
        steps = 1 if inputs.way is None else 5
    body = _body(inputs, scope, rank)
    return GradientLearner(body, inputs.head(), inputs.way, scope, rule, None, outer, steps, test_steps, **options)


def _body(inputs: Inputs, scope: str, rank: int | None) -> nn.Module:
    if scope != "lora":
        if rank is not None:
            raise BadInput(f"rank {rank}: only scope 'lora' has a rank; say scope=lora too, or leave rank out")
        return inputs.trainable()
    if inputs.body is None:
        raise BadInput(
            "scope 'lora' adapts a network, and these inputs are frozen features: train the backbone "
            "(--train-backbone, or body=a network)"
        )
    return low_rank(inputs.body, 4 if rank is None else rank)


def _way(inputs: Inputs) -> int:
    assert inputs.way is not None  # build() has refused regression for learners without it
    return inputs.way


def _inner_rate(inputs: Inputs, scope: str) -> float:
    """Finn et al.: 0.01 for sinusoids, 0.4 for Omniglot. Frozen features of unit norm have small gradients."""
    if inputs.way is None:
        return 0.01
    if scope == "lora":  # MiniLM's features are of unit norm, too
        return 3.0
    return 5.0 if inputs.body is None and scope == "head" else 0.4


def _plain_rate(inputs: Inputs) -> float:
    if inputs.way is None:
        return 0.01
    return 5.0 if inputs.body is None else 0.05


def _anew(body: nn.Module) -> nn.Module:
    """A copy of the network with new random parameters."""
    fresh = copy.deepcopy(body)
    for module in fresh.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return fresh.requires_grad_(True)


@cache
def _measured() -> dict[str, str]:
    rows: dict[str, str] = json.loads(files("metafit.learners").joinpath("measured.json").read_text(encoding="utf-8"))
    return rows
