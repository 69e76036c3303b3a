"""MiniLM at a quarter of its size, to be distilled from the whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metafit.backbones.minilm import LAYERS, WIDTH, MiniLM
from metafit.errors import BadInput


def small_minilm(max_length: int = 256, layers: Sequence[int] = (0, 5), rank: int = 60) -> MiniLM:
    """Some layers of MiniLM-L6 over a word table of low rank: with the defaults 5.6 of its 22.6 million parameters.

    Half of MiniLM is its word table, E = 30,522 × 384. Here it is the product of 30,522 × ``rank`` and ``rank`` × 384
    that is nearest to it in squares (Eckart and Young, 1936), as in ALBERT (Lan et al., 2020, arXiv:1909.11942). The
    layers keep their weights (as DistilBERT's do: Sanh et al., 2019, arXiv:1910.01108). So it starts from what the
    whole network knows, but its answers are good only once it is distilled: ``metafit pretrain --method distil``.

    Args:
        max_length: tokens after which a text is cut, at most 512.
        layers: which of the layers 0 to 5 are kept, in this order.
        rank: of the word table, 1 to 384.

    Raises:
        BadInput: a layer or a rank that there is not.
    """
    if not layers or any(layer not in range(LAYERS) for layer in layers):
        raise BadInput(f"backbone 'minilm-small': layers {list(layers)}: name some of 0 to {LAYERS - 1}")
    if not 1 <= rank <= WIDTH:
        raise BadInput(f"backbone 'minilm-small': rank {rank}: give 1 to {WIDTH}")
    small = MiniLM(max_length)
    small.name = "minilm-small"
    small.recipe = f"minilm-small v1: mean, L2, max_length={max_length} layers={list(layers)} rank={rank}"
    small.layers = nn.ModuleList(small.layers[layer] for layer in layers)
    small.words = _low_rank(next(small.words.parameters()).detach(), rank)
    return small.eval()


def _low_rank(table: Tensor, rank: int) -> nn.Module:
    """An embedding and a linear map, whose product is the best of that rank."""
    with torch.random.fork_rng(devices=[]):  # the random weights are replaced, and nobody's draws should change
        narrow, wide = nn.Embedding(len(table), rank), nn.Linear(rank, table.shape[1], bias=False)
    _, vectors = torch.linalg.eigh((table.T @ table).double())
    largest = vectors[:, -rank:].to(table.dtype)
    narrow.weight.data, wide.weight.data = table @ largest, largest.clone()
    return nn.Sequential(narrow, wide)
