"""The catalogue of learners: adding one is a file with the algorithm and an entry here."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from torch import nn

from metafit.errors import BadInput, unknown
from metafit.learners.base import Learner
from metafit.learners.caml import ContextAwareLearner
from metafit.learners.choices import finetune, gradient, scratch
from metafit.learners.deep_kernel import DeepKernelLearner
from metafit.learners.gaussian_prototype import GaussianPrototypeLearner
from metafit.learners.in_context import InContextLearner
from metafit.learners.inputs import Inputs, Unit
from metafit.learners.laplacian import LaplacianLearner
from metafit.learners.linear import LinearLearner
from metafit.learners.logistic import LogisticLearner
from metafit.learners.mahalanobis import MahalanobisLearner
from metafit.learners.mann import MemoryLearner
from metafit.learners.matching import MatchingLearner
from metafit.learners.neighbours import NeighbourLearner
from metafit.learners.neural_process import (
    AttentiveNeuralProcess,
    ConditionalNeuralProcess,
    TransformerNeuralProcess,
)
from metafit.learners.prototype import Metric, PrototypeLearner
from metafit.learners.relation import RelationLearner
from metafit.learners.ridge import RidgeLearner
from metafit.learners.snail import SnailLearner
from metafit.learners.soft_kmeans import SoftKMeansLearner
from metafit.learners.tim import TIMLearner


@dataclass(frozen=True)
class Entry:
    """A line of the catalogue.

    Attributes:
        build: from ``Inputs`` and the entry's own options to a learner.
        meta_trained: whether it has anything to learn from the training tasks.
        tasks: what it can be asked for.
        any_way: whether one trained learner serves any number of classes.
        relabels: whether permuting the classes of the support set permutes its logits.
        ordered: whether it reads the support set as a sequence: another order is another answer.
        transductive: whether it looks at all the queries of a task at once, whatever its network.
        most_rows: support rows of a training task, where the cost of its solution grows much faster than they do.
    """

    name: str
    title: str
    family: Literal["baseline", "metric", "model", "gradient"]
    paper: str
    build: Callable[..., Learner]
    meta_trained: bool = True
    tasks: tuple[Literal["classification", "regression"], ...] = ("classification", "regression")
    any_way: bool = False
    relabels: bool = False
    ordered: bool = False
    transductive: bool = False
    most_rows: int | None = None

    def options(self) -> dict[str, Any]:
        """The options that ``build`` takes, with their defaults."""
        parameters = list(inspect.signature(self.build).parameters.values())[1:]
        return {p.name: p.default for p in parameters}

    def kinds(self) -> dict[str, Any]:
        """The annotation of each option, where ``build`` has any."""
        return get_type_hints(self.build.func if isinstance(self.build, partial) else self.build)

    @property
    def wide(self) -> bool:
        """Whether it learns from tasks of more classes than it is asked for (Snell et al., 2017, section 3.1)."""
        return self.meta_trained and self.any_way and self.family == "metric"

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


def protonet(
    inputs: Inputs, metric: Metric | None = None, temperature: float | None = None, dropout: float = 0.5
) -> Learner:
    metric = metric or ("cosine" if inputs.body is None else "euclidean")
    if temperature is None:
        temperature = 0.05 if metric == "cosine" else 1.0
    return PrototypeLearner(inputs.trainable(dropout), _way(inputs), metric, temperature)


def matching(inputs: Inputs, temperature: float = 0.1, dropout: float = 0.5) -> Learner:
    return MatchingLearner(inputs.trainable(dropout), inputs.way, temperature)


def relation(inputs: Inputs, hidden: int = 128, dropout: float = 0.5) -> Learner:
    return RelationLearner(inputs.trainable(dropout), inputs.dim, _way(inputs), hidden)


def ridge(inputs: Inputs, penalty: float = 1.0, scale: float = 10.0, dropout: float = 0.5) -> Learner:
    return RidgeLearner(inputs.trainable(dropout), inputs.way, penalty, scale, normalise=inputs.body is None)


def logistic(
    inputs: Inputs, penalty: float = 0.1, scale: float | None = None, newton: int = 8, dropout: float = 0.5
) -> Learner:
    scale = scale or (10.0 if inputs.body is None else 1.0)
    return LogisticLearner(inputs.trainable(dropout), _way(inputs), penalty, scale, inputs.body is None, newton)


def mahalanobis(inputs: Inputs, ridge: float = 1.0, scale: float | None = None, dropout: float = 0.5) -> Learner:
    scale = scale or (5.0 if inputs.body is None else 1.0)
    return MahalanobisLearner(inputs.trainable(dropout), _way(inputs), ridge, scale, inputs.body is None)


def gaussian(inputs: Inputs, temperature: float | None = None, dropout: float = 0.5) -> Learner:
    body, frozen = inputs.trainable(dropout), inputs.body is None
    return GaussianPrototypeLearner(body, inputs.dim, _way(inputs), temperature or (0.1 if frozen else 1.0), frozen)


def soft_kmeans(inputs: Inputs, temperature: float | None = None, rounds: int = 1, dropout: float = 0.5) -> Learner:
    metric: Metric = "cosine" if inputs.body is None else "euclidean"
    temperature = temperature or (0.05 if metric == "cosine" else 1.0)
    return SoftKMeansLearner(inputs.trainable(dropout), _way(inputs), metric, temperature, rounds)


def laplacian(
    inputs: Inputs, metric: Metric = "cosine", temperature: float = 0.1, neighbours: int = 3, smoothness: float = 1.0
) -> Learner:
    learner = LaplacianLearner(inputs.frozen(), _way(inputs), metric, temperature, neighbours, smoothness)
    return learner.requires_grad_(False)


def tim(inputs: Inputs, temperature: float = 2 / 15, rounds: int = 50) -> Learner:
    return TIMLearner(inputs.frozen(), _way(inputs), temperature, rounds).requires_grad_(False)


def deep_kernel(inputs: Inputs, length: float | None = None, noise: float = 0.1, dropout: float = 0.0) -> Learner:
    return DeepKernelLearner(inputs.trainable(dropout), length or inputs.dim**0.5, noise)


def cnp(inputs: Inputs, width: int = 128) -> Learner:
    return ConditionalNeuralProcess(inputs.body or nn.Identity(), inputs.dim, inputs.outputs, width)


def anp(inputs: Inputs, width: int = 128, heads: int = 4) -> Learner:
    return AttentiveNeuralProcess(inputs.body or nn.Identity(), inputs.dim, inputs.outputs, width, heads)


def tnp(inputs: Inputs, width: int = 64, layers: int = 4, heads: int = 4) -> Learner:
    return TransformerNeuralProcess(inputs.body or nn.Identity(), inputs.dim, inputs.outputs, width, layers, heads)


def in_context(
    inputs: Inputs, pretrained: bool = True, ranks: bool = True, width: int = 128, layers: int = 4, heads: int = 4
) -> Learner:
    learner = InContextLearner(inputs.body or nn.Identity(), _way(inputs), width, layers, heads, ranks)
    return learner.load_pretrained() if pretrained else learner


def mann(
    inputs: Inputs,
    width: int = 128,
    slots: int = 64,
    size: int = 32,
    heads: int = 4,
    decay: float = 0.95,
    sharpness: float = 20.0,
) -> Learner:
    body, outputs = inputs.spread(), inputs.outputs
    return MemoryLearner(body, inputs.dim, inputs.way, outputs, width, slots, size, heads, decay, sharpness)


def snail(inputs: Inputs, length: int = 128, filters: int = 32, width: int = 64) -> Learner:
    return SnailLearner(inputs.spread(), inputs.dim, inputs.way, inputs.outputs, length, filters, width)


def caml(inputs: Inputs, width: int = 128, layers: int = 4, heads: int = 4) -> Learner:
    return ContextAwareLearner(inputs.body or Unit(), inputs.dim, _way(inputs), width, layers, heads)


_SNELL = "Snell et al., 2017, arXiv:1703.05175"
_FINN = "Finn et al., 2017, arXiv:1703.03400"
_CHEN = "Chen et al., 2019, arXiv:1904.04232"
_ANTONIOU = "Antoniou et al., 2019, arXiv:1810.09502"
_METAL = "Baik et al., 2021, arXiv:2110.03909"
_CLASSES: tuple[Literal["classification"], ...] = ("classification",)
_VALUES: tuple[Literal["regression"], ...] = ("regression",)


def _variant(name: str, title: str, paper: str, tasks: Any = ("classification", "regression"), **choices: Any) -> Entry:
    """A learner that is gradient descent with some of its choices made otherwise."""
    return Entry(name, title, "gradient", paper, partial(gradient, **choices), tasks=tasks)


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("centroid", "Frozen centroid", "baseline", _SNELL, centroid, False, _CLASSES, True, True),
        Entry("knn", "k nearest neighbours", "baseline", "Cover and Hart, 1967", neighbours, False, any_way=True, relabels=True),
        Entry("linear", "Logistic or ridge regression", "baseline", "Tian et al., 2020, arXiv:2003.11539", linear, False, any_way=True, relabels=True),
        Entry("finetune", "Fine-tuning", "baseline", _CHEN, finetune, False),
        Entry("scratch", "From scratch", "baseline", _CHEN, scratch, False),
        Entry("protonet", "Prototypical network", "metric", _SNELL, protonet, True, _CLASSES, True, True),
        Entry("matching", "Matching network", "metric", "Vinyals et al., 2016, arXiv:1606.04080", matching, any_way=True, relabels=True),
        Entry("relation", "Relation network", "metric", "Sung et al., 2018, arXiv:1711.06025", relation, True, _CLASSES, True, True),
        Entry("r2d2", "Ridge regression head", "metric", "Bertinetto et al., 2019, arXiv:1805.08136", ridge, any_way=True, relabels=True),
        Entry("metaopt", "Logistic head (MetaOptNet)", "metric", "Lee et al., 2019, arXiv:1904.03758", logistic, True, _CLASSES, True, True, most_rows=100),
        Entry("mahalanobis", "Class covariances (Simple CNAPS)", "metric", "Bateni et al., 2020, arXiv:1912.03432", mahalanobis, True, _CLASSES, True, True),
        Entry("gaussian-protonet", "Gaussian prototypical network", "metric", "Fort, 2017, arXiv:1708.02735", gaussian, True, _CLASSES, True, True),
        Entry("soft-kmeans", "Prototypes refined by queries", "metric", "Ren et al., 2018, arXiv:1803.00676", soft_kmeans, True, _CLASSES, True, True, transductive=True),
        Entry("laplacian", "LaplacianShot", "metric", "Ziko et al., 2020, arXiv:2006.15486", laplacian, False, _CLASSES, True, True, transductive=True),
        Entry("tim", "TIM", "metric", "Boudiaf et al., 2020, arXiv:2008.11297", tim, False, _CLASSES, True, True, transductive=True),
        Entry("dkt", "Deep-kernel Gaussian process", "metric", "Patacchiola et al., 2020, arXiv:1910.05199", deep_kernel, tasks=_VALUES),
        Entry("cnp", "Conditional neural process", "model", "Garnelo et al., 2018, arXiv:1807.01613", cnp, tasks=_VALUES),
        Entry("anp", "Attentive neural process", "model", "Kim et al., 2019, arXiv:1901.05761", anp, tasks=_VALUES),
        Entry("in-context", "In-context learner for rows", "model", "after Hollmann et al., 2023, arXiv:2207.01848", in_context, True, _CLASSES, True, True),
        Entry("tnp", "Transformer neural process", "model", "Nguyen and Grover, 2022, arXiv:2207.04179", tnp, tasks=_VALUES),
        Entry("mann", "Memory-augmented network", "model", "Santoro et al., 2016, arXiv:1605.06065", mann, ordered=True),
        Entry("snail", "SNAIL", "model", "Mishra et al., 2018, arXiv:1707.03141", snail, ordered=True),
        Entry("caml", "Context-aware meta-learning (CAML)", "model", "Fifty et al., 2024, arXiv:2310.10971", caml, True, _CLASSES, relabels=True),
        Entry("maml", "MAML", "gradient", _FINN, gradient),
        _variant("fomaml", "First-order MAML", _FINN, outer="first_order"),
        _variant("reptile", "Reptile", "Nichol et al., 2018, arXiv:1803.02999", outer="reptile"),
        _variant("imaml", "Implicit MAML", "Rajeswaran et al., 2019, arXiv:1909.04630", outer="implicit", steps=16),
        _variant("anil", "ANIL", "Raghu et al., 2020, arXiv:1909.09157", scope="head"),
        _variant("boil", "BOIL", "Oh et al., 2021, arXiv:2008.08882", scope="body"),
        _variant("protomaml", "ProtoMAML", "Triantafillou et al., 2020, arXiv:1903.03096", _CLASSES, head="prototype"),
        _variant("meta-sgd", "Meta-SGD", "Li et al., 2017, arXiv:1707.09835", rule="meta-sgd"),
        _variant("maml++", "MAML++", _ANTONIOU, rule="per-step", multi_step="annealed", per_step_norm=True),
        _variant("meta-curvature", "Meta-Curvature", "Park and Oliva, 2019, arXiv:1902.03356", rule="meta-curvature"),
        _variant("t-net", "T-net", "Lee and Choi, 2018, arXiv:1801.05558", rule="t-net"),
        _variant("alfa", "ALFA", "Baik et al., 2020, arXiv:2011.00209", rule="alfa"),
        _variant("metal", "MeTAL", _METAL, loss="metal", rule="per-step"),
        _variant("alfa+metal", "ALFA with MeTAL", _METAL, rule="alfa", loss="metal"),
        _variant("lstm", "Learned LSTM optimizer", "Andrychowicz et al., 2016, arXiv:1606.04474", rule="lstm"),
        _variant("mlp", "Learned MLP optimizer", "Metz et al., 2022, arXiv:2203.11860", rule="mlp"),
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
    options = {key: value.item() if isinstance(value, np.generic) else value for key, value in options.items()}
    kinds = line.kinds() if options else {}
    for option in options:
        if option not in line.options():
            raise unknown(f"option of learner {name!r}", option, line.options())
        _check_kind(name, option, options[option], kinds.get(option))
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
    if body is not None:
        _join(learner, body)
    learner.recipe = {"name": name, "dim": dim, "way": way, "outputs": outputs, "options": options}
    return learner


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a name (objects are for GradientLearner)",
    tuple: "a range as [0.1, 0.2]",
}


def _check_kind(name: str, option: str, value: Any, annotation: Any) -> None:
    """Whether an option is of a kind that its annotation allows: a list for a range, a whole number for a number."""
    allowed = [get_origin(kind) or kind for kind in get_args(annotation) or (annotation,)]
    if (value is None and type(None) in allowed) or not set(allowed) <= {*_WORDS, type(None)}:
        return
    kind = tuple if isinstance(value, list) else type(value)
    if not any(kind is one or (one is float and kind is int) for one in allowed):
        wanted = " or ".join(_WORDS[one] for one in allowed if one in _WORDS)
        raise BadInput(f"option {option} {value!r} of learner {name!r}: needs to be {wanted}")


def _join(learner: Learner, body: nn.Module) -> None:
    """Puts what was added to a network on its device and in its precision, where it has one of each."""
    kinds = {(p.device, p.dtype) for p in body.parameters() if p.is_floating_point()}
    if len(kinds) == 1:
        learner.to(*kinds.pop())


def _way(inputs: Inputs) -> int:
    assert inputs.way is not None  # build() has refused regression for learners without it
    return inputs.way


@cache
def _measured() -> dict[str, str]:
    rows: dict[str, str] = json.loads(files("metafit.learners").joinpath("measured.json").read_text(encoding="utf-8"))
    return rows
