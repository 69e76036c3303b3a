"""What a module's computation depends on beside its tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, str, tuple, type(None))


def settings(module: nn.Module) -> tuple[Any, ...]:
    """The plain attributes (mode, ways, steps, rates) of a module and of all within it, and half precision where it is
    on: when one changes, so does this.

    Code that was generated, and a plan that was measured, are for one value of it.
    """
    plain = tuple(
        (type(part), tuple((k, v) for k, v in vars(part).items() if type(v) in _PLAIN and k[0] != "_"))
        for part in module.modules()
    )
    half = half_precision(module)
    return plain if half is None else (*plain, half)


def half_precision(module: nn.Module) -> str | None:
    """What ``torch.autocast`` runs the module in, where it is on."""
    device = next((p.device.type for p in module.parameters()), "cpu")
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def identity(module: nn.Module) -> tuple[Any, ...]:
    """What measurements of a module are remembered by: its settings, and the names and shapes of its parameters."""
    parameters = tuple((n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in module.named_parameters())
    return settings(module), parameters
