"""Tables drawn from a prior over how tables come about: what an in-context learner for rows is trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from metafit.errors import BadInput
from metafit.task import Examples, Task

NODES = 12  # of each layer of a causal network
SCORES = 4  # that classes are told from
SPARE = 2  # rows drawn for each that is kept: which of a class's rows a task has is chance


@dataclass(frozen=True)
class SyntheticTables:
    """Classification tasks whose rows come from random causal networks, mixtures of Gaussians, sums of trees,
    categories, or linear scores.

    After the prior of Hollmann et al. (2023, arXiv:2207.01848, section 4 and appendix C) and the forests of den Breejen
    et al. (2024, arXiv:2405.13396): a causal network draws features and the class from the nodes of one random network;
    a mixture gives each class its own Gaussians; a sum of trees cuts the features by random thresholds; categories have
    numbers that mean nothing, and count one by one and in pairs. A class is where one of several mixtures of scores is
    largest, or a union of intervals of one. Columns are then bent, rounded or cut as measured ones are, few or nearly
    all of a table; some labels are wrong, and some columns say nothing.

    The tasks of a batch share their ways, shots and family, so that they need no padding; the batch with a given
    (seed, index) is always the same.

    Args:
        features: columns; a task uses 2 or more of them, the others are 0.
        batch: tasks a batch.
        seed: of the stream.
        most_ways, most_shots: classes, and support rows a class, at most.
        most_support: rows of a support set at most.
        queries: query rows of a task, about.
    """

    features: int = 32
    batch: int = 64
    seed: int = 0
    most_ways: int = 10
    most_shots: int = 24
    most_support: int = 160
    queries: int = 40

    @property
    def way(self) -> tuple[int, int]:
        return 2, self.most_ways

    @property
    def shot(self) -> tuple[int, int]:
        return 3, self.most_shots

    @property
    def query(self) -> int:
        return self.queries

    def draw(self, index: int) -> Task:
        """The batch with that index: x ``(T, N, features)``, y ``(T, N)``."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + index)
        way = self._way(generator)
        shot = 3 + _below(generator, min(self.most_shots, self.most_support // way) - 2)
        query = max(1, round(self.queries / way))
        family = FAMILIES[_below(generator, len(FAMILIES))]
        used = _used(generator, self.batch, self.features)
        x, y = family(generator, used, way, SPARE * (shot + query))
        x, y = _some_of_each(generator, x, y, way, shot + query)
        x = _spoilt(generator, _measured(generator, x)) * used
        place = torch.arange(way * (shot + query)) % (shot + query)  # of a row among those of its class
        y = torch.where(place == 0, y, _mistaken(generator, y))  # no class is without support
        parts = (place < shot, place >= shot)
        return Task(*(Examples(x[:, rows], y[:, rows], torch.ones(self.batch, int(rows.sum()))) for rows in parts))

    def tasks(self, start: int, stop: int) -> Task:
        """The tasks ``start`` to ``stop - 1``, which must be one batch.

        Raises:
            BadInput: they are of two batches, or not the whole of one.
        """
        index, rest = divmod(start, self.batch)
        if rest or stop - start != self.batch:
            raise BadInput(f"tasks {start} to {stop - 1}: a batch is {self.batch} tasks of one shape; ask for one")
        return self.draw(index)

    def _way(self, generator: Generator) -> int:
        """Two classes as often as all other numbers together: so it is with tables."""
        return 2 if _share(generator) < 0.5 else 3 + _below(generator, self.most_ways - 2)


def causal(generator: Generator, used: Tensor, way: int, each: int) -> tuple[Tensor, Tensor]:
    """Features and a score that are nodes of one random network; classes from the score."""
    (tasks, _, features), rows, layers = used.shape, way * each, 1 + _below(generator, 3)
    nodes = [_roots(generator, tasks, rows, NODES)]
    for _ in range(layers):
        weight = _normal(generator, tasks, NODES, NODES) * (_uniform(generator, tasks, NODES, NODES) < 0.4)
        weight = weight / weight.square().sum(1, keepdim=True).sqrt().clamp_min(0.1)
        bend = BENDS[_below(generator, len(BENDS))]
        gain, shift = 0.5 + _uniform(generator, tasks, 1, 1), 0.7 * _normal(generator, tasks, 1, NODES)
        value = bend(nodes[-1] @ weight * gain + shift)
        noise = 0.3 * _uniform(generator, tasks, 1, NODES).pow(3)
        nodes.append(_standard(value) + noise * _normal(generator, tasks, rows, NODES))
    scores, causes = nodes[-1][..., :SCORES], torch.cat([*nodes[:-1], nodes[-1][..., SCORES:]], -1)
    order = _uniform(generator, tasks, causes.shape[-1]).argsort(-1)[:, :features]
    x = causes.gather(-1, order[:, None].expand(-1, rows, -1))
    return torch.nn.functional.pad(x, (0, features - x.shape[-1])), _classes(generator, scores, way)


def mixture(generator: Generator, used: Tensor, way: int, each: int) -> tuple[Tensor, Tensor]:
    """Each class is one to three Gaussians, alike in their covariances or not, in one column or in all."""
    (tasks, _, features), clusters = used.shape, 1 + _below(generator, 3)
    y = torch.arange(way).repeat_interleave(each).expand(tasks, -1)
    relevant = _uniform(generator, tasks, 1, features) < 0.1 + 0.9 * _uniform(generator, tasks, 1, 1)
    apart = (0.7 + 3 * _uniform(generator, tasks, 1, 1)) / (relevant & used).sum(-1, keepdim=True).clamp_min(1).sqrt()
    means = _normal(generator, tasks, way * clusters, features) * relevant * apart
    which = y * clusters + torch.randint(clusters, (tasks, way * each), generator=generator)
    mix = _mix(generator, tasks, features)
    each_column = _uniform(generator, tasks, 1, 1) * 0.7 * _normal(generator, tasks, way * clusters, features)
    all_columns = _uniform(generator, tasks, 1, 1) * 0.6 * _normal(generator, tasks, way * clusters, 1)
    spread = torch.exp(each_column + all_columns)
    noise = _normal(generator, tasks, way * each, features) * _rows(spread, which)
    return _rows(means, which) + noise @ mix, y


def trees(generator: Generator, used: Tensor, way: int, each: int) -> tuple[Tensor, Tensor]:
    """A score that is a sum of trees, each of which cuts by a few features."""
    (tasks, _, features), rows = used.shape, way * each
    depth, count = 1 + _below(generator, 3), 1 + _below(generator, 6)
    x = _roots(generator, tasks, rows, features)
    of_interest = used.sum(-1).clamp_max(1 + _below(generator, 8))
    scores = torch.zeros(tasks, rows, SCORES)
    for _ in range(count):
        columns = (_uniform(generator, tasks, depth) * of_interest).long()
        cuts = 0.8 * _normal(generator, tasks, 1, depth)
        above = x.gather(-1, columns[:, None].expand(-1, rows, -1)) > cuts
        leaf = (above * 2 ** torch.arange(depth)).sum(-1)
        scores += _rows(_normal(generator, tasks, 2**depth, SCORES), leaf)
    return x, _classes(generator, scores, way)


def categories(generator: Generator, used: Tensor, way: int, each: int) -> tuple[Tensor, Tensor]:
    """Scores of what a few columns say, each by itself and two together; the order of their values means nothing."""
    (tasks, _, features), rows, most = used.shape, way * each, 2 + _below(generator, 5)
    levels = 2 + (_uniform(generator, tasks, 1, features) * (most - 1)).long()
    x = (_uniform(generator, tasks, rows, features).pow(0.5 + _uniform(generator, tasks, 1, features)) * levels).long()
    of_interest = used.sum(-1).clamp_max(1 + _below(generator, 8))
    scores = torch.zeros(tasks, rows, SCORES)
    for columns, weight in ((1, 1.0), (2, 2 * _share(generator))):
        for _ in range(1 + _below(generator, 6)):
            seen = (_uniform(generator, tasks, columns) * of_interest).long()
            value = (_rows(x.mT, seen).mT * most ** torch.arange(columns)).sum(-1)
            scores += weight * _rows(_normal(generator, tasks, most**columns, SCORES), value)
    return x.float(), _classes(generator, scores, way)


def straight(generator: Generator, used: Tensor, way: int, each: int) -> tuple[Tensor, Tensor]:
    """Linear scores of some features."""
    (tasks, _, features), rows = used.shape, way * each
    x = _roots(generator, tasks, rows, features)
    weight = _normal(generator, tasks, features, SCORES) * used.mT
    weight = weight * (_uniform(generator, tasks, features, 1) < _uniform(generator, tasks, 1, 1))
    return x, _classes(generator, x @ weight, way)


FAMILIES: tuple[Callable[..., tuple[Tensor, Tensor]], ...] = (causal, mixture, mixture, trees, categories, straight)
BENDS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.tanh,
    torch.relu,
    torch.sin,
    torch.abs,
    torch.square,
    torch.sigmoid,
    torch.nn.Identity(),
    lambda x: torch.exp(-x.square()),
)


def _classes(generator: Generator, scores: Tensor, way: int) -> Tensor:
    """About equally many rows of each class: where one of ``way`` mixtures of the scores is largest, or for a few
    tasks unions of intervals of a score."""
    tasks, rows, size = scores.shape
    scores = _standard(scores)
    scores = scores + 0.6 * _uniform(generator, tasks, 1, 1).pow(4) * _normal(generator, *scores.shape)
    if _share(generator) < 0.5:
        logits = 4 * scores @ _normal(generator, tasks, size, way)
        for _ in range(8):  # until no class has many more rows than another (Sinkhorn)
            logits = logits.log_softmax(-1)
            logits = logits - logits.logsumexp(1, keepdim=True)
        return logits.argmax(-1)
    pieces = 1 if _share(generator) < 0.7 else 2
    interval = scores[..., 0].argsort(-1).argsort(-1) * (way * pieces) // rows
    return (_uniform(generator, tasks, way * pieces).argsort(-1) % way).gather(1, interval)


def _some_of_each(generator: Generator, x: Tensor, y: Tensor, way: int, each: int) -> tuple[Tensor, Tensor]:
    """Rows of each class by chance, sorted by class; relabelled at random, as classes have no order."""
    of_class = y[:, None] == torch.arange(way)[:, None]
    rows = (of_class + _uniform(generator, len(y), way, y.shape[1])).topk(each, -1).indices.flatten(1)
    names = _uniform(generator, len(y), way).argsort(-1)
    return _rows(x, rows), names.gather(1, y.gather(1, rows))


def _measured(generator: Generator, x: Tensor) -> Tensor:
    """Columns as they are measured: bent, with heavy tails, rounded to a few levels, or cut in two."""
    x = _standard(x)
    tasks, _, features = x.shape
    kind = _uniform(generator, tasks, 1, features) + 0.8 * (_uniform(generator, tasks, 1, 1) - 0.5)
    shift = 0.7 * _normal(generator, tasks, 1, features)
    levels = 0.5 + 2 * _uniform(generator, tasks, 1, features)
    for least, changed in (
        (0.50, x.clamp(-4, 4).exp()),
        (0.60, x * x.abs()),
        (0.70, ((x + shift) * levels).round()),
        (0.88, (x > shift).float()),
    ):
        x = torch.where(kind > least, changed, x)
    return x


def _used(generator: Generator, tasks: int, features: int) -> Tensor:
    """Which columns a task has ``(T, 1, F)``: the first of them, few as often as many."""
    most = torch.exp(math.log(2) + (math.log(features + 1) - math.log(2)) * _uniform(generator, tasks, 1, 1))
    return torch.arange(features) < most.floor()


def _spoilt(generator: Generator, x: Tensor) -> Tensor:
    """Columns that say nothing, in a third of the tasks."""
    share = (0.9 * _uniform(generator, len(x), 1, 1) - 0.6).clamp_min(0)
    return torch.where(_uniform(generator, len(x), 1, x.shape[-1]) < share, _normal(generator, *x.shape), x)


def _mistaken(generator: Generator, y: Tensor) -> Tensor:
    """Labels of which up to a fifth are another row's; none in two thirds of the tasks."""
    share = 0.2 * (3 * _uniform(generator, len(y), 1) - 2).clamp_min(0)
    other = y.gather(1, _uniform(generator, *y.shape).argsort(-1))
    return torch.where(_uniform(generator, *y.shape) < share, other, y)


def _roots(generator: Generator, tasks: int, rows: int, size: int) -> Tensor:
    """Causes: Gaussian or uniform, some of them alike in all."""
    noise = _normal(generator, tasks, rows, size)
    if _share(generator) < 0.3:
        noise = 3.4 * (_uniform(generator, tasks, rows, size) - 0.5)
    return _standard(noise @ _mix(generator, tasks, size))


def _mix(generator: Generator, tasks: int, size: int) -> Tensor:
    """What makes columns depend on each other: hidden causes, few or many, beside each column's own."""
    fall = torch.exp(-torch.arange(size) * _uniform(generator, tasks, 1, 1).square())[:, 0, :, None]
    hidden = fall * _normal(generator, tasks, size, size) / fall.square().sum(1, keepdim=True).sqrt()
    return hidden + 2 * _uniform(generator, tasks, 1, 1).pow(3) * torch.eye(size)


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True).clamp_min(1e-3)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _uniform(generator: Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator)


def _share(generator: Generator) -> float:
    return float(torch.rand((), generator=generator))


def _below(generator: Generator, high: int) -> int:
    return int(torch.randint(high, (), generator=generator))
