"""Makes the weights of the in-context learner for rows: `python benchmarks/in_context.py --out in-context`.

It is meta-trained on synthetic tables alone (`metafit.data.SyntheticTables`), its transformer in bfloat16; the state in
the folder is gone on from where it is given again. At the end the weights go into the package: those that ship are made
by one run. `--longer` starts from the weights that are there, on other tables.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save

import metafit.learners
from metafit.data import SyntheticTables
from metafit.disk import atomic
from metafit.learners import build
from metafit.training import meta_train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the training's state")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--longer", action="store_true", help="start from the weights in the package")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    learner = build("in-context", 32, 10, pretrained=args.longer, ranks=False)
    for part in (learner.read, *learner.blocks):
        part.forward = torch.autocast("cpu", torch.bfloat16)(part.forward)  # type: ignore[method-assign]
    training, validation = (SyntheticTables(batch=args.batch, seed=s) for s in (2 if args.longer else 0, 1))
    meta_train(
        learner,
        training,
        validation,
        steps=args.steps,
        rate=args.rate,
        warmup=args.steps // 20,
        weight_decay=0.01,
        clip=1.0,
        validation_tasks=8 * args.batch,
        backend="vmap",
        out=args.out,
        resume=True,
    )
    with atomic(Path(metafit.learners.__file__).parent / "in_context.safetensors") as file:
        file.write(save({name: value.float() for name, value in learner.state_dict().items()}))


if __name__ == "__main__":
    main()
