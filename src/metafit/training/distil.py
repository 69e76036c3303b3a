"""Knowledge distillation: a small network learns to see what a large one sees. Labels are not read."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metafit.data.source import Source
from metafit.errors import BadInput
from metafit.training.descend import check_trainable, descend, inputs

Match = Callable[[Float[Tensor, "n d"], Float[Tensor, "n e"]], Tensor]


def aligned(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Tensor:
    """1 − the mean cosine between the features of both: what a centroid compares is the direction."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


def squared(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Tensor:
    """The mean squared difference of the features (Romero et al., 2015, FitNets, arXiv:1412.6550, eq. 3)."""
    return F.mse_loss(student, teacher)


def alike(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n e"]) -> Tensor:
    """The mean squared difference between the cosines of all pairs of different examples, of either network
    (Park et al., 2019, relational distillation, arXiv:1904.05068; with cosines, Tung and Mori, 2019,
    arXiv:1907.09682). The sizes may differ."""
    own, theirs = (F.normalize(z, dim=-1) for z in (student, teacher))
    n = len(own)
    return (own @ own.T - theirs @ theirs.T).fill_diagonal_(0.0).square().sum() / (n * (n - 1))


MATCHES: dict[str, Match] = {"aligned": aligned, "squared": squared, "alike": alike}


def distil(
    student: nn.Module,
    source: Source,
    teacher: Float[Tensor, "n e"],
    dim: int,
    match: Match = aligned,
    steps: int = 1000,
    batch: int = 128,
    rate: float = 1e-3,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    show_progress: bool = True,
) -> list[float]:
    """Trains ``student`` so that its features of an example are like the teacher's.

    Where the sizes differ, a linear layer over the student's features, thrown away in the end, takes them to the
    teacher's; ``alike`` needs none. Where they are the same, ``aligned`` was the better by far (MiniLM); where they
    differ, the two came out alike (a perceptron of digits).

    Args:
        student: from inputs to ``(N, dim)``; trained in place.
        source: examples as the student reads them; labels are not read.
        teacher: the features that the large network gives for each example (``metafit.data.features``).
        match: ``aligned``, ``squared``, ``alike``, or any loss of both features.
        steps, batch, rate: of AdamW, its rate annealed to 0 along a cosine.
        seed: of the order of the examples.
        out, resume: as in ``descend``.

    Returns:
        The loss of every step.

    Raises:
        BadInput: the source holds raw items, the student has nothing to train, the teacher's features are not of
            these examples, or as ``descend``.
    """
    check_trainable(student, source)
    if len(teacher) != len(source):
        raise BadInput(f"distil: {len(teacher)} features of the teacher for {len(source)} examples; give it the same")
    same = dim == teacher.shape[1] or match is alike
    top = nn.Identity() if same else nn.Linear(dim, teacher.shape[1])

    def loss(rows: Tensor, step: int) -> Tensor:
        return match(top(student(inputs(student, source.x, rows))), teacher[rows])

    work = {"method": "distil", "match": getattr(match, "__name__", ""), "source": source.name, "of": teacher.shape[1]}
    return descend([student, top], loss, len(source), steps, batch, rate, seed, out, resume, work, show_progress)
