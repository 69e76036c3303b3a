"""Task families take turns by their weights, and trainings that balance them resume exactly."""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metafit.apps import FewShotClassifier
from metafit.apps.comparing import evaluate_one
from metafit.apps.meta_training import TEST_SEED, train
from metafit.apps.preparing import prepare
from metafit.apps.protocol import Protocol
from metafit.apps.usual import KEPT, usual
from metafit.data import Sinusoids, Source, TaskSampler, packaged
from metafit.data.diversity import UNUSUAL, leverages, likeness, most_diverse, similarities, task_embeddings, vendi
from metafit.data.families import SMOOTHING, Families, domain_sources
from metafit.errors import BadInput
from metafit.evaluation import describe_tasks, evaluate
from metafit.learners import build
from metafit.learners.checks import pad
from metafit.losses import Curriculum, UncertaintyWeights
from metafit.losses.uncertainty import MOST
from metafit.task import Examples, Task, take
from metafit.training import load_model, meta_train
from metafit.training.augment import MLTI, MetaMix, Noise, PermuteLabels

DIM = 8


def blobs(name: str, classes: int = 6, spread: float = 0.3, seed: int = 0) -> Source:
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(classes, 1, DIM, generator=generator)
    x = (middles + spread * torch.randn(classes, 20, DIM, generator=generator)).flatten(0, 1)
    names = tuple(f"{name}{c}" for c in range(classes))
    return Source(name, x, torch.arange(classes).repeat_interleave(20), names, "vector")


def pair(by: Any = "uniform", floor: float = 0.2, seed: int = 0, easy: float = 0.05) -> Families:
    """Classes that are far apart, and classes that overlap."""
    samplers = {
        "easy": TaskSampler(blobs("easy", spread=easy), 3, 2, 5, batch=4),
        "hard": TaskSampler(blobs("hard", spread=2.0, seed=1), 3, 2, 5, batch=4),
    }
    return Families(samplers, by, floor, seed)


# -- the draw


@pytest.mark.parametrize(("by", "expected"), [("uniform", 0.5), ({"easy": 1.0, "hard": 3.0}, 0.1 + 0.8 * 0.75)])
def test_families_come_as_often_as_their_probability_says(by: Any, expected: float) -> None:
    families, draws = pair(by), 2000
    assert float(families.probabilities()[1]) == pytest.approx(expected)
    share = sum(families.family(i) for i in range(draws)) / draws
    assert abs(share - expected) < 5 * (expected * (1 - expected) / draws) ** 0.5
    again, other = pair(by), pair(by, seed=1)
    assert [again.family(i) for i in range(50)] == [families.family(i) for i in range(50)]
    assert [other.family(i) for i in range(50)] != [families.family(i) for i in range(50)]


def test_a_batch_is_the_familys_own() -> None:
    families = pair()
    for batch in range(6):
        drawn, name = families.tasks(4 * batch, 4 * batch + 4), families.names[families.family(batch)]
        own = {"easy": blobs("easy", spread=0.05), "hard": blobs("hard", spread=2.0, seed=1)}[name]
        expected = TaskSampler(own, 3, 2, 5, batch=4).tasks(4 * batch, 4 * batch + 4)
        assert torch.equal(drawn.support.x, expected.support.x) and torch.equal(drawn.query.y, expected.query.y)
        share = families.tasks(4 * batch + 2, 4 * batch + 4)  # of a second rank
        assert torch.equal(share.query.x, drawn.query.x[2:])
    with pytest.raises(BadInput, match="reach over batches of 4"):
        families.tasks(2, 6)


