"""Defences against overfitting on few tasks: each changes a batch of tasks before the outer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from metafit.data.randomness import derive, keys
from metafit.data.views import Affine, Jitter, Mirror, View, changed
from metafit.errors import BadInput, unknown
from metafit.learners import Learner
from metafit.task import Examples, Task, count, take

Augment = Callable[[Task, torch.Generator], Task]


@dataclass(frozen=True)
class PermuteLabels:
    """Numbers the classes of each task anew, support and query alike, so that nothing can be learned of a class by its
    number (Yin et al., 2020, arXiv:1912.03820: tasks that are mutually exclusive cannot be memorised).

    It is for tasks that always number a class the same; ``TaskSampler`` draws the order of the classes of a task.
    Classes that a task lacks, and padding, move as the others do: safe for any learner that masks absent classes.

    Args:
        way: of the learner; labels are 0 to way − 1.
    """

    way: int

    def __call__(self, tasks: Task, generator: torch.Generator) -> Task:
        if any(part.y.is_floating_point() for part in tasks):
            raise BadInput("PermuteLabels: the targets are numbers, not classes; leave it out of a regression")
        largest = max(int(part.y.max()) for part in tasks)
        if largest >= self.way:
            raise BadInput(f"PermuteLabels: way {self.way}, but a label is {largest}; give it the way of the learner")
        new = torch.rand(count(tasks), self.way, generator=generator, device=generator.device).argsort(-1)
        return Task(*(part._replace(y=new.to(part.y.device).gather(1, part.y)) for part in tasks))


@dataclass(frozen=True)
class MetaMix:
    """Queries are mixed with support examples: λ·x_q + (1 − λ)·x_s, and so are their labels, λ ~ Beta(a, a) for each
    query, so that the outer loss sees the support set, too (Yao et al., 2021, arXiv:2007.13040; of the inputs only,
    where the paper mixes hidden layers, too).

    Labels are class indices: each mixed input is listed twice, with the query's label at λ times its weight and the
    support example's at 1 − λ times. A weighted mean over both is exactly the loss of the soft label, at twice the
    arithmetic of the query set. Regression targets are mixed as they are. Padding is not mixed in.

    Args:
        strength: a; near 0 most λ are near 0 or 1.
    """

    strength: float = 0.5

    def __post_init__(self) -> None:
        _check_strength(self)

    def __call__(self, tasks: Task, generator: torch.Generator) -> Task:
        support, query = tasks
        _check_numbers(self, tasks)
        weight = _weight(query)
        share = _beta(self.strength, weight.shape, generator, weight)
        other = _rows(support, _drawn(_weight(support) > 0, weight.shape[1], generator))
        x = tree_map(lambda own, theirs: _mixed(own, theirs, share), query.x, other.x)
        if query.y.is_floating_point():
            return Task(support, Examples(x, _mixed(query.y, other.y, share), query.weight))
        twice = tree_map(lambda leaf: torch.cat([leaf, leaf], 1), x)
        soft = torch.cat([share * weight, (1 - share) * weight], 1)
        return Task(support, Examples(twice, torch.cat([query.y, other.y], 1), soft))


@dataclass(frozen=True)
class MLTI:
    """Each task is interpolated with another of the batch: λ·x + (1 − λ)·x', one λ ~ Beta(a, a) a task (Yao et al.,
    2022, arXiv:2106.02695; of the inputs only, where the paper mixes hidden layers, too).

    An example's counterpart is that of the same class number and the same rank among its class's, counted over again
    where the other task has fewer. A regression has one class, and its targets are mixed as the inputs are. Class
    labels stay: classes with the same number make one new class, a random pairing where tasks number their classes at
    random (``TaskSampler`` does; else apply ``PermuteLabels`` first). Padding is not mixed in, and what has no
    counterpart stays as it is.

    Args:
        strength: a; near 0 most λ are near 0 or 1.
    """

    strength: float = 0.5

    def __post_init__(self) -> None:
        _check_strength(self)

    def __call__(self, tasks: Task, generator: torch.Generator) -> Task:
        total = count(tasks)
        if total < 2:
            raise BadInput("MLTI: a batch of one task has no other to mix with; draw batches of 2 or more")
        _check_numbers(self, tasks)
        ahead = 1 + int(torch.randint(total - 1, (), generator=generator, device=generator.device))
        others = take(tasks, torch.arange(total, device=tasks.query.y.device).roll(-ahead))
        share = _beta(self.strength, (total, 1), generator, _weight(tasks.query))
        return Task(*(_interpolated(own, other, share) for own, other in zip(tasks, others, strict=True)))


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on the support inputs, drawn for each element: the learner adapts to a neighbourhood of them.

    Args:
        scale: standard deviation, in units of the inputs.
    """

    scale: float

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise BadInput(f"Noise: scale {self.scale}: needs 0 or more")

    def __call__(self, tasks: Task, generator: torch.Generator) -> Task:
        _check_numbers(self, tasks)

        def noisy(leaf: Tensor) -> Tensor:
            drawn = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype, device=generator.device)
            return leaf + self.scale * drawn.to(leaf.device)

        return tasks._replace(support=tasks.support._replace(x=tree_map(noisy, tasks.support.x)))


@dataclass(frozen=True)
class Views:
    """Other views of the examples, each drawn for itself: the learner adapts to what they are, not to how they happen
    to look.

    Args:
        views: one after the other, such as ``data.views.Affine()`` for images, ``Jitter(0.1, 0.1)`` for features.
        query: whether queries are seen so, too, as if there were more examples.
    """

    views: Sequence[View]
    query: bool = False

    def __call__(self, tasks: Task, generator: torch.Generator) -> Task:
        support = self._seen(tasks.support, generator)
        return Task(support, self._seen(tasks.query, generator) if self.query else tasks.query)

    def _seen(self, examples: Examples, generator: torch.Generator) -> Examples:
        x = examples.x
        if not isinstance(x, Tensor):
            raise BadInput("Views: inputs of several tensors (tokens) have no views; give it images or features")
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        key = derive(keys(seed, torch.arange(len(x)))[:, None], torch.arange(x.shape[1]))
        return examples._replace(x=changed(x.flatten(0, 1), key.flatten(), self.views).view_as(x))


