"""Packed texts: every token once, in its place, and the same features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad

from metafit import backbones
from metafit.backbones.packing import pack
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
    packed = pack(x, group)
    rows = -(-shape[-1] // group)
    assert packed["input_ids"].shape[:-1] == (*shape[:-1], rows) and torch.equal(packed["length"], lengths)
    assert packed["input_ids"].shape[-1] == packed["text"].ge(0).sum(-1).max(), "the fullest row has no padding"
    back = torch.zeros_like(x["input_ids"]).flatten(0, -3) if len(shape) > 1 else torch.zeros_like(x["input_ids"])[None]
    ids, text, position = (packed[k].reshape(-1, rows * packed[k].shape[-1]) for k in ("input_ids", "text", "position"))
    for task in range(len(back)):
        real = text[task] >= 0
        back[task][text[task][real], position[task][real]] = ids[task][real]
        assert not ids[task][~real].any()
    assert torch.equal(back.view_as(x["input_ids"]), x["input_ids"])
    assert int((packed["text"] >= 0).sum()) == int(lengths.sum())
    for row_text, row_position in zip(packed["text"].flatten(0, -2), packed["position"].flatten(0, -2), strict=True):
        real = row_text >= 0
        assert len(row_text[real].unique()) <= group and torch.equal(
            row_text[real].unique_consecutive(), row_text[real][row_position[real] == 0]
        ), "a text is in one piece, in its order"


def test_rows_are_about_as_full() -> None:
    lengths = torch.cat([torch.full((8,), 50), torch.full((24,), 10)])[torch.randperm(32)]
    assert pack(padded(lengths, 60))["input_ids"].shape == (4, 160)


def test_no_tokens_at_all() -> None:
    packed = pack(padded(torch.tensor([0, 0]), 4))
    assert packed["text"].tolist() == [[-1]] and packed["length"].tolist() == [0, 0]


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
        packed = pack(tokens, group)
        with torch.no_grad():
            torch.testing.assert_close(minilm(packed), minilm(tokens), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(minilm(packed).detach(), minilm(tokens).detach(), rtol=1e-9, atol=1e-12)


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
