"""The tasks that metric learners train on: more classes than in the test, as many examples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from metafit import backbones
from metafit.apps import meta_training
from metafit.apps.comparing import compare_learners
from metafit.apps.meta_training import outer_loop, train
from metafit.apps.preparing import prepare
from metafit.apps.protocol import Protocol
from metafit.data import Source, TaskSampler
from metafit.errors import BadInput
from metafit.training import Recipe


def blobs(classes: int) -> Source:
    """Twenty examples a class, which are 8 numbers around their class's own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(classes, 1, 8, generator=generator) + 0.3 * torch.randn(classes, 20, 8, generator=generator)
    names = tuple(f"class {c}" for c in range(classes))
    return Source("blobs", x.flatten(0, 1), torch.arange(classes).repeat_interleave(20), names, "vector")


@pytest.mark.parametrize(
    ("name", "shot", "train_way", "task"),
    [
        ("protonet", 1, None, (50, 5)),
        ("protonet", 1, 25, (25, 11)),  # of 300 examples, as 50 classes of 6
        ("protonet", 1, 1000, (60, 4)),
        ("protonet", 9, 1000, (60, 2)),  # of 660, as 50 classes of 14 are 700
        ("protonet", 5, None, (50, 5)),
        ("metaopt", 1, None, (50, 5)),
        ("metaopt", 5, None, (20, 5)),  # what its solution can afford
        ("metaopt", 5, 20, (20, 5)),
        ("metaopt", 5, 1000, (20, 5)),
    ],
)
def test_a_training_task_has_about_as_many_examples_for_any_number_of_classes(
    name: str, shot: int, train_way: int | None, task: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, drawn = prepare(blobs(100), None), []
    assert len(prepared.splits.train.classes) == 60

    def spied(*settings: Any) -> TaskSampler:
        drawn.append(settings[1:4])
        return TaskSampler(*settings)

    monkeypatch.setattr(meta_training, "TaskSampler", spied)
    train(prepared, name, Protocol(5, shot, 2, steps=1, train_way=train_way), show_progress=False)
    assert drawn[0] == (task[0], shot, task[1])


@pytest.mark.parametrize(("way", "train_way"), [(5, 2), (60, None)])
def test_training_tasks_may_have_fewer_classes_than_the_test(way: int, train_way: int | None) -> None:
    prepared = prepare(blobs(200), None)
    learner, _ = train(prepared, "protonet", Protocol(way, 1, 2, steps=2, train_way=train_way), show_progress=False)
    assert learner.way == way


def test_the_outer_rate_is_of_the_learner_and_of_what_it_trains() -> None:
    columns = prepare(blobs(10), None)
    pictures = replace(columns, body=backbones.load("conv4"))
    for prepared, name, rate in (
        (columns, "protonet", 1e-3),
        (columns, "in-context", 3e-4),
        (columns, "maml", 1e-3),
        (replace(columns, recipe=Recipe("minilm-l6")), "protonet", 3e-4),
        (pictures, "protonet", 3e-3),
        (pictures, "maml", 1e-3),
        (replace(columns, body=backbones.load("mlp", columns=8)), "protonet", 1e-3),
    ):
        assert outer_loop(prepared, name, Protocol(), {})[1] == rate, (prepared.body, name)
    assert outer_loop(pictures, "protonet", Protocol(rate=0.1), {})[1] == 0.1


def test_classes_of_a_training_task_are_refused_where_they_are_of_no_use() -> None:
    prepared = prepare(blobs(50), None)
    with pytest.raises(BadInput, match="train_way 60: maml does not train on more classes"):
        train(prepared, "maml", Protocol(5, 1, 2, steps=1, train_way=60), show_progress=False)
    with pytest.raises(BadInput, match="train_way 60: none of maml, linear train on more"):
        compare_learners(prepared, ["maml"], Protocol(5, 1, 2, train_way=60), baselines=["linear"])
    with pytest.raises(BadInput, match="train_way 1: a task to learn from has 2 classes"):
        Protocol(5, train_way=1)
    with pytest.raises(BadInput, match="unsupervised: its tasks have 20 classes; leave train_way out"):
        Protocol(5, train_way=9, unsupervised="umtra")
