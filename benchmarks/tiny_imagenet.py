"""Tiny-ImageNet, Conv-4 from scratch: `python benchmarks/tiny_imagenet.py alfa+metal --shot 1 --size 32 --width 32`.

200 classes of 100 photographs; sorted by WordNet number and permuted by ``default_rng(0)``, 120 classes are for
meta-training, 30 for validation and 50 for test. ``--size`` below 64 averages squares of pixels.
"""

from __future__ import annotations

import io
import zipfile
from functools import partial

import conv4
from common import data
from PIL import Image

from metafit.backbones.pictures import stack
from metafit.data import Splits, from_arrays


def tiny_imagenet(size: int) -> Splits:
    with zipfile.ZipFile(data("vision", "tiny_imagenet_200x100_64.zip")) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".JPEG"))
        images = [Image.open(io.BytesIO(archive.read(name))).convert("RGB").reduce(64 // size) for name in names]
    return from_arrays(stack(images), [name.partition("/")[0] for name in names], name="tiny-imagenet").split()


if __name__ == "__main__":
    parser = conv4.parser(__doc__)
    parser.add_argument("--size", type=int, default=64, choices=(64, 32, 16), help="of the images, in pixels")
    args = parser.parse_args()
    conv4.run("tiny-imagenet", partial(tiny_imagenet, args.size), args, channels_in=3, image_size=args.size)
