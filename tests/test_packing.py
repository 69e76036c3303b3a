"""Packed texts: every token once, in its place, and the same features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from metafit import backbones
from metafit.apps.packed import packed
from metafit.backbones import pack
from metafit.data import Source, TaskSampler
from metafit.over_tasks import double_backward


def padded(lengths: Tensor, tokens: int) -> dict[str, Tensor]:
    mask = torch.arange(tokens) < lengths[..., None]
    ids = torch.randint(1, 1000, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(7,), (3, 8), (2, 2, 5), (1,)])
def test_every_token_is_kept_in_its_place(shape: tuple[int, ...], group: int) -> None:
    lengths = torch.randint(2, 12, shape, generator=torch.Generator().manual_seed(1))
    x = padded(lengths, 15)
    laid = pack(x, group, multiple=1)
    rows = -(-shape[-1] // group)
    assert laid["input_ids"].shape[:-1] == (*shape[:-1], rows) and torch.equal(laid["length"], lengths)
    assert laid["input_ids"].shape[-1] == laid["text"].ge(0).sum(-1).max(), "the fullest row has no padding"
    back = torch.zeros_like(x["input_ids"]).flatten(0, -3) if len(shape) > 1 else torch.zeros_like(x["input_ids"])[None]
    ids, text, position = (laid[k].reshape(-1, rows * laid[k].shape[-1]) for k in ("input_ids", "text", "position"))
    for task in range(len(back)):
        real = text[task] >= 0
        back[task][text[task][real], position[task][real]] = ids[task][real]
        assert not ids[task][~real].any()
    assert torch.equal(back.view_as(x["input_ids"]), x["input_ids"])
    assert int((laid["text"] >= 0).sum()) == int(lengths.sum())
    for row_text, row_position in zip(laid["text"].flatten(0, -2), laid["position"].flatten(0, -2), strict=True):
        real = row_text >= 0
        assert len(row_text[real].unique()) <= group and torch.equal(
            row_text[real].unique_consecutive(), row_text[real][row_position[real] == 0]
        ), "a text is in one piece, in its order"


def test_rows_are_about_as_full() -> None:
    lengths = torch.cat([torch.full((8,), 49), torch.full((24,), 9)])[torch.randperm(32)]
    assert pack(padded(lengths, 60), multiple=1)["input_ids"].shape == (4, 152)
    assert pack(padded(lengths, 60), multiple=50)["input_ids"].shape == (4, 200)


def test_no_tokens_at_all() -> None:
    laid = pack(padded(torch.tensor([0, 0]), 4))
    assert laid["text"].tolist() == [[-1] * 8] and laid["length"].tolist() == [0, 0]


def test_tasks_are_packed_for_a_network_that_reads_them_so() -> None:
    y = torch.arange(4).repeat_interleave(6)
    source = Source("texts", padded(torch.arange(24) % 5 + 3, 9), y, tuple("abcd"), "text")
    sampler, network = TaskSampler(source, 3, 1, 2, batch=2), nn.Identity()
    assert packed(sampler, network) is sampler and packed(sampler, None) is sampler
    network.packs = True
    tasks, plain = packed(sampler, network), sampler.tasks(1, 3)
    assert (tasks.batch, tasks.seed, tasks.way, tasks.shot, tasks.query) == (2, 0, 3, 1, 2)
    for part, padding in zip(tasks.tasks(1, 3), plain, strict=True):
        assert torch.equal(part.y, padding.y) and torch.equal(part.weight, padding.weight)
        assert torch.equal(part.x["input_ids"], pack(padding.x)["input_ids"])


TEXTS = [
    "Where is my card?",
    "I was charged twice for one and the same payment, and I want it back.",
    "top up",
    "hello",
    "Which currencies can I hold?",
    "Why was my transfer declined yesterday evening?",
]


def test_minilm_gives_the_features_of_padded_texts() -> None:
    minilm = backbones.load("minilm-l6").double()
    tokens = minilm.preprocess(TEXTS)
    for group in (2, 8):
        laid = pack(tokens, group)
        with torch.no_grad():
            torch.testing.assert_close(minilm(laid), minilm(tokens), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(minilm(laid).detach(), minilm(tokens).detach(), rtol=1e-9, atol=1e-12)


def test_minilm_packed_under_vmap_to_second_order() -> None:
    minilm = backbones.load("minilm-l6").double().requires_grad_(False)
    tokens = {k: v.unflatten(0, (2, 3)) for k, v in minilm.preprocess(TEXTS).items()}
    name, weights = "layers.4.value.weight", torch.arange(384.0, dtype=torch.float64)

    def curvature(x: dict[str, Tensor], scale: Tensor) -> Tensor:
        """The derivative of a squared gradient."""

        def loss(scale: Tensor) -> Tensor:
            features = functional_call(minilm, {name: minilm.get_parameter(name) * scale}, (x,))
            return (features.square() @ weights).sum()

        return grad(lambda s: grad(loss)(s).square())(scale)

    one = torch.ones((), dtype=torch.float64)
    with double_backward(vmapped=True):
        found = torch.vmap(lambda x: curvature(x, one))(pack(tokens))
    expected = [curvature({k: v[t] for k, v in tokens.items()}, one) for t in range(2)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-7, atol=1e-10)