def test_what_is_learned_comes_less_often_and_never_below_the_floor() -> None:
    families = pair("loss", floor=0.2)
    assert families.probabilities().tolist() == [0.5, 0.5], "nothing is known yet"
    seen = families.family(0)
    families.tell([seen], [0.5])
    assert families.probabilities().tolist() == [0.5, 0.5], "a family not yet seen counts as the largest"
    families.tell([1 - seen], [1.5])
    expected = torch.tensor([0.1 + 0.8 * 0.25, 0.1 + 0.8 * 0.75])[[seen, 1 - seen]]
    torch.testing.assert_close(families.probabilities().float(), expected)
    families.losses = torch.tensor([0.5, 1.5], dtype=torch.float64)
    families.tell([1], [9.0])
    assert float(families.losses[1]) == pytest.approx(SMOOTHING * 1.5 + (1 - SMOOTHING) * 9.0)
    families.losses = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert families.probabilities().tolist() == pytest.approx([0.1, 0.9])
    families.losses = torch.zeros(2, dtype=torch.float64)
    assert families.probabilities().tolist() == pytest.approx([0.5, 0.5])


def test_families_say_what_is_wrong_with_them() -> None:
    one = TaskSampler(blobs("a"), 3, 1, 5, batch=4)
    with pytest.raises(BadInput, match="none given"):
        Families({})
    with pytest.raises(BadInput, match="a list given; give samplers by name"):
        Families([one])  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="family 'a': Source given; give a sampler"):
        Families({"a": blobs("a")})  # type: ignore[dict-item]
    with pytest.raises(BadInput, match="batches differ"):
        Families({"a": one, "b": TaskSampler(blobs("b"), 3, 1, 5, batch=2)})
    with pytest.raises(BadInput, match=r"floor 1\.5"):
        Families({"a": one}, floor=1.5)
    with pytest.raises(BadInput, match="by 'size'"):
        Families({"a": one}, by="size")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="weight None of family 'b'"):
        Families({"a": one, "b": one}, by={"a": 1.0})
    with pytest.raises(BadInput, match="has no domains"):
        domain_sources(blobs("a"))


def test_domains_make_families_and_lonely_classes_go_together() -> None:
    source = blobs("a")
    made = domain_sources(Source("a", source.x, source.y, source.classes, "vector", domains=tuple("yxxyzw")))
    assert {name: part.classes for name, part in made.items()} == {
        "x": ("a1", "a2"), "y": ("a0", "a3"), "others": ("a5", "a4"),
    }  # fmt: skip
    made = domain_sources(Source("a", source.x, source.y, source.classes, "vector", domains=tuple("yxxyyz")))
    assert {name: part.classes for name, part in made.items()} == {"x": ("a1", "a2", "a5"), "y": ("a0", "a3", "a4")}
    with pytest.raises(BadInput, match="no domain has two classes"):
        domain_sources(Source("a", source.x, source.y, source.classes, "vector", domains=tuple("abcdef")))


# -- training


def learner() -> Any:
    torch.manual_seed(0)
    return build("anil", DIM, 3, nn.Sequential(nn.Linear(DIM, 16), nn.ReLU(), nn.Linear(16, DIM)), steps=1)


class Stopping(Families):
    """Ctrl-C while the batch of a step is drawn."""

    at: int | None = None

    def tasks(self, start: int, stop: int) -> Task:
        if self.at is not None and start >= self.at * self.batch:
            raise KeyboardInterrupt
        return super().tasks(start, stop)


