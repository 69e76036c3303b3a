"""Omniglot, whole, Conv-4 from scratch: `python benchmarks/omniglot.py protonet --train-way 60 --way 20 --shot 1`.

Of the 1,623 characters, permuted by ``default_rng(0)`` over their sorted names, 1,100 are for meta-training, 100 for
validation and 423 for test; rotations by 90, 180 and 270 degrees make new classes of each, as in the literature.
"""

from __future__ import annotations

import conv4
import numpy as np
import torch
from common import data

from metafit.data import Source, Splits


def omniglot() -> Splits:
    archive = np.load(data("vision", "omniglot_28.npz"))
    names = archive["names"]
    order = np.argsort(names)[np.random.default_rng(0).permutation(len(names))]
    parts = (order[:1100], order[1100:1200], order[1200:])
    return Splits(*(_rotated(archive["images"][part], names[part]) for part in parts))


def _rotated(images: np.ndarray, names: np.ndarray) -> Source:
    turned = np.concatenate([np.rot90(images, k, axes=(2, 3)) for k in range(4)])
    x = torch.from_numpy(turned.reshape(-1, 1, 28, 28).copy())
    y = torch.arange(len(turned)).repeat_interleave(images.shape[1])
    return Source("omniglot", x, y, tuple(f"{name}@{90 * k}" for k in range(4) for name in names), "image")


if __name__ == "__main__":
    conv4.run("omniglot", omniglot, conv4.parser(__doc__).parse_args())
