"""Pretraining: its losses, what it gains, resuming to the bit, and the folder that it leaves."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metafit import backbones
from metafit.apps.preparing import prepare
from metafit.apps.pretraining import METHODS, pretrain_backbone
from metafit.backbones import Backbone
from metafit.backbones.saved import save
from metafit.data import Source, TaskSampler, packaged
from metafit.data.features import features
from metafit.errors import BadInput
from metafit.evaluation import evaluate
from metafit.learners import build
from metafit.learners.heads import CosineHead
from metafit.training import pretrain, pretrain_alike, pretrain_denoising
from metafit.training.descend import inputs
from metafit.training.distil import aligned, alike, distil, squared
from metafit.training.pretrain import blended


def rows(classes: int = 6, each: int = 20) -> Source:
    """Vectors around the corners of a cube."""
    y = torch.arange(classes).repeat_interleave(each)
    x = 3 * torch.eye(classes, 8)[y] + torch.randn(len(y), 8, generator=torch.Generator().manual_seed(0))
    return Source("rows", x, y, tuple(f"class {c}" for c in range(classes)), "vector")


def dropping() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 8))


# -- losses, against plain loops in double precision


def cross_entropy(logits: list[float], target: int) -> float:
    return math.log(sum(math.exp(v) for v in logits)) - logits[target]


def test_mixup_is_the_loss_of_mixed_examples_under_both_labels(double: None) -> None:
    x, y, share = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0]), 0.7
    body, top = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 3)
    total = 0.0
    for i in range(5):
        j = i - 1  # the one before; the first is mixed with the last
        logits = top(body((share * x[i] + (1 - share) * x[j])[None]))[0].tolist()
        total += share * cross_entropy(logits, int(y[i])) + (1 - share) * cross_entropy(logits, int(y[j]))
    assert blended(body, top, x, y, share).item() == pytest.approx(total / 5, rel=1e-12)
    whole = nn.functional.cross_entropy(top(body(x)), y)
    assert blended(body, top, x, y, 1.0).item() == pytest.approx(whole.item(), rel=1e-12)


def test_mixup_reads_bytes_as_a_backbone_does_and_mixes_the_features_of_tokens(double: None) -> None:
    y, top = torch.tensor([0, 1, 1]), nn.Linear(4, 2)
    pixels = torch.randint(0, 256, (3, 1, 2, 2), dtype=torch.uint8)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    assert torch.equal(blended(flat, top, pixels, y, 0.3), blended(flat, top, pixels.double() / 255, y, 0.3))
    tokens = {"input_ids": torch.tensor([[1, 2], [3, 0], [4, 4]])}

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 4)

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return self.words(x["input_ids"]).sum(1)

    bag, total = Bag(), 0.0
    z = bag(tokens)
    for i in range(3):
        logits = top(0.3 * z[i] + 0.7 * z[i - 1]).tolist()
        total += 0.3 * cross_entropy(logits, int(y[i])) + 0.7 * cross_entropy(logits, int(y[i - 1]))
    assert blended(bag, top, tokens, y, 0.3).item() == pytest.approx(total / 3, rel=1e-12)


def test_the_cosine_head_scales_the_cosines(double: None) -> None:
    head, z = CosineHead(4, 3, scale=7.0), torch.randn(5, 4)
    for i, row in enumerate(head(z).tolist()):
        for c, value in enumerate(row):
            w = head.weight[c].detach()
            cosine = float(z[i] @ w) / math.sqrt(float(z[i] @ z[i]) * float(w @ w))
            assert value == pytest.approx(7 * cosine, rel=1e-12)
    source = replace(rows(), x=rows().x.double())
    body = nn.Linear(8, 8)
    heads: list[CosineHead] = []

    def kept(dim: int, classes: int) -> nn.Module:
        heads.append(CosineHead(dim, classes))
        return heads[0]

    pretrain(body, source, 8, kept, steps=5, show_progress=False)
    assert float(heads[0].scale.detach()) != 10.0, "the scale is learned"


def test_distillation_losses(double: None) -> None:
    a, b, wide = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 6)

    def cosine(p: Tensor, q: Tensor) -> float:
        return float(p @ q) / math.sqrt(float(p @ p) * float(q @ q))

    assert float(aligned(a, b)) == pytest.approx(1 - sum(cosine(a[i], b[i]) for i in range(4)) / 4, rel=1e-12)
    assert float(squared(a, b)) == pytest.approx(
        sum(float(a[i, j] - b[i, j]) ** 2 for i in range(4) for j in range(3)) / 12
    )
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    total = sum((cosine(a[i], a[j]) - cosine(wide[i], wide[j])) ** 2 for i, j in pairs)
    assert float(alike(a, wide)) == pytest.approx(total / 12, rel=1e-12)
    assert float(alike(a, 3 * a)) == pytest.approx(0, abs=1e-20)
    a.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: alike(z, wide), (a,))


def test_texts_are_read_without_the_padding_that_they_share() -> None:
    x = {"input_ids": torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0], [9, 9, 0, 0]])}
    x["attention_mask"] = (x["input_ids"] > 0).long()
    taken = inputs(nn.Identity(), x, torch.tensor([2, 1]))
    assert taken["input_ids"].tolist() == [[9, 9], [8, 0]]
    packing = nn.Identity()
    packing.packs = True  # type: ignore[assignment]
    assert inputs(packing, x, torch.tensor([0, 1]))["length"].tolist() == [3, 1]
    assert torch.equal(inputs(nn.Identity(), x["input_ids"], torch.tensor([1])), x["input_ids"][1:2])


# -- resuming


def ways_to_train() -> dict[str, Callable[..., list[float]]]:
    source, teacher = rows(), torch.randn(120, 5, generator=torch.Generator().manual_seed(1))
    noisy = [lambda x, key: x + 0.1 * torch.randn(x.shape)]  # of torch's own generator, which is restored
    return {
        "mixup": lambda body, **run: pretrain(body, source, 8, mixup=0.4, **run),
        "cosine": lambda body, **run: pretrain(body, source, 8, CosineHead, **run),
        "alike": lambda body, **run: pretrain_alike(body, source, 8, noisy, **run),
        "denoise": lambda body, **run: pretrain_denoising(body, source, 8, **run),
        "distil": lambda body, **run: distil(body, source, teacher, 8, **run),
    }


class Stopped(nn.Module):
    """Ctrl-C in the forward pass of a step."""

    def __init__(self, body: nn.Module, after: int):
        super().__init__()
        self.body, self.left = body, after

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.body(x)


@pytest.mark.parametrize("how", ways_to_train())
@pytest.mark.parametrize("after", [1, 20])
def test_resuming_is_exact(how: str, after: int, tmp_path: Path) -> None:
    """Interrupted and resumed, it ends in the bits of a training that was not; dropout and running means included."""
    train = ways_to_train()[how]
    run: dict[str, Any] = {"steps": 45, "batch": 16, "rate": 1e-2, "show_progress": False}
    whole, part, rest = (Stopped(dropping(), n) for n in (1000, after, 1000))
    torch.manual_seed(1)
    expected = train(whole, **run)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        train(part, out=tmp_path, **run)
    torch.manual_seed(99)
    losses = train(rest, out=tmp_path, resume=True, **run)
    assert losses == expected and len(losses) == 45
    assert all(torch.equal(value, rest.state_dict()[name]) for name, value in whole.state_dict().items())
    again = Stopped(dropping(), 0)  # of what has ended no step is left
    assert train(again, out=tmp_path, resume=True, **run) == expected
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("write", [1, 2, 3, 4, 9])
def test_a_training_that_is_killed_while_it_writes_resumes_exactly(
    write: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in place of a rename: of the tensors, or of the JSON that names them."""
    run: dict[str, Any] = {"steps": 40, "batch": 16, "rate": 1e-2, "show_progress": False}
    whole = dropping()
    torch.manual_seed(1)
    expected = pretrain(whole, rows(), 8, **run)
    child = os.fork()
    if child == 0:
        left, rename = [write], os.replace

        def killing(old: Any, new: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(old, new)

        try:
            monkeypatch.setattr("metafit.disk.os.replace", killing)
            body = dropping()
            torch.manual_seed(1)
            pretrain(body, rows(), 8, out=tmp_path, **run)
        finally:
            os._exit(0)  # not killed: the parent sees it
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    body = dropping()
    torch.manual_seed(1)
    assert pretrain(body, rows(), 8, out=tmp_path, resume=True, **run) == expected
    assert all(torch.equal(value, body.state_dict()[name]) for name, value in whole.state_dict().items())


def test_resuming_something_else_is_named(tmp_path: Path) -> None:
    run: dict[str, Any] = {"steps": 4, "batch": 8, "out": tmp_path, "show_progress": False}
    pretrain(dropping(), rows(), 8, **run)
    for other in (
        lambda: pretrain(dropping(), rows(), 8, mixup=0.2, resume=True, **run),
        lambda: pretrain(dropping(), rows(5), 8, resume=True, **run),
        lambda: pretrain(dropping(), rows(), 8, seed=1, resume=True, **run),
        lambda: pretrain_denoising(dropping(), rows(), 8, resume=True, **run),
    ):
        with pytest.raises(BadInput, match=r"cannot resume from .*other data, or by another protocol"):
            other()
    with pytest.raises(BadInput, match="network of other shapes"):
        pretrain(nn.Linear(8, 8), rows(), 8, resume=True, **run)


def test_what_cannot_be_trained() -> None:
    quiet: dict[str, Any] = {"show_progress": False}
    with pytest.raises(BadInput, match="steps 0: needs at least 1"):
        pretrain(dropping(), rows(), 8, steps=0, **quiet)
    with pytest.raises(BadInput, match="batch 0: needs at least 1"):
        pretrain(dropping(), rows(), 8, batch=0, **quiet)
    with pytest.raises(BadInput, match=r"mixup -1: needs 0 .* or more"):
        pretrain(dropping(), rows(), 8, mixup=-1, **quiet)
    with pytest.raises(BadInput, match=r"diverged: the loss of step .* lower the rate"):
        pretrain(nn.Linear(8, 8), rows(), 8, steps=50, rate=1e30, **quiet)
    with pytest.raises(BadInput, match="3 features of the teacher for 120 examples"):
        distil(dropping(), rows(), torch.zeros(3, 8), 8, **quiet)


# -- what it gains


@pytest.fixture(scope="module")
def digits() -> Source:
    """Scikit-learn's digits as rows of 0 to 16, turned by quarters: 40 classes, 10 of them to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, digit = torch.tensor(data.images, dtype=torch.float32), torch.tensor(data.target)
    x = torch.cat([images.rot90(turns, (1, 2)) for turns in range(4)]).flatten(1)
    y = torch.cat([digit * 4 + turns for turns in range(4)])
    names = tuple(f"{digit} turned {turns}" for digit in range(10) for turns in range(4))
    return Source("turned digits", x, y, names, "vector")


def animals(each: int = 100) -> Source:
    """Some of each class of the packaged silhouettes."""
    whole = packaged.load("animals")
    keep = torch.cat([torch.nonzero(whole.y == c)[:each, 0] for c in range(len(whole.classes))])
    return replace(whole, x=whole.x[keep], y=whole.y[keep])


def accuracy(source: Source, network: Backbone, way: int) -> float:
    """Of frozen nearest centroids after one shot, on classes that pretraining has not seen."""
    test = features(source.split(seed=0).test, network, progress=False)
    tasks = TaskSampler(test, way, 1, 15, 50, seed=2)
    return float(evaluate(build("centroid", network.out_dim, way), tasks, 200, show_progress=False).score.mean())


def untrained(source: Source, **options: Any) -> Backbone:
    """The perceptron as it is before it is pretrained."""
    body = prepare(source, "mlp", options=options).body
    assert body is not None
    return body


@pytest.mark.parametrize(("method", "rate"), [("cosine", 1e-3), ("denoise", 3e-3)])
def test_a_pretrained_perceptron_beats_a_random_one(method: str, rate: float, digits: Source, tmp_path: Path) -> None:
    made = pretrain_backbone(digits, method, tmp_path, steps=150, rate=rate, show_progress=False)
    assert made["loss"][1] < 0.7 * made["loss"][0]
    assert (
        accuracy(digits, backbones.load(str(tmp_path)), 5) > accuracy(digits, untrained(digits, columns=64), 5) + 0.03
    )


@pytest.mark.parametrize("mixup", [0.0, 0.2])
def test_a_pretrained_network_beats_a_random_one_on_animals(mixup: float, tmp_path: Path) -> None:
    source, small = animals(), {"width": 32, "norm": "group"}
    run: dict[str, Any] = {"mixup": mixup, "steps": 60, "batch": 32, "options": small, "show_progress": False}
    pretrain_backbone(source, "cosine", tmp_path, **run)
    torch.manual_seed(0)
    random = backbones.load("conv4", **small)
    assert accuracy(source, backbones.load(str(tmp_path)), 2) > accuracy(source, random, 2) + 0.05


def test_a_distilled_student_comes_near_its_teacher(digits: Source, tmp_path: Path) -> None:
    """A perceptron of less than a sixth of its teacher's size, and with fewer features."""
    pretrain_backbone(digits, "cosine", tmp_path / "teacher", steps=150, show_progress=False)
    small = {"columns": 64, "width": 32, "depth": 1, "dim": 48}
    run: dict[str, Any] = {"teacher": str(tmp_path / "teacher"), "steps": 300, "rate": 3e-3, "options": small}
    pretrain_backbone(digits, "distil", tmp_path / "student", **run, show_progress=False)
    teacher, student = (backbones.load(str(tmp_path / name)) for name in ("teacher", "student"))
    sizes = [sum(p.numel() for p in network.parameters()) for network in (teacher, student)]
    assert sizes[1] < sizes[0] / 6
    far, near, random = (accuracy(digits, n, 5) for n in (untrained(digits, **small), student, teacher))
    assert near > random - 0.03 and near > far + 0.03, (far, near, random)


def test_distilling_reads_no_labels(tmp_path: Path) -> None:
    source, teacher = rows(), torch.randn(120, 8, generator=torch.Generator().manual_seed(1))
    bodies = []
    for labels in (source.y, source.y.flip(0)):
        bodies.append(dropping())
        distil(bodies[-1], replace(source, y=labels), teacher, 8, steps=3, batch=16, show_progress=False)
    assert all(torch.equal(p, q) for p, q in zip(*(body.parameters() for body in bodies), strict=True))


# -- a small MiniLM


def test_the_small_minilm_is_minilm_where_nothing_is_cut() -> None:
    whole = backbones.load("minilm-l6")
    same = backbones.load("minilm-small", layers=list(range(6)), rank=384)
    texts = ["please block my card, it was stolen", "lights off", "what is the weather like in Lisbon today?"]
    torch.testing.assert_close(same.embed(texts), whole.embed(texts), atol=1e-5, rtol=1e-4)
    small = backbones.load("minilm-small")
    table, narrow, wide = (p.detach() for words in (whole.words, small.words) for p in words.parameters())
    least = torch.linalg.svdvals(table)[60:].square().sum()
    assert (table - narrow @ wide.T).square().sum().item() == pytest.approx(least.item(), rel=1e-4)
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in whole.parameters()) / 4
    for options, words in (({"layers": [6]}, "name some of 0 to 5"), ({"rank": 0}, "rank 0: give 1 to 384")):
        with pytest.raises(BadInput, match=words):
            backbones.load("minilm-small", **options)


