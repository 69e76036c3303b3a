"""Texts end to end in a row: no arithmetic is spent on padding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def pack(x: Mapping[str, Tensor], group: int = 8, multiple: int = 8) -> dict[str, Tensor]:
    """Lays texts end to end, several in a row, for a backbone that keeps them apart (``MiniLM`` does).

    Padded, each text costs as much as the longest of the batch: two to three times the tokens of short texts. Packed,
    the rows of a batch of tasks are as long as the fullest of them; long and short texts are dealt out so that all are
    about as full. Krell et al., 2021, arXiv:2107.02027. The features are those of the padded texts, up to rounding.

    Args:
        x: ``input_ids`` and ``attention_mask`` (0 is padding, on the right), both ``(..., N, tokens)``; what
            comes before N (tasks) is kept.
        group: the most texts in a row. Attention costs the square of a row's length.
        multiple: rows are as long as a multiple of it, so that batches come in few shapes: what is measured, traced
            or compiled for one serves many.

    Returns:
        ``input_ids``, ``position`` and ``text`` of ``(..., rows, length)``: each token, its place in its text, and
        which of the N texts it is of, -1 for padding; ``length`` ``(..., N)``, the tokens of each text.

    >>> ids = torch.tensor([[5, 6, 0], [7, 8, 9]])
    >>> packed = pack({"input_ids": ids, "attention_mask": ids}, multiple=1)
    >>> packed["input_ids"], packed["text"]
    (tensor([[7, 8, 9, 5, 6]]), tensor([[1, 1, 1, 0, 0]]))
    """
    ids, real = x["input_ids"], x["attention_mask"] != 0
    length = real.sum(-1)
    rows = -(-length.shape[-1] // group)
    rank = length.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # 0 is the longest
    lap, place = rank // rows, rank % rows
    row = torch.where(lap % 2 == 0, place, rows - 1 - place)  # dealt there and back: long rows get short texts next
    before = (row[..., None] == row[..., None, :]) & (rank[..., None] > rank[..., None, :])
    start = (before * length[..., None, :]).sum(-1)
    longest = -(-max(int((start + length).max()), 1) // multiple) * multiple
    token = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    text = torch.arange(ids.shape[-2], device=ids.device)[:, None].expand_as(ids)
    slot = torch.where(real, (row * longest + start)[..., None] + token, rows * longest).flatten(-2)

    def laid(values: Tensor, padding: int) -> Tensor:
        out = torch.full((*ids.shape[:-2], rows * longest + 1), padding, device=ids.device)
        return out.scatter(-1, slot, values.flatten(-2))[..., :-1].unflatten(-1, (rows, longest))

    return {"input_ids": laid(ids, 0), "position": laid(token, 0), "text": laid(text, -1), "length": length}
