"""Meta-training learns, stops, resumes to the bit, and leaves nothing half-written."""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metafit.data import Sinusoids, Source, Splits, TaskSampler
from metafit.errors import BadInput
from metafit.evaluation import evaluate
from metafit.learners import GradientLearner, Learner, build
from metafit.over_tasks import Plan
from metafit.task import Task
from metafit.training import Recipe, load_model, meta_train, pretrain, save_model


@pytest.fixture(scope="module")
def digits() -> Splits:
    """Scikit-learn's handwritten digits, turned by 0, 90, 180 and 270 degrees: 40 classes, 10 of them to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, digit = torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor(data.target)
    x = torch.cat([images.rot90(turns, (1, 2)) for turns in range(4)]).flatten(1)
    y = torch.cat([digit * 4 + turns for turns in range(4)])
    names = tuple(f"{digit} turned {turns}" for digit in range(10) for turns in range(4))
    return Source("digits", x, y, names, "vector").split()


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


def accuracy(learner: Learner, source: Source) -> float:
    tasks = TaskSampler(source, 5, 1, 15, batch=50, seed=9)
    return float(evaluate(learner, tasks, 200, show_progress=False).score[:, -1].mean())


def train(learner: Learner, tasks: Any, validation: Any = None, **options: Any) -> Any:
    return meta_train(learner, tasks, validation, show_progress=False, **options)


@pytest.mark.parametrize(("name", "margin"), [("protonet", 0.02), ("maml", 0.10), ("anil", 0.10), ("meta-sgd", 0.10)])
def test_meta_training_helps_on_unseen_digits(name: str, margin: float, digits: Splits) -> None:
    """One example each of five classes that training has not seen; accuracy over 200 tasks."""
    torch.manual_seed(0)
    learner = build(name, 32, 5, network(), **({"steps": 3} if name != "protonet" else {}))
    before = accuracy(learner, digits.test)
    training = train(learner, TaskSampler(digits.train, 5, 1, 10, batch=8), steps=150, rate=3e-3)
    assert accuracy(learner, digits.test) > before + margin
    assert training.history[-1]["loss"] < 0.7 * training.history[1]["loss"] and training.stopped == "steps"


def test_meta_training_helps_on_sinusoids() -> None:
    torch.manual_seed(0)
    learner = build("maml", 40, None, nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh()))
    test = Sinusoids(shot=10, seed=5)
    before = evaluate(learner, test, 100, show_progress=False)
    train(learner, Sinusoids(shot=10), steps=300, rate=1e-2)
    after = evaluate(learner, test, 100, show_progress=False)
    assert after.score[:, -1].mean() < 0.6 * before.score[:, -1].mean()
    assert after.score[:, -1].mean() < 0.8 * after.score[:, 0].mean(), "the step itself helps"


def test_pretraining_helps(digits: Splits) -> None:
    body = network()
    losses = pretrain(body, digits.train, 32, steps=200, rate=3e-3, show_progress=False)
    assert len(losses) == 200 and sum(losses[-20:]) < 0.2 * sum(losses[:20])
    trained, fresh = (build("centroid", 32, 5, b) for b in (body, network()))
    assert accuracy(trained, digits.test) > accuracy(fresh, digits.test) + 0.02
    with pytest.raises(BadInput, match="no parameter that requires a gradient"):
        pretrain(body.requires_grad_(False), digits.train, 32, steps=3, show_progress=False)
    with pytest.raises(BadInput, match="holds raw text"):
        pretrain(body, Source("words", ["a", "b"], torch.tensor([0, 1]), ("x", "y"), "text"), 32, show_progress=False)


# -- resuming


class Interrupted(TaskSampler):
    """Ctrl-C while the training tasks of a step are drawn."""

    def __init__(self, source: Source, at: int, **options: Any):
        super().__init__(source, **options)
        self.at = at

    def tasks(self, start: int, stop: int) -> Task:
        if start == self.at * self.batch:
            raise KeyboardInterrupt
        return super().tasks(start, stop)


def dropping() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 32))


def histories(training: Any) -> list[Any]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in training.history]


@pytest.mark.parametrize("at", [3, 5, 6, 13])
@pytest.mark.parametrize("validated", [True, False])
def test_resuming_is_exact(at: int, validated: bool, digits: Splits, tmp_path: Path) -> None:
    """Interrupted at a step and resumed, a run ends in the bits of one that was not; dropout included."""
    options: dict[str, Any] = {"way": 2, "shot": 1, "query": 5, "batch": 4}
    validation = TaskSampler(digits.validation, **options) if validated else None
    run: dict[str, Any] = {"steps": 14, "rate": 1e-2, "validate_every": 3, "validation_tasks": 10, "weight_decay": 0.01}

    def learner() -> Learner:
        return build("anil", 32, 2, dropping(), steps=2)

    whole = learner()
    torch.manual_seed(1)
    expected = train(whole, TaskSampler(digits.train, **options), validation, **run)
    part = learner()
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        train(part, Interrupted(digits.train, at, **options), validation, out=tmp_path, **run)
    resumed = learner()
    torch.manual_seed(999)
    training = train(resumed, TaskSampler(digits.train, **options), validation, out=tmp_path, resume=True, **run)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    assert histories(training) == histories(expected)
    assert (training.best, training.best_step) == (expected.best, expected.best_step)
    # resuming what has ended changes nothing
    ended = learner()
    again = train(ended, TaskSampler(digits.train, **options), validation, out=tmp_path, resume=True, **run)
    assert all(torch.equal(value, ended.state_dict()[key]) for key, value in whole.state_dict().items())
    assert histories(again) == histories(expected)


def test_resuming_nothing_starts_afresh(digits: Splits, tmp_path: Path) -> None:
    training = train(build("anil", 32, 2, network()), TaskSampler(digits.train, 2), steps=2, out=tmp_path, resume=True)
    assert training.history[-1]["step"] == 2


def test_resuming_something_else_is_named(digits: Splits, tmp_path: Path) -> None:
    tasks = TaskSampler(digits.train, 2)
    train(build("meta-sgd", 32, 2, network(), rate=(0.1, 0.2)), tasks, steps=2, out=tmp_path)
    resume: dict[str, Any] = {"steps": 4, "out": tmp_path, "resume": True}
    train(build("meta-sgd", 32, 2, network(), rate=(0.1, 0.2)), tasks, **resume)  # options with a tuple
    with pytest.raises(BadInput, match=r"cannot resume from .*: it trains .*meta-sgd.*use the same learner"):
        train(build("maml", 32, 2, network()), tasks, **resume)
    with pytest.raises(BadInput, match="network of other shapes"):
        train(build("meta-sgd", 32, 2, nn.Linear(64, 32), rate=(0.1, 0.2)), tasks, **resume)


def test_resuming_on_other_data_is_named(digits: Splits, tmp_path: Path) -> None:
    def go_on(steps: int, name: str, **protocol: Any) -> int:
        recipe = Recipe(source={"name": name}, training={"shot": (1, 2), "steps": steps, **protocol})
        learner, tasks = build("anil", 32, 2, network()), TaskSampler(digits.train, 2)
        return train(learner, tasks, steps=steps, out=tmp_path, recipe=recipe, resume=True).history[-1]["step"]

    assert go_on(2, "digits") == 2
    assert go_on(4, "digits") == 4, "more steps are no other protocol"
    for other in ({"name": "letters"}, {"name": "digits", "shot": 5}):
        with pytest.raises(BadInput, match="other data, or by another protocol"):
            go_on(6, **other)


# -- the best, patience, errors


class Scripted(TaskSampler):
    """Validation tasks whose labels are wrong in some share that changes look by look."""

    def __init__(self, source: Source, wrong: list[float], **options: Any):
        super().__init__(source, **options)
        self.wrong: Iterator[float] = iter(wrong)

    def tasks(self, start: int, stop: int) -> Task:
        task, share = super().tasks(start, stop), next(self.wrong)
        swap = torch.arange(task.query.y.shape[1]) < round(share * task.query.y.shape[1])
        return task._replace(query=task.query._replace(y=torch.where(swap, 1 - task.query.y, task.query.y)))


@pytest.mark.parametrize(("patience", "sure"), [(None, 40), (3, 6)])
def test_compiling_is_weighed_against_the_steps_that_are_sure(
    patience: int | None, sure: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def plan_for(*args: Any, steps: int) -> Plan:
        told.append(steps)
        return Plan()

    monkeypatch.setattr(sys.modules["metafit.training.meta_train"], "plan_for", plan_for)
    learner, tasks = build("anil", 1, None), Sinusoids(batch=2)
    meta_train(learner, tasks, Sinusoids(batch=2), steps=40, validate_every=2, validation_tasks=2, patience=patience)
    assert told == [sure]


def test_the_best_is_kept_and_patience_ends(digits: Splits, tmp_path: Path) -> None:
    seen: dict[int, dict[str, Tensor]] = {}
    learner = build("anil", 32, 2, network())
    validation = Scripted(digits.validation, [0.9, 0.5, 0.0, 0.6, 0.7, 0.8, 0.8, 0.8], way=2, batch=10)

    class Watched(TaskSampler):
        def tasks(self, start: int, stop: int) -> Task:
            seen[start // self.batch] = {name: value.clone() for name, value in learner.state_dict().items()}
            return super().tasks(start, stop)

    options: dict[str, Any] = {"steps": 20, "rate": 1e-2, "validate_every": 1, "validation_tasks": 10, "patience": 3}
    training = train(learner, Watched(digits.train, 2), validation, out=tmp_path, recipe=Recipe(), **options)
    assert training.stopped == "patience" and training.best_step == 2 and len(training.history) == 6
    assert training.best == training.history[2]["validation"] == max(r["validation"] for r in training.history)
    for state in (learner.state_dict(), load_model(tmp_path, network()).learner.state_dict()):
        assert all(torch.equal(value, state[name]) for name, value in seen[2].items())
    again = train(
        build("anil", 32, 2, network()), Watched(digits.train, 2), validation, out=tmp_path, resume=True, **options
    )
    assert again.stopped == "patience" and len(again.history) == 6, "patience that has run out stays so"


def test_ctrl_c_leaves_the_best_so_far(digits: Splits, tmp_path: Path) -> None:
    learner = build("anil", 32, 2, network())
    options: dict[str, Any] = {"steps": 20, "rate": 1e-2, "validate_every": 4, "out": tmp_path, "recipe": Recipe()}
    with pytest.raises(KeyboardInterrupt):
        train(learner, Interrupted(digits.train, 6, way=2), **options)
    saved = load_model(tmp_path, network())
    assert all(torch.equal(value, saved.learner.state_dict()[name]) for name, value in learner.state_dict().items())
    assert saved.history[-1]["step"] == 4


def test_a_run_that_diverges_says_so(digits: Splits) -> None:
    learner = build("maml", 1, None, nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1)), rate=1e6, steps=5)
    with pytest.raises(BadInput, match=r"meta-training diverged: .*lower the rate"):
        train(learner, Sinusoids(batch=2), steps=5)
    with pytest.raises(BadInput, match="diverged: the validation error"):
        train(learner, Sinusoids(batch=2), Sinusoids(seed=1, batch=2), steps=5, validation_tasks=4)


def test_errors(digits: Splits, tmp_path: Path) -> None:
    tasks = TaskSampler(digits.train, 2)
    with pytest.raises(BadInput, match="PrototypeLearner has no meta-parameters to train"):
        train(build("centroid", 64, 2), tasks)
    with pytest.raises(BadInput, match="steps 0: needs at least 1"):
        train(build("maml", 64, 2), tasks, steps=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="it is a file"):
        train(build("maml", 64, 2), tasks, steps=1, out=tmp_path / "file")
    with pytest.raises(BadInput, match="GradientLearner is not of the catalogue"):
        train(GradientLearner(nn.Linear(64, 4), nn.Linear(4, 2), 2), tasks, out=tmp_path, recipe=Recipe())


def test_a_read_only_folder_is_named_before_the_work(
    digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("metafit.disk.tempfile.TemporaryFile", refuse)  # root, as in containers, writes anywhere
    with pytest.raises(BadInput, match="the folder is read-only"):
        train(build("maml", 64, 2), Interrupted(digits.train, 0, way=2), steps=1, out=tmp_path / "model")


def test_mode_and_gradients_after_training(digits: Splits) -> None:
    body = network()
    body[0].requires_grad_(False)
    frozen = body[0].weight.clone()
    train(build("protonet", 32, 2, body), TaskSampler(digits.train, 2), steps=3, rate=1e-2, weight_decay=0.1)
    assert torch.equal(body[0].weight, frozen)


# -- model folders


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist; check the path"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"is not a metafit model \(no readable model.json\)"):
        load_model(tmp_path)
    for content in ("{", "[]", '{"schema": "one"}', "\xff"):
        (tmp_path / "model.json").write_text(content, encoding="latin-1")
        with pytest.raises(BadInput, match="is not a metafit model"):
            load_model(tmp_path)


def test_folders_that_are_damaged_or_newer(tmp_path: Path) -> None:
    save_model(tmp_path, build("maml", 4, 2), Recipe())
    index = tmp_path / "model.json"
    about = json.loads(index.read_text())
    weights = tmp_path / about["weights"]
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BadInput, match="weights are missing or damaged"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(BadInput, match="weights are missing or damaged"):
        load_model(tmp_path)
    index.write_text(json.dumps({**about, "schema": 2}))
    with pytest.raises(BadInput, match="has schema 2, this metafit reads up to 1; upgrade"):
        load_model(tmp_path)
    index.write_text(json.dumps({**about, "kind": "agent"}))
    with pytest.raises(BadInput, match="holds a 'agent', a 'learner' is needed"):
        load_model(tmp_path)


def test_saving_again_leaves_one_model(tmp_path: Path) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        learner = build("maml", 4, 2)
        save_model(tmp_path, learner, Recipe(), [{"step": seed}])
    assert len(list(tmp_path.iterdir())) == 2
    model = load_model(tmp_path)
    assert model.history == [{"step": 2}]
    assert torch.equal(model.learner.state_dict()["model.head.weight"], learner.state_dict()["model.head.weight"])


def test_bodies_of_ones_own(tmp_path: Path) -> None:
    tied = nn.Linear(4, 4)
    save_model(tmp_path, build("protonet", 4, 2, nn.Sequential(tied, nn.Tanh(), tied)), Recipe(trained=True))
    with pytest.raises(BadInput, match="made with a network of your own; pass it as body="):
        load_model(tmp_path)
    with pytest.raises(BadInput, match="weights do not fit the network that body= gives"):
        load_model(tmp_path, nn.Linear(4, 4))
    other = nn.Linear(4, 4)
    model = load_model(tmp_path, nn.Sequential(other, nn.Tanh(), other))
    assert torch.equal(other.weight, tied.weight) and not model.learner.training
    with pytest.raises(BadInput, match="GradientLearner cannot be saved: it is not of the catalogue"):
        save_model(tmp_path, GradientLearner(nn.Linear(4, 4), nn.Linear(4, 2), 2), Recipe())


def test_training_stops_by_its_clock_and_goes_on_from_what_it_counted(tmp_path: Path) -> None:
    def run(seconds: float, resume: bool = True) -> int:
        ticks = itertools.count()  # each look at the clock takes a second
        learner = build("maml", 8, None, nn.Linear(1, 8))
        training = meta_train(
            learner, Sinusoids(batch=2), steps=200, seconds=seconds, clock=lambda: float(next(ticks)), out=tmp_path,
            resume=resume, show_progress=False,
        )  # fmt: skip
        assert training.stopped == "seconds"
        assert training.history[-1]["seconds"] == pytest.approx(seconds, abs=5)
        return int(training.history[-1]["step"])

    first = run(20, resume=False)
    assert 5 < first < 30
    assert run(20) <= first + 1
    assert first + 5 < run(40) < 60
