"""Traffic signs in a frozen EfficientNet-Lite0: `python benchmarks/signs.py gtsrb --shot 1`.

GTSRB, 43 signs, one frame of each track: frames of one track are nearly copies, and would leak from support to query
set. Class split by ``default_rng(0)`` over the sorted names.
"""

from __future__ import annotations

import numpy as np
import torch
from common import data
from text import main

from metafit.data import Source


def gtsrb() -> Source:
    archive = np.load(data("vision", "gtsrb_tracks_32.npz"))
    labels = archive["labels"]
    _, first = np.unique(np.stack([labels, archive["tracks"]]), axis=1, return_index=True)
    images = torch.from_numpy(archive["images"][first]).permute(0, 3, 1, 2).contiguous()
    y = torch.from_numpy(np.unique(labels[first], return_inverse=True)[1])
    return Source("gtsrb", images, y, tuple(f"sign {label:02d}" for label in np.unique(labels)), "image")


if __name__ == "__main__":
    main(__doc__, {"gtsrb": gtsrb})
