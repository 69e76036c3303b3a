"""The interface of learners: a learner maps a support set to a predictor."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from metafit.context import Context
from metafit.errors import BadInput
from metafit.losses import CrossEntropy, Loss, SquaredError
from metafit.losses.plain import like
from metafit.task import Examples, Task, unit, weighted_mean, weights

Adapted = Any


class Learner(nn.Module):
    """Maps a support set to a predictor; its parameters are the meta-parameters.

    Written for one task: ``over_tasks`` and ``meta_gradient`` run it over batches of them. A learner implements
    ``adapt`` (or ``trajectory``, where it adapts in steps) and ``predict``.

    Args:
        way: outputs of a classifier, the largest number of classes that a batch is padded to; ``None`` for regression.

    Attributes:
        vmappable: false for learners that leave PyTorch (they run task by task).
        second_order: whether the derivative of ``loss`` differentiates a gradient.
        weighs: whether an example of weight w counts as w examples; others know the weights 0, padding, and 1 alone.
        trains_on_queries: whether their loss is what trains it, and not only what it is measured by.
        gaussian: whether a regression's outputs are means and log-variances ``(Q, 2D)``, for ``GaussianNLL``.
        recipe: how the catalogue built it, in plain JSON; what a saved model is built from again.
    """

    vmappable = True
    second_order = False
    weighs = True
    trains_on_queries = True
    gaussian = False
    recipe: dict[str, Any]

    def __init__(self, way: int | None):
        super().__init__()
        self.way = way
        self.criterion: Loss = SquaredError() if way is None else CrossEntropy()

    def adapt(self, support: Examples) -> Adapted:
        """What the support set of one task taught: a pytree of tensors, differentiable in the meta-parameters."""
        return self.trajectory(support)[-1]

    def trajectory(self, support: Examples) -> list[Adapted]:
        """The adapted state before the first step and after each; one entry for learners that adapt at once."""
        return [self.adapt(support)]

    def path(self, task: Task) -> list[Adapted]:
        """The trajectory on a task's support set; a transductive learner looks at the query inputs, too."""
        return self.trajectory(task.support)

    def advance(self, done: float) -> None:
        """Told by training which share of the outer steps is behind it, 0 to 1, for what changes on the way."""
        self.criterion.advance(done)

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        """Logits ``(Q, way)`` or values ``(Q, D)`` of one task's inputs; ``(Q, 2D)`` where ``gaussian``."""
        raise NotImplementedError

    def loss(self, task: Task) -> tuple[Tensor, dict[str, Tensor]]:
        """The query loss of one task after adaptation, and its metrics."""
        outputs = self.predict(self.adapt(task.support), task.query.x)
        return self.score(outputs, task.query)

    def score(self, outputs: Tensor, query: Examples) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of outputs, and ``accuracy`` or ``mse``."""
        weight = weights(query)
        outputs = outputs.to(torch.promote_types(outputs.dtype, weight.dtype))  # where autocast left half precision
        loss = self.criterion(outputs, query.y, weight, Context())
        if self.way is None:
            means = outputs.chunk(2, -1)[0] if self.gaussian else outputs
            return loss, {"mse": weighted_mean((means - like(means, query.y)).square().mean(-1), weight).detach()}
        right = (outputs.argmax(-1) == query.y).to(outputs.dtype)
        return loss, {"accuracy": weighted_mean(right, weight.to(outputs.dtype)).detach()}

    @property
    def measured_by(self) -> str:
        """What training validates by, of ``loss``'s metrics: the larger the better, but for ``mse``."""
        return "mse" if self.way is None else "accuracy"

    @property
    def transductive(self) -> str:
        """Why predictions for one query depend on the other queries; empty where they do not."""
        batch_statistics = any(isinstance(m, _BatchNorm) and m.running_mean is None for m in self.modules())
        return "batch normalisation over the query set" if batch_statistics else ""


def check_tasks(learner: Learner, tasks: Any) -> None:
    """Whether tasks of a sampler are of the learner's kind, where the sampler says so by its ``way``.

    Raises:
        BadInput: more classes than the learner tells apart, or numbers for classes, or classes for numbers.
    """
    if not hasattr(tasks, "way"):
        return
    ways = [way for way in tree_leaves(tasks.way) if way is not None]
    if learner.way is None and ways:
        raise BadInput(f"tasks of {max(ways)} classes: the learner is for regression; build it with way={max(ways)}")
    if learner.way is not None and not ways:
        raise BadInput("tasks of a regression: the learner tells classes apart; build it with way=None")
    if learner.way is not None and max(ways) > learner.way:
        raise BadInput(f"tasks of {max(ways)} classes: the learner tells {learner.way} apart; draw tasks of fewer")


def members(support: Examples, way: int) -> Float[Tensor, "n way"]:
    """Which class each support example belongs to, times its weight: one-hot rows, zero for padding."""
    weight = weights(support)
    one_hot = support.y[:, None] == torch.arange(way, device=support.y.device)  # F.one_hot reads its largest label back
    return one_hot.to(weight.dtype) * weight[:, None]


def present(support: Examples, way: int) -> Bool[Tensor, " way"]:
    """Which classes the support set has; the others are masked out of the softmax."""
    return members(support, way).sum(0) > 0


def targets(support: Examples, way: int | None) -> Float[Tensor, "n outputs"]:
    """What each support example says: its class as a one-hot row, zero for padding; or its value."""
    return support.y if way is None else members(support, way)


def class_means(
    features: Float[Tensor, "n dim"], support: Examples, way: int | None
) -> tuple[Float[Tensor, "way dim"], Bool[Tensor, " way"]]:
    """The mean of each class, zero where it is absent; and which classes are present."""
    assert way is not None  # the catalogue refuses regression
    member = members(support, way)
    size = member.sum(0)
    means = (member.to(features.dtype).mT @ features) / torch.where(size > 0, size, 1.0)[:, None].to(features.dtype)
    return means, size > 0


def logarithm(name: str, value: float) -> nn.Parameter:
    """A positive meta-parameter, which is learned as its logarithm.

    Raises:
        BadInput: it is not positive at the start.
    """
    if not value > 0:
        raise BadInput(f"{name} {value}: needs to be above 0")
    return nn.Parameter(torch.tensor(float(value)).log())


def embed(body: nn.Module, x: Any, normalise: bool) -> Float[Tensor, "n dim"]:
    """The features of inputs, of length 1 where asked."""
    features = body(x)
    return unit(features) if normalise else features


def squared_distances(a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
    """‖aᵢ − bⱼ‖² without the (n, m, dim) difference: 0 may come out as a small negative number."""
    return a.square().sum(-1)[:, None] - 2 * a @ b.mT + b.square().sum(-1)


def mask_absent(logits: Float[Tensor, "q way"], present: Bool[Tensor, " way"]) -> Float[Tensor, "q way"]:
    return logits.masked_fill(~present, -torch.inf)
