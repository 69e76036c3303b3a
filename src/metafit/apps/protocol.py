"""What a comparison does: the tasks, the training, the test."""

from __future__ import annotations

from dataclasses import dataclass, replace

from metafit.apps.tasks import Balance
from metafit.apps.unsupervised import WAYS, Unsupervised
from metafit.data import Splits
from metafit.data.sampler import Range
from metafit.errors import BadInput
from metafit.training.meta_train import Precision, check_outer
from metafit.training.schedule import Schedule


@dataclass(frozen=True)
class Protocol:
    """What a comparison does.

    Attributes:
        way: classes a task, a range as (least, most); ``None`` is 5, or as many as the data has.
        shot: support examples a class, or a range.
        query: query examples a class, where the data has them.
        episodes: test tasks.
        steps, rate: outer steps of meta-training, and their rate; ``None`` is the learner's default.
        seed: of the class split, the tasks and the initialisation.
        patience: looks at the validation tasks (20 a training) without a better figure before training stops.
        augment: names of ``training.augment.AUGMENTS``, applied to the training tasks in this order.
        balance: how training tasks are drawn from the domains of the data (``apps.tasks.balanced``); where ``None``,
            a task's classes are of any domain.
        unsupervised: what makes the training tasks without labels (``apps.unsupervised``), of which all steps are
            taken and the last is kept; where ``None`` they are of the labelled classes.
        precision, accumulate, ema, schedule: of ``meta_train``.
        train_way: classes of a training task, for metric learners, which may train on more of them than they are asked
            for (``wide_task``); the learner's default where ``None``.
        batch: training tasks of an outer step; the learner's default where ``None``.

    Raises:
        BadInput: domains to balance, or classes a training task, and no labels; fewer than 2 of these; or an option of
            ``meta_train`` out of range.
    """

    way: Range | None = 5
    shot: Range = 1
    query: int = 15
    episodes: int = 600
    steps: int | None = None
    seed: int = 0
    patience: int | None = 8
    augment: tuple[str, ...] = ()
    balance: Balance | None = None
    unsupervised: Unsupervised | None = None
    rate: float | None = None
    precision: Precision | None = None
    accumulate: int = 1
    ema: float | None = None
    schedule: Schedule = "cosine"
    train_way: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise BadInput(f"batch {self.batch}: needs at least 1 task")
        if self.train_way is not None and self.train_way < 2:
            raise BadInput(f"train_way {self.train_way}: a task to learn from has 2 classes or more")
        check_outer(self.precision, self.accumulate, self.ema, self.schedule)
        if self.unsupervised is not None and self.balance is not None:
            raise BadInput("unsupervised: domains are of labelled classes; leave the balance out")
        if self.unsupervised is not None and self.train_way is not None:
            raise BadInput(f"unsupervised: its tasks have {WAYS} classes; leave train_way out")

    @property
    def ways(self) -> Range:
        """The ways, once ``over`` has told them."""
        if self.way is None:
            raise BadInput("way: name the classes a task, or take the protocol over the data first")
        return self.way

    @property
    def most_ways(self) -> int:
        return self.ways if isinstance(self.ways, int) else self.ways[1]

    @property
    def most_shots(self) -> int:
        return self.shot if isinstance(self.shot, int) else self.shot[1]

    def over(self, splits: Splits) -> Protocol:
        """The protocol on these classes: 5 ways where none are named, fewer where there are fewer classes."""
        if self.way is not None:
            return self
        return replace(self, way=min(5, len(splits.train.classes), len(splits.test.classes)))
