"""A perceptron for rows of numbers."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metafit.backbones.base import Backbone
from metafit.errors import BadInput


class MLP(Backbone):
    """Rows, standardised, through hidden layers with ReLU to ``dim`` features.

    Not pretrained. ``mean`` and ``scale`` of the columns are buffers, 0 and 1 until ``standardise`` sets them.

    Args:
        columns: numbers a row.
        width: of the hidden layers.
        depth: hidden layers.
        dim: features.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, columns: int = 64, width: int = 128, depth: int = 2, dim: int = 64) -> None:
        sizes = {"columns": columns, "width": width, "depth": depth, "dim": dim}
        for name, value in sizes.items():
            if value < 1:
                raise BadInput(f"backbone 'mlp': {name} {value}: needs at least 1")
        super().__init__("mlp", dim, "vector", "mlp v1 " + " ".join(f"{k}={v}" for k, v in sizes.items()))
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("scale", torch.ones(columns))
        hidden = [[nn.Linear(a, b), nn.ReLU()] for a, b in itertools.pairwise([columns] + [width] * depth)]
        self.layers = nn.Sequential(*itertools.chain(*hidden), nn.Linear(width, dim))

    def standardise(self, mean: Tensor, scale: Tensor) -> None:
        """From now on a row x is (x − mean) / scale."""
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, x: Float[Tensor, "n columns"]) -> Float[Tensor, "n dim"]:
        if x.shape[-1] != len(self.mean):
            raise BadInput(
                f"backbone 'mlp': rows of {x.shape[-1]} numbers where it was made for {len(self.mean)}; give it the "
                "same columns"
            )
        return self.layers((x - self.mean) / self.scale)
