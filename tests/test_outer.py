"""The outer step: precision, accumulation, schedules, averages, and what a row of the history says."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch import nn

from metafit.data import Sinusoids, Source, TaskSampler
from metafit.data.families import Families
from metafit.errors import BadInput
from metafit.evaluation import evaluate
from metafit.learners import ENTRIES, Learner, build
from metafit.over_tasks import meta_gradient
from metafit.task import Task
from metafit.training import Recipe, load_model, meta_train
from metafit.training.average import Average
from metafit.training.schedule import share_of_rate


@pytest.fixture(scope="module")
def digits() -> Source:
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.float32)
    return Source("digits", x, torch.tensor(data.target), tuple("0123456789"), "vector")


def network(dim: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(dim, 32), nn.ReLU(), nn.Linear(32, 16))


def learner(name: str = "protonet", dim: int = 64) -> Learner:
    return build(name, 16, None if dim == 1 else 5, network(dim))


def train(of: Learner, tasks: Any, validation: Any = None, **options: Any) -> Any:
    return meta_train(of, tasks, validation, show_progress=False, **options)


def distance(a: Learner, b: Learner) -> float:
    ends = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x - y).abs().max()) for x, y in ends)


# -- accumulation


def test_three_batches_to_a_step_are_one_of_three_times_the_size(double: None) -> None:
    """The same tasks, the same weights, the same rows."""
    whole, parts = (build("maml", 8, None, nn.Sequential(nn.Linear(1, 8), nn.Tanh())) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    options: dict[str, Any] = {"steps": 5, "rate": 1e-2, "clip": 0.3, "validate_every": 2}
    one = train(whole, Sinusoids(batch=6), **options).history
    three = train(parts, Sinusoids(batch=2), accumulate=3, **options).history
    assert distance(whole, parts) < 1e-12
    for row, expected in zip(three[1:], one[1:], strict=True):
        for key in ("step", "loss", "gradient_norm", "rate", "clipped"):
            assert row[key] == pytest.approx(expected[key], rel=1e-12), key


def test_families_may_differ_within_a_step(double: None) -> None:
    """The gradient of a step of two batches is the mean of theirs, each by its family's weight, and so are the
    log-variances'; both families are told before the next draw."""
    waves = {"slow": Sinusoids(batch=2), "fast": Sinusoids(batch=2, frequency=(2.0, 3.0))}
    families = next(f for seed in range(9) if (f := Families(waves, "loss", seed=seed)).family(0) != f.family(1))
    drawn = [families.family(0), families.family(1)]
    mine = build("maml", 8, None, nn.Sequential(nn.Linear(1, 8), nn.Tanh()))
    parts = [meta_gradient(mine, families.tasks(2 * i, 2 * i + 2)) for i in (0, 1)]
    expected = sum(torch.cat([g.flatten() for g in part[2].values()]) for part in parts) / 2
    row = train(mine, families, steps=1, accumulate=2, uncertainty=True, clip=None).history[-1]
    assert row["gradient_norm"] == pytest.approx(float(expected.norm()), rel=1e-12)
    assert row["loss"] == pytest.approx(sum(float(part[0]) for part in parts) / 2, rel=1e-12)
    for family, (loss, *_) in zip(drawn, parts, strict=True):
        assert float(families.losses[family]) == pytest.approx(float(loss), rel=1e-12)


# -- schedules


def test_schedules() -> None:
    cosine = [share_of_rate("cosine", i, 10) for i in range(10)]
    linear = [share_of_rate("linear", i, 10) for i in range(10)]
    assert cosine[0] == linear[0] == 1 and cosine[5] == pytest.approx(0.5) and linear[5] == 0.5
    assert cosine == sorted(cosine, reverse=True) and linear[-1] == pytest.approx(0.1)
    warm = [share_of_rate("constant", i, 10, warmup=4) for i in range(10)]
    assert warm == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]


def test_the_rate_of_a_step_is_the_schedules(digits: Source) -> None:
    """AdamW's first step is as long as its rate: at half the warm-up, half as long."""
    ways = []
    for warmup in (1, 2):
        one = learner()
        before = {name: value.clone() for name, value in one.state_dict().items()}
        history = train(one, TaskSampler(digits, batch=2), steps=1, warmup=warmup, schedule="linear").history
        assert history[-1]["rate"] == 1e-3 / warmup
        ways.append(torch.cat([(value - before[name]).flatten() for name, value in one.state_dict().items()]))
    torch.testing.assert_close(ways[0], 2 * ways[1], rtol=1e-3, atol=1e-7)