@pytest.mark.parametrize("uncertainty", [False, True])
def test_a_balanced_and_augmented_training_resumes_to_the_bit(uncertainty: bool, tmp_path: Any) -> None:
    options: dict[str, Any] = {
        "steps": 12,
        "validate_every": 3,
        "uncertainty": uncertainty,
        "augment": [PermuteLabels(3), MLTI(), MetaMix(), Noise(0.1)],
        "show_progress": False,
    }

    def families(at: int | None) -> Stopping:
        made = pair("loss")
        stopping = Stopping(dict(zip(made.names, made._tasks, strict=True)), "loss")
        stopping.at = at
        return stopping

    whole, resumed, tasks = learner(), learner(), families(None)
    meta_train(whole, tasks, out=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        meta_train(learner(), families(7), out=tmp_path / "cut", **options)
    again = families(None)
    meta_train(resumed, again, out=tmp_path / "cut", resume=True, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert torch.equal(tasks.losses, again.losses) and not again.losses.isnan().any()
    with pytest.raises(BadInput, match="balances other task families"):
        meta_train(learner(), pair().__getattribute__("_tasks")[0], out=tmp_path / "cut", resume=True,
                   **{**options, "uncertainty": False})  # fmt: skip


def test_augmentation_is_applied_and_depends_on_seed_and_step_alone() -> None:
    seen: list[torch.Tensor] = []

    def spy(tasks: Task, generator: torch.Generator) -> Task:
        seen.append(torch.rand(3, generator=generator))
        return tasks._replace(query=tasks.query._replace(x=tasks.query.x * 0))

    tasks = TaskSampler(blobs("a"), 3, 2, 5, batch=4)
    for _ in range(2):
        torch.manual_seed(len(seen))
        history = meta_train(learner(), tasks, steps=3, augment=[spy], show_progress=False).history
    first, again = torch.stack(seen).chunk(2)  # the first batch is drawn twice: to plan how to run it, and to run it
    assert torch.equal(first, again) and torch.equal(first[0], first[1])
    assert len({tuple(draw.tolist()) for draw in first[1:]}) == 3
    assert history[-1]["loss"] == pytest.approx(torch.tensor(3.0).log().item(), abs=0.3), "queries without content"


def test_a_harder_family_gets_a_larger_variance_and_so_counts_less(tmp_path: Any) -> None:
    from safetensors.torch import load_file

    families = pair()
    training = meta_train(
        learner(), families, steps=500, rate=1e-2, uncertainty=True, out=tmp_path, show_progress=False
    )
    easy, hard = next(load_file(file)["kept/log_variance"] for file in tmp_path.glob("state-*.safetensors"))
    assert easy < -0.3 and hard > easy + 0.3
    assert float(hard) == pytest.approx(float((2 * families.losses[1]).log()), abs=0.4), "Kendall's optimum, log 2L"
    told = [training.history[-1][f"weight of {name}"] for name in pair().names]
    assert told == pytest.approx([float((-s).exp()) for s in (easy, hard)], abs=1e-5)
    assert [training.history[0][f"weight of {name}"] for name in pair().names] == [1.0, 1.0]
    with pytest.raises(BadInput, match="uncertainty: it weighs families"):
        meta_train(learner(), TaskSampler(blobs("a"), 3), steps=1, uncertainty=True, show_progress=False)


def test_a_family_that_is_learned_does_not_drown_the_others() -> None:
    """Its loss goes to 0, and the best weight without bound."""
    weigh = UncertaintyWeights(2)
    weigh.log_variance.data = torch.tensor([-9.0, 2.0])
    weigh.bound()
    assert weigh.log_variance.tolist() == pytest.approx([-math.log(MOST), 2.0])
    training = meta_train(learner(), pair(easy=0.01), steps=600, rate=1e-2, uncertainty=True, show_progress=False)
    assert training.history[-1]["weight of easy"] == pytest.approx(MOST, rel=1e-5)


def test_a_curriculum_ends_with_all_tasks_at_full_weight() -> None:
    made = learner()
    made.criterion = Curriculum(made.criterion, start=0.5)
    made.advance(0.5)
    assert float(made.criterion.bar) == 1.0
    meta_train(made, TaskSampler(blobs("a"), 3, 2, 5, batch=4), steps=4, show_progress=False)
    assert float(made.criterion.bar) == pytest.approx(0.5 / (1 - 3 / 4)), "told at each step"


def test_a_curriculum_does_not_hide_a_hard_family_from_the_sampler() -> None:
    """The hard family's loss is told as it is, however little it counts for now."""
    families, made = pair(by="loss"), learner()
    made.criterion = Curriculum(made.criterion, start=0.05, temperature=0.05)
    meta_train(made, families, steps=20, show_progress=False)
    easy, hard = families.losses.tolist()
    assert hard > easy > 0


def test_a_log_density_weighs_no_families() -> None:
    families = {name: Sinusoids(shot=5, seed=seed) for seed, name in enumerate(("a", "b"))}
    for by, uncertainty in (("loss", False), ("uniform", True)):
        with pytest.raises(BadInput, match="ConditionalNeuralProcess: its loss, a log-density, goes below 0"):
            drawn = Families(families, by=by)  # type: ignore[arg-type]
            meta_train(build("cnp", 1, None), drawn, steps=1, uncertainty=uncertainty, show_progress=False)


def test_families_of_other_ways_and_small_batches_are_evaluated() -> None:
    wide = {name: TaskSampler(blobs(name), way, 1, 5, batch=4) for name, way in (("three", 3), ("five", 5))}
    families, made = Families(wide), build("centroid", DIM, 5)
    measured = evaluate(made, families, 24)
    assert measured.adapt_ms.shape == (20,) and measured.counted is not None and measured.right is not None
    queries = torch.tensor([(15, 25)[families.family(i // 4)] for i in range(24)])
    assert torch.equal(measured.counted.sum(1), queries) and set(queries.tolist()) == {15, 25}
    shares = (measured.right & measured.counted).sum(1) / queries
    torch.testing.assert_close(shares, measured.score[:, -1])


def test_families_know_nothing_of_another_training() -> None:
    families = pair(by="loss")
    first, again = (meta_train(learner(), families, steps=6, show_progress=False).history[-1]["loss"] for _ in range(2))
    assert first == again


# -- diversity


def test_tasks_that_no_feature_tells_apart_are_all_alike() -> None:
    """With one feature, of length 1, there is nothing to tell classes apart by but its sign."""
    embedded = task_embeddings(Sinusoids(shot=5, seed=0, batch=30).tasks(0, 30))
    torch.testing.assert_close(similarities(embedded).diagonal(), torch.ones(30, dtype=torch.float64))
    assert vendi(similarities(embedded)) == pytest.approx(1.0)


def batch(tasks: int = 5, classes: int = 3) -> Task:
    return TaskSampler(blobs("a"), classes, (1, 3), 4, batch=tasks).draw(0)


def test_task_embeddings_are_the_fisher_information_of_a_gate_on_each_feature() -> None:
    """Against the definition: squared gradients of log p by automatic differentiation, averaged over p."""
    tasks, temperature = batch(), 0.1
    for t in range(5):
        one = take(tasks, t)
        here = torch.cat([part.weight for part in one]) > 0
        x = F.normalize(torch.cat([part.x for part in one])[here].double(), dim=-1)
        y = torch.cat([part.y for part in one])[here]
        means = F.normalize(torch.stack([x[y == c].mean(0) for c in range(3)]), dim=-1)

        def log_p(gate: torch.Tensor, row: torch.Tensor, means: torch.Tensor = means) -> torch.Tensor:
            return F.log_softmax((row * gate) @ means.T / temperature, -1)

        fisher = torch.zeros(DIM, dtype=torch.float64)
        for row in x:
            slopes = torch.func.jacrev(log_p)(torch.ones(DIM, dtype=torch.float64), row)
            fisher += (log_p(torch.ones(DIM, dtype=torch.float64), row).exp()[:, None] * slopes.square()).sum(0)
        torch.testing.assert_close(task_embeddings(tasks)[t], F.normalize(fisher, dim=0), rtol=1e-6, atol=1e-9)


def test_padding_is_not_seen_in_a_regression() -> None:
    def examples(seed: int) -> Examples:
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(2, 6, d, generator=generator, dtype=torch.float64) for d in (DIM, 1))
        return Examples(x, y + 3)

    tasks = Task(examples(0), examples(1))
    padded = Task(*(pad(part, None) for part in tasks))
    torch.testing.assert_close(task_embeddings(padded), task_embeddings(tasks))


def test_a_task_is_most_like_itself_with_other_examples_or_other_numbers() -> None:
    tasks = batch()
    turned = Task(*(part._replace(y=2 - part.y) for part in tasks))
    torch.testing.assert_close(task_embeddings(tasks), task_embeddings(turned))
    drawn = task_embeddings(TaskSampler(blobs("a", classes=3), 3, 5, 5, batch=2).draw(0))
    others = task_embeddings(TaskSampler(blobs("b", classes=3, seed=5), 3, 5, 5, batch=2).draw(0))
    assert similarities(drawn)[0, 1] > (drawn @ others.T).max() + 0.1
    with pytest.raises(BadInput, match="one tensor of numbers"):
        task_embeddings(Task(*(part._replace(x=part.y) for part in tasks)))


def test_vendi_counts_groups() -> None:
    """Groups of identical tasks, orthogonal to each other: the exponential of the entropy of their shares."""
    sizes = torch.tensor([1, 2, 5])
    rows = torch.eye(3)[torch.arange(3).repeat_interleave(sizes)]
    shares = sizes / 8
    assert vendi(similarities(rows)) == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-6)


def kernel(items: int = 6, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(items, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return similarities(rows)


def test_leverages_are_the_marginals_of_a_determinantal_process() -> None:
    """Against the sum over all subsets."""
    k, ridge = kernel(), 0.3
    likely, total = torch.zeros(6, dtype=torch.float64), 0.0
    for size in range(7):
        for chosen in itertools.combinations(range(6), size):
            weight = float(torch.linalg.det((k / ridge)[list(chosen)][:, list(chosen)])) if chosen else 1.0
            total += weight
            likely[list(chosen)] += weight
    torch.testing.assert_close(leverages(k, ridge), likely / total)


def test_the_most_diverse_tasks_enlarge_the_determinant_greedily() -> None:
    k = kernel() + 0.05 * torch.eye(6, dtype=torch.float64)
    chosen: list[int] = []
    for _ in range(4):
        rest = [i for i in range(6) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(torch.linalg.det(k[[*chosen, i]][:, [*chosen, i]]))))
    assert most_diverse(k, 4) == chosen
    with pytest.raises(BadInput, match="k 7"):
        most_diverse(k, 7)


def test_new_tasks_are_ranked_by_how_near_the_known_ones_are() -> None:
    known = F.normalize(torch.tensor([[1.0, 0.02, 0], [1.0, 0, 0.1], [1.0, 0.2, 0], [1.0, 0, 0]]), dim=-1)
    new = torch.tensor([[1.0, 0.01, 0], [0.0, 0.0, 1.0]])
    alike = likeness(new, known)
    assert alike["rank"].tolist() == [1.0, 0.0]
    assert alike["nearest"] == pytest.approx(float((F.normalize(new, dim=-1) @ known.T).max(1).values.mean()))
    told = describe_tasks(known, new)
    assert told["unlike"] == 0.5 and told["tasks"] == 4 and 1 < told["effective"] < 1.2


def test_a_model_knows_a_task_that_is_unlike_those_it_was_trained_on(tmp_path: Any) -> None:
    """Classes that differ in the columns that told the training classes apart, or in others."""
    generator = torch.Generator().manual_seed(0)

    def source(columns: slice, seed: int, classes: int = 20) -> Source:
        made = blobs("a", classes, seed=seed)
        x = 0.05 * torch.randn(len(made.x), 40, generator=generator)
        x[:, columns] += made.x
        return made.with_x(x, "vector")

    prepared = prepare(source(slice(0, DIM), 0), None)
    train(prepared, "protonet", Protocol(3, 3, 5, steps=5), tmp_path, show_progress=False)
    found = []
    for columns in (slice(0, DIM), slice(20, 20 + DIM)):
        new = source(columns, 7, 3)
        found.append(FewShotClassifier(model=tmp_path).fit(new.x.numpy()[::4], new.y.numpy()[::4]).usual_)
    assert found[0] > found[1] + 0.3


def test_the_report_of_other_data_is_of_the_tasks_that_the_model_was_trained_with(tmp_path: Any) -> None:
    digits = packaged.load("digits")
    digits = digits.with_x(digits.x.flatten(1) / 255 * 8, "vector")
    other = replace(digits, name="other", classes=tuple(f"other {name}" for name in digits.classes))
    protocol = Protocol(2, 3, 5, episodes=4, steps=5)
    train(prepare(digits, None), "protonet", protocol, tmp_path, show_progress=False)
    own, made = (evaluate_one(source, tmp_path, None, protocol) for source in (digits, other))
    assert set(own["source"]["classes"]) == {"train", "validation", "test"}
    assert list(made["source"]["classes"]) == ["test"]
    model, tasks = load_model(tmp_path), TaskSampler(prepare(other, None).splits.test, 2, 3, 5, seed=TEST_SEED)
    supports = tasks.tasks(0, KEPT).support
    ranks = torch.tensor([usual(take(supports, t), model.tasks, model.learner) for t in range(KEPT)])
    assert made["diversity"]["tasks"] == KEPT
    assert made["diversity"]["unlike"] == pytest.approx(float((ranks < UNUSUAL).double().mean()))


def test_a_model_whose_network_was_trained_knows_so_too(tmp_path: Any) -> None:
    """In the features of its own network: a training task is as usual as can be, one of noise less than others."""
    digits = packaged.load("digits")
    prepared = prepare(digits, "conv4")
    train(prepared, "protonet", Protocol(3, 3, 5, steps=20), tmp_path, show_progress=False)
    model = load_model(tmp_path)
    assert model.tasks is not None and model.tasks.shape == (KEPT, prepared.dim)
    drawn = TaskSampler(prepared.splits.train, (2, 5), 3, 1).tasks(0, KEPT)
    assert usual(take(drawn.support, 7), model.tasks, model.learner) == 1.0
    rows = torch.cat([(digits.y == c).nonzero()[:3, 0] for c in range(3)])
    noise = torch.randint(256, digits.x[rows].shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    few = FewShotClassifier(model=model).fit(noise.numpy(), digits.y[rows].numpy())
    others = TaskSampler(prepared.splits.train, 3, 3, 1, seed=5).tasks(0, 10).support
    alike = [usual(take(others, t), model.tasks, model.learner) for t in range(10)]
    assert few.usual_ is not None and few.usual_ < sum(alike) / 10 - 0.2


@pytest.mark.slow
def test_tasks_of_a_domain_are_more_alike_than_others() -> None:
    """Real texts: 3-way tasks of CLINC150's ten domains, in MiniLM: the nearest other task is of the same domain."""
    root = os.environ.get("METAFIT_DATA")
    if root is None:
        pytest.skip("METAFIT_DATA names no benchmark data")
    from metafit.backbones import load
    from metafit.data import from_arrays
    from metafit.data.features import features

    rows = json.loads(Path(root, "text", "clinc150_full.json").read_text())["test"]
    domains = json.loads(Path(root, "text", "clinc150_domains.json").read_text())
    of = {intent: domain for domain, intents in domains.items() for intent in intents}
    source = features(from_arrays(*map(list, zip(*rows, strict=True))), load("minilm-l6"), progress=False)
    parts = domain_sources(replace(source, domains=tuple(of[name] for name in source.classes)))
    drawn = [task_embeddings(TaskSampler(part, 3, 5, 5, batch=20).draw(0)) for part in parts.values()]
    domain = torch.arange(len(drawn)).repeat_interleave(20)
    nearest = similarities(torch.cat(drawn)).fill_diagonal_(-1).argmax(1)
    assert float((domain[nearest] == domain).double().mean()) > 0.8


def test_a_task_without_weights_counts_every_example() -> None:
    tasks = TaskSampler(blobs("a"), 3, 2, 4, batch=3).draw(0)
    bare = Task(*(Examples(part.x, part.y) for part in tasks))
    torch.testing.assert_close(task_embeddings(bare), task_embeddings(tasks))