def test_texts_are_pretrained_through_their_tokens(tmp_path: Path) -> None:
    source, small = packaged.load("chatter-topics"), {"layers": [5], "rank": 4}
    run: dict[str, Any] = {"backbone": "minilm-small", "options": small, "mixup": 0.2, "show_progress": False}
    made = pretrain_backbone(source, "cosine", tmp_path, steps=2, batch=8, **run)
    again = pretrain_backbone(source, "cosine", tmp_path, steps=3, batch=8, resume=True, **run)
    assert made["loss"][0] == again["loss"][0]
    network, fresh = backbones.load(str(tmp_path)), backbones.load("minilm-small", **small)
    assert not torch.equal(network.embed(source.x[:2], progress=False), fresh.embed(source.x[:2], progress=False))


# -- the folder


def test_a_backbone_folder_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, images = backbones.load("conv4", width=8, norm="group"), torch.rand(3, 1, 28, 28)
    save(network, tmp_path / "saved", [{"source": "somewhere", "seed": 3, "classes": ["a"]}])
    found = backbones.load(f"folder:{tmp_path / 'saved'}")
    assert torch.equal(found.embed(images), network.embed(images)) and not found.training
    assert found.name == f"folder:{(tmp_path / 'saved').resolve()}" and found.modality == "image"
    assert found.pretraining[0]["source"] == "somewhere" and found.transductive is False
    monkeypatch.chdir(tmp_path)
    for name in ("saved", "./saved", "folder:saved"):
        assert backbones.load(name).name == found.name, "the same, wherever it is read from"
    assert backbones.load(found.name, **found.options or {}).fingerprint() == found.fingerprint()
    save(found, tmp_path / "again", found.pretraining)
    assert json.loads((tmp_path / "again" / "backbone.json").read_text())["backbone"] == "conv4", (
        "not the folder's name"
    )
    save(backbones.load("conv4", width=8, norm="group"), tmp_path / "saved", [])
    with pytest.raises(BadInput, match="no longer those that this model was trained on"):
        backbones.load(found.name, **found.options or {})