# -- averages


def test_the_average_is_its_closed_form(double: None) -> None:
    module, decay = nn.Linear(3, 2), 0.8
    average, path = Average(module, decay), []
    for step in range(1, 8):
        for p in module.parameters():
            p.data.normal_()
        path.append(module.weight.detach().clone())
        average.update(step)
        weights = torch.tensor([decay ** (step - i) for i in range(1, step + 1)])
        expected = (weights[:, None, None] * torch.stack(path)).sum(0) / weights.sum()
        torch.testing.assert_close(average.values["weight"], expected)
    with average.in_place():
        torch.testing.assert_close(module.weight.detach(), expected)
    assert torch.equal(module.weight, path[-1])


def test_the_average_is_validated_kept_and_saved(tmp_path: Path) -> None:
    one, path, validation = learner("maml", dim=1), [], Sinusoids(batch=20, seed=1)

    def watched(row: Any) -> None:
        path.append(one.model.body[0].weight.detach().clone())

    options: dict[str, Any] = {"steps": 6, "rate": 1e-2, "validate_every": 1, "ema": 0.5, "validation_tasks": 20}
    training = train(one, Sinusoids(batch=2), watch=[watched], out=tmp_path, recipe=Recipe(), **options)
    halves = 0.5 ** torch.arange(6.0).flip(0)
    expected = (halves[:, None, None] * torch.stack(path[1:])).sum(0) / halves.sum()
    torch.testing.assert_close(one.model.body[0].weight, expected)
    assert training.best_step == 6 and not torch.allclose(path[-1], expected, atol=1e-4)
    assert distance(load_model(tmp_path, network(1)).learner, one) == 0
    looked = train(learner("maml", dim=1), Sinusoids(batch=2), validation, **options).history
    score = evaluate(one, validation, 20, show_progress=False).score[:, -1].mean()
    assert looked[-1]["validation"] == pytest.approx(float(score), abs=2e-6)


# -- precision


def test_bf16_is_close_to_fp32(digits: Source) -> None:
    """After a training on real data: near in weights, near in accuracy, and neither the same."""
    test, learned = TaskSampler(digits, 5, 1, 15, batch=50, seed=9), {}
    fresh = float(evaluate(learner(), test, 100, show_progress=False).score[:, -1].mean())
    for precision in ("fp32", "bf16"):
        learned[precision] = learner()
        row = train(learned[precision], TaskSampler(digits, batch=8), steps=60, rate=3e-3, precision=precision)
        assert "skipped" not in row.history[-1]
    assert 0 < distance(*learned.values()) < 0.05
    full, half = (float(evaluate(one, test, 100, show_progress=False).score[:, -1].mean()) for one in learned.values())
    assert full > fresh + 0.1 and abs(full - half) < 0.01


@pytest.mark.parametrize("name", sorted(name for name, entry in ENTRIES.items() if entry.meta_trained))
def test_every_learner_has_nearly_its_gradient_in_bf16(name: str, digits: Source) -> None:
    if name == "in-context":  # over a network it sorts features, in an order that half precision changes
        one, tasks = build(name, 64, 5), TaskSampler(digits, batch=2).draw(0)
    elif "classification" in ENTRIES[name].tasks:
        one, tasks = learner(name), TaskSampler(digits, batch=2).draw(0)
    else:
        one, tasks = learner(name, dim=1), Sinusoids(batch=2).tasks(0, 2)
    for module in one.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    gradients = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss, _, gradient = meta_gradient(one, tasks, "loop")
        assert loss.dtype == torch.float32 and {g.dtype for g in gradient.values()} == {torch.float32}
        gradients.append(torch.cat([g.flatten() for g in gradient.values()]))
    full, half = gradients
    assert 0 < (full - half).norm() < 0.15 * full.norm()


