"""Low-rank adapters: a few numbers to adapt in a large network whose own weights stay as they are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from operator import index

from torch import nn

from metafit.errors import BadInput, some

# last names of the query and value projections, in transformers and elsewhere; peft knows more, by model type
QUERY_VALUE = {"query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "to_q", "to_v", "q", "v", "qkv", "qkv_proj"}


def low_rank(body: nn.Module, rank: int = 4, alpha: float | None = None, targets: str | None = None) -> nn.Module:
    """A copy of the network with low-rank adapters in its linear layers; only the adapters require gradients.

    A layer gives ``W x + b + alpha / rank · B A x``, with ``A`` of ``(rank, in)`` drawn at random from torch's seed
    and ``B`` of ``(out, rank)`` zero: until something is learned, the function is that of the network. Adapting ``A``
    and ``B`` leaves ``W`` one tensor for all tasks, so that ``vmap`` runs it once over the rows of all of them.

    Hu et al., LoRA, 2021, arXiv:2106.09685; the layers are those of peft, whose import takes some seconds.

    Args:
        body: any module with linear layers inside.
        rank: of the change of each layer.
        alpha: its scale; ``rank`` where ``None``, so that the change is ``B A``.
        targets: a pattern over the names of the linear layers (``"layers.[45].*"``); where ``None``, the query and
            value projections, as in the paper, or every linear layer of a network that names none.

    Raises:
        BadInput: peft is missing, the rank is no positive integer, or no linear layer matches.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise BadInput("scope 'lora' needs peft: pip install \"metafit[text]\"") from error
    if index(rank) < 1:
        raise BadInput(f"rank {rank}: needs at least 1")
    names = _targets(body, targets)
    scale = rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=names)  # type: ignore[arg-type]
    with warnings.catch_warnings():  # it tells how GPT-2 stores its weights
        warnings.simplefilter("ignore", UserWarning)
        adapted: nn.Module = inject_adapter_in_model(config, copy.deepcopy(body))
    return adapted


def _targets(body: nn.Module, pattern: str | None) -> list[str]:
    names = list(_linear(body))
    if pattern is None:
        wanted = QUERY_VALUE | _known(body)
        chosen = [name for name in names if name.rpartition(".")[2] in wanted] or names
    else:
        chosen = [name for name in names if fnmatchcase(name, pattern)]
    if not chosen:
        raise BadInput(
            f"scope 'lora': {type(body).__name__} has no linear layer inside that "
            f"{'an adapter can change' if pattern is None else f'{pattern!r} matches'}"
            + (f"; it has: {some(names, 6)}" if names else "; choose scope=all")
        )
    return chosen


def _linear(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the linear layers that are called; PyTorch's own attention reads the weights past an adapter."""
    from transformers.pytorch_utils import Conv1D

    for name, child in module.named_children():
        if isinstance(child, (nn.Linear, Conv1D)):
            yield prefix + name
        elif not isinstance(child, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            yield from _linear(child, f"{prefix}{name}.")


def _known(body: nn.Module) -> set[str]:
    """What peft adapts in the transformers models inside, by their type."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    types = {str(getattr(getattr(module, "config", None), "model_type", "")) for module in body.modules()}
    found = [known[kind] for kind in types if kind in known]
    return {name for names in found if isinstance(names, list) for name in names}