AUGMENTS: dict[str, Callable[[int | None], Augment]] = {  # from the way of the learner
    "permute-labels": lambda way: PermuteLabels(way or 0),
    "metamix": lambda way: MetaMix(),
    "mlti": lambda way: MLTI(),
    "noise": lambda way: Noise(0.1),
    "affine": lambda way: Views([Affine()]),
    "jitter": lambda way: Views([Jitter(drop=0.1, noise=0.1)]),
    "mirror": lambda way: Views([Mirror()], query=True),
}


def augments(names: Sequence[str], way: int | None) -> list[Augment]:
    """Those of ``AUGMENTS``, with their usual strengths.

    Raises:
        BadInput: an unknown name.
    """
    for name in names:
        if name not in AUGMENTS:
            raise unknown("augmentation", name, AUGMENTS)
    return [AUGMENTS[name](way) for name in names]


def check_augments(augment: Sequence[Augment], learner: Learner) -> None:
    """Whether each of them changes what the learner trains on.

    Raises:
        BadInput: one has no effect.
    """
    if not learner.trains_on_queries and any(isinstance(a, MetaMix) for a in augment):
        raise BadInput("MetaMix changes the queries alone, which the learner (reptile) does not train on: leave it out")


def _check_strength(augment: MetaMix | MLTI) -> None:
    if not augment.strength > 0:
        raise BadInput(f"{type(augment).__name__}: strength {augment.strength}: needs more than 0")


def _check_numbers(augment: Any, tasks: Task) -> None:
    for leaf in tree_leaves((tasks.support.x, tasks.query.x)):
        if not leaf.is_floating_point():
            raise BadInput(
                f"{type(augment).__name__}: inputs of type {leaf.dtype} (tokens, or raw pixels) cannot be mixed; give "
                "it features of a frozen backbone, or inputs in floating point"
            )


def _weight(examples: Examples) -> Float[Tensor, "t n"]:
    if examples.weight is not None:
        return examples.weight
    first: Tensor = tree_leaves(examples.x)[0]
    return first.new_ones(examples.y.shape[:2])


def _beta(strength: float, shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Draws of Beta(a, a), which torch does not draw from a generator: it seeds NumPy's."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    drawn = np.random.default_rng(seed).beta(strength, strength, tuple(shape))
    return torch.from_numpy(drawn).to(like.dtype).to(like.device)


def _drawn(counts: Bool[Tensor, "t n"], each: int, generator: torch.Generator) -> Int64[Tensor, "t each"]:
    """Rows of each task, drawn with replacement from those that count."""
    uniform = torch.rand(len(counts), each, generator=generator, device=generator.device).to(counts.device)
    number = counts.sum(1, keepdim=True)
    nth = (uniform * number).long().minimum((number - 1).clamp_min(0))
    return (~counts).int().argsort(stable=True).gather(1, nth)  # those that count come first


def _rows(examples: Any, index: Int64[Tensor, "t m"]) -> Any:
    """``leaf[t, index[t]]`` of every leaf."""
    task = torch.arange(len(index), device=index.device)[:, None]
    return tree_map(lambda leaf: None if leaf is None else leaf[task, index], examples)


def _mixed(own: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """λ·own + (1 − λ)·other, exactly own where both are the same."""
    return own + (1 - _along(share, own).to(own.dtype)) * (other - own)


def _along(values: Tensor, leaf: Tensor) -> Tensor:
    """``(T, N)`` as it broadcasts against a leaf ``(T, N, ...)``."""
    return values.view(*values.shape, *[1] * (leaf.dim() - 2))


def _interpolated(own: Examples, other: Examples, share: Tensor) -> Examples:
    partner, found = _counterparts(own, other)

    def mixed(leaf: Tensor, theirs: Tensor) -> Tensor:
        return _mixed(leaf, torch.where(_along(found, leaf), theirs, leaf), share)

    paired = _rows(other, partner)
    y = mixed(own.y, paired.y) if own.y.is_floating_point() else own.y
    return Examples(tree_map(mixed, own.x, paired.x), y, own.weight)


def _counterparts(own: Examples, other: Examples) -> tuple[Int64[Tensor, "t n"], Bool[Tensor, "t n"]]:
    """The other task's example of the same class and rank, and whether there is one."""
    (mine, its), (here, there) = map(_class, (own, other)), (_weight(own) > 0, _weight(other) > 0)
    way = int(torch.maximum(mine.max(), its.max())) + 1
    classes = torch.arange(way, device=mine.device)
    before = ((mine[..., None] == classes) & here[..., None]).cumsum(1)
    rank = before.gather(2, mine[..., None])[..., 0] - 1
    size = ((its[..., None] == classes) & there[..., None]).sum(1)
    first = size.cumsum(1) - size
    by_class = torch.where(there, its, way).argsort(stable=True)
    of_class = size.gather(1, mine)
    place = first.gather(1, mine) + rank.remainder(of_class.clamp_min(1))
    return by_class.gather(1, place.clamp_max(its.shape[1] - 1)), of_class > 0


def _class(examples: Examples) -> Int64[Tensor, "t n"]:
    y = examples.y
    return torch.zeros(y.shape[:2], dtype=torch.long, device=y.device) if y.is_floating_point() else y