def half_precision() -> Fabric:
    """fp16 on a processor, from a scale that is too large and soon tries to grow again."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
    return Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu", scaler))


class Interrupted(TaskSampler):
    """Ctrl-C while the training tasks of the sixth step are drawn."""

    def tasks(self, start: int, stop: int) -> Task:
        if start == 5 * self.batch:
            raise KeyboardInterrupt
        return super().tasks(start, stop)


def test_fp16_scales_the_loss_skips_what_overflows_and_resumes(digits: Source, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 12, "rate": 1e-2, "validate_every": 1, "weight_decay": 0.1, "clip": None}
    whole, full, path, tasks = learner(), learner(), [], TaskSampler(digits, batch=2)

    def watched(row: Any) -> None:
        path.append((row["skipped"], whole.body[0].weight.detach().clone()))

    training = train(whole, tasks, fabric=half_precision(), watch=[watched], **options)
    jumps = [row["skipped"] for row in training.history[1:]]
    assert jumps[0] == 1 and 0 in jumps and jumps.index(0) < len(jumps) - jumps[::-1].index(1), "it tried again"
    for (_, before), (jumped, after) in pairwise(path):
        assert torch.equal(before, after) == bool(jumped), "a step that is skipped moves nothing"
    first = jumps.index(0)
    expected = meta_gradient(full, tasks.draw(first))[2]
    norm = float(torch.cat([g.flatten() for g in expected.values()]).norm())
    assert training.history[first + 1]["gradient_norm"] == pytest.approx(norm, rel=0.02), "unscaled"
    with pytest.raises(KeyboardInterrupt):
        train(learner(), Interrupted(digits, batch=2), fabric=half_precision(), out=tmp_path, **options)
    again = learner()
    resumed = train(again, tasks, fabric=half_precision(), out=tmp_path, resume=True, **options)
    assert distance(whole, again) == 0 and [row["skipped"] for row in resumed.history[1:]] == jumps


class Sick(Learner):
    """A finite loss, whose gradient is infinite at any scale."""

    def __init__(self) -> None:
        super().__init__(5)
        self.at_zero = nn.Parameter(torch.zeros(()))

    def loss(self, task: Task) -> tuple[Tensor, dict[str, Tensor]]:
        return self.at_zero.sqrt(), {}


def test_a_gradient_that_no_scale_holds_ends_the_training(digits: Source) -> None:
    with pytest.raises(BadInput, match=r"diverged: .* or take bf16"):
        train(Sick(), TaskSampler(digits, batch=2), steps=60, fabric=half_precision())


def test_what_is_asked_of_precision_and_steps_is_checked_first(digits: Source, tmp_path: Path) -> None:
    one, tasks = learner(), TaskSampler(digits, batch=2)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    double = Fabric(accelerator="cpu", devices=1, precision="64-true")
    for options, message in (
        ({"precision": "half"}, "unknown precision 'half'"),
        ({"precision": "fp32", "fabric": fabric}, "that of the Fabric is 'bf16-mixed'; leave precision out"),
        ({"fabric": double}, "precision '64-true' of the Fabric: choose '32-true'"),
        ({"precision": "bf16", "backend": "compile"}, "generated code is not for torch.bfloat16"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin': did you mean 'cosine'"),
        ({"accumulate": 0}, "accumulate 0: needs at least 1"),
        ({"save_every": 0}, "save_every 0: needs at least 1"),
        ({"ema": 1.0}, "ema 1.0: needs to be between 0 and 1"),
    ):
        with pytest.raises(BadInput, match=message):
            train(one, tasks, steps=2, **options)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="'fp16': it is for GPUs, and there is none; choose 'bf16'"):
            train(one, tasks, precision="fp16")
    train(one, tasks, steps=2, fabric=fabric, out=tmp_path)
    with pytest.raises(BadInput, match="it was trained with precision bf16, not fp32; use the same"):
        train(learner(), tasks, steps=4, out=tmp_path, resume=True)


# -- what a row says


def test_rows_say_what_happened_since_the_last(digits: Source) -> None:
    """Against the same training looked at after every step, by whoever watches."""
    tasks, rows, options = TaskSampler(digits, batch=2), [], {"steps": 6, "rate": 1e-2, "clip": 0.5}
    each = train(learner(), tasks, validate_every=1, watch=[rows.append, lambda row: None], **options).history
    assert rows == each and len(rows) == 7
    assert {row["clipped"] for row in each[1:]} == {0.0, 1.0}
    first, *threes = train(learner(), tasks, validate_every=3, **options).history
    assert first["loss"] is first["gradient_norm"] is first["clipped"] is first["rate"] is None
    for row, part in zip(threes, (each[1:4], each[4:7]), strict=True):
        for key in ("loss", "gradient_norm", "clipped"):
            assert row[key] == pytest.approx(sum(one[key] for one in part) / 3), key
        assert row["rate"] == part[-1]["rate"]
