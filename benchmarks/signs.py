"""Traffic signs in a frozen EfficientNet-Lite0: `python benchmarks/signs.py gtsrb --shot 1`.

GTSRB, 43 signs, one frame of each track: frames of one track are nearly copies, and would leak from support to query
set. Class split by ``default_rng(0)`` over the sorted names.
"""

from __future__ import annotations

from common import data
from text import main

from metafit.bench.sources import signs

if __name__ == "__main__":
    main(__doc__, {"gtsrb": lambda: signs(data("vision", "gtsrb_tracks_32.npz"), "gtsrb")})