def test_folders_that_hold_no_backbone(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist; check the path"):
        backbones.load(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(BadInput, match=r"holds no backbone \(no backbone.json\)"):
        backbones.load(str(tmp_path))
    with pytest.raises(BadInput, match="'Linear' cannot be saved: it is not of the catalogue"):
        save(backbones.wrap(nn.Linear(2, 2), 2), tmp_path, [])
    save(backbones.load("mlp", columns=3), tmp_path, [])
    weights = next(tmp_path.glob("backbone-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(BadInput, match="weights are missing or damaged"):
        backbones.load(str(tmp_path))


def test_classes_that_were_seen_are_not_tested_on(
    digits: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = pretrain_backbone(digits, "supervised", tmp_path / "0", steps=2, show_progress=False)
    assert made["classes"] == list(digits.split(seed=0).train.classes)
    where = str(tmp_path / "0")
    assert prepare(digits, where, seed=0).dim == 64
    with pytest.raises(BadInput, match=r"seed 1: .*pretrained on 'turned digits' with seed 0, .*use --seed 0"):
        prepare(digits, where, seed=1)
    with pytest.raises(BadInput, match="use --seed 0"):
        pretrain_backbone(digits, "supervised", tmp_path / "1", where, steps=2, seed=1)
    with pytest.raises(BadInput, match="use --seed 0"):
        small = {"columns": 64, "dim": 8}
        pretrain_backbone(digits, "distil", tmp_path / "1", "mlp", teacher=where, steps=2, seed=1, options=small)
    assert not (tmp_path / "1" / "backbone.json").exists()
    again = pretrain_backbone(digits, "cosine", tmp_path / "2", where, steps=2, show_progress=False)
    histories = backbones.load(str(tmp_path / "2")).pretraining
    assert [done["method"] for done in histories] == ["supervised", "cosine"] and histories[1]["rate"] == again["rate"]
    capsys.readouterr()
    prepare(replace(digits, name="the same under another name"), where, seed=1)
    assert "where they are the same, the result is too good" in " ".join(capsys.readouterr().err.split())


def test_features_of_batch_statistics_are_not_kept(tmp_path: Path) -> None:
    source = animals(20)
    pretrain_backbone(source, "supervised", tmp_path, steps=1, batch=8, options={"norm": "batch"}, show_progress=False)
    with pytest.raises(BadInput, match="depend on the batch that they are computed in"):
        prepare(source, str(tmp_path))
    assert prepare(source, str(tmp_path), train_backbone=True).body is not None


def test_what_metafit_pretrain_refuses(digits: Source, tmp_path: Path) -> None:
    texts = packaged.load("chatter-topics")
    for source, method, options, words in (
        (digits, "simclear", {}, "unknown pretraining 'simclear': did you mean 'simclr'"),
        (digits, "simclr", {"mixup": 0.2}, "simclr reads no labels"),
        (digits, "cosine", {"teacher": "minilm-l6"}, "cosine learns from none"),
        (digits, "distil", {}, "no usual teacher for vectors"),
        (digits, "cosine", {"backbone": "conv4"}, "reads image, turned digits is vector"),
        (digits, "cosine", {"options": {"with": 3}}, "unknown option of the backbone mlp 'with'"),
        (animals(20), "denoise", {}, "no rows of numbers to restore"),
        (texts, "simclr", {"backbone": "minilm-small"}, "no views of texts"),
    ):
        with pytest.raises(BadInput, match=words):
            pretrain_backbone(source, method, tmp_path, **{"steps": 1, **options})
    assert set(METHODS) == {"supervised", "cosine", "simclr", "vicreg", "denoise", "distil"}
    assert not list(tmp_path.glob("backbone*"))
