"""A transformer that reads a table's labelled rows and tells the class of others, in one pass."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafit.errors import BadInput
from metafit.learners.attention import Block
from metafit.learners.base import Adapted, Learner, mask_absent, members
from metafit.learners.opinions import HELD, OPINIONS, Opinions, opinions
from metafit.task import Examples, weights

SLOTS = 10  # classes that it tells apart at once
COLUMNS = 32  # that it reads
EDGE = 0.02  # no rank is nearer to the ends
TAIL = 4.0  # standard deviations past which a value hardly grows


class InContextLearner(Learner):
    """Rows in, class out: attention among the labelled rows, and of each query to them (Müller et al., 2022,
    arXiv:2112.10510; for tables Hollmann et al., 2023, arXiv:2207.01848).

    What has no meaning in a table is taken out before the network reads it: columns are scaled by the support set,
    sorted by how much of their variance is between the classes (the first 32 are read), and turned to rise with the
    classes, which are sorted by their means. So, but for ties, the order of rows, columns and classes does not matter,
    exactly; nor do the units of the columns. Beside its columns, the network reads what simple predictors say of a row
    (``opinions``).

    It reads the table twice, once with its values and once with their ranks in the support set, which no bend of a
    column changes (as it changes no decision tree), and answers by the geometric mean of both probabilities.

    More than ten classes are told by digits: each class has several ten-valued ones, and its probability is the product
    of theirs (error-correcting output codes; Dietterich and Bakiri, 1995).

    Args:
        body: from inputs to vectors ``(N, F)``.
        way: the most classes of a task.
        width, layers, heads: of the transformer.
        ranks: whether it reads the table a second time with ranks for values.
    """

    def __init__(
        self, body: nn.Module, way: int, width: int = 128, layers: int = 4, heads: int = 4, ranks: bool = True
    ):
        super().__init__(way)
        self.body, self.ranks = body, ranks
        inputs = 2 * COLUMNS + OPINIONS * SLOTS
        self.read = nn.Sequential(nn.Linear(inputs, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.trust = nn.Parameter(torch.ones(OPINIONS))
        self.codes = nn.Parameter(torch.randn(SLOTS + 1, width) / width**0.5)  # the last one: to be told
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, SLOTS)

    def load_pretrained(self) -> InContextLearner:
        """Takes the weights of the package, which ``benchmarks/in_context.py`` makes from synthetic tables.

        Raises:
            BadInput: they are of another size.
        """
        from safetensors.torch import load

        weights = load(files("metafit.learners").joinpath("in_context.safetensors").read_bytes())
        try:
            self.load_state_dict({**self.state_dict(), **weights})
        except RuntimeError:
            raise BadInput(
                "in-context: the pretrained weights are of the default width, layers and heads; leave these out, or "
                "say pretrained=False"
            ) from None
        return self

    def adapt(self, support: Examples) -> Adapted:
        assert self.way is not None  # the catalogue refuses regression
        x, weight, member = self.body(support.x), weights(support), members(support, self.way)
        view, place = _view(x, member, weight)
        views = [self._read(x, view, place, support.y, weight)]
        if self.ranks:  # in the order of the values: ranks of few rows tie too often to have one
            scores = _scores(x, x, weight)
            views.append(self._read(scores, _view(scores, member, weight, view)[0], place, support.y, weight))
        return {"views": views, "x": x, "weight": weight, "present": member.sum(0) > 0}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        x = self.body(x)
        seen = [x, _scores(x, adapted["x"], adapted["weight"])] if self.ranks else [x]
        answers = [
            self._answer(one, view, adapted["present"]) for one, view in zip(seen, adapted["views"], strict=True)
        ]
        return mask_absent(torch.stack(answers).mean(0), adapted["present"])

    def _read(self, x: Tensor, view: View, place: Tensor, y: Tensor, weight: Tensor) -> Adapted:
        slots = _digits(place, len(place))  # (digits, way)
        states = [self._states(view, view.rows(x), slot[y], weight) for slot in slots]
        return {"view": view._asdict(), "slots": slots, "states": states}

    def _answer(self, x: Tensor, read: Adapted, present: Tensor) -> Tensor:
        """Log-probabilities ``(Q, way)``; 0 for absent classes."""
        rows, scores = View(**read["view"]).rows(x), x.new_zeros(len(x), len(present))
        for slot, state in zip(read["slots"], read["states"], strict=True):
            used = (slot[:, None] == torch.arange(SLOTS, device=slot.device)) & present[:, None]
            told = self._told(rows, state).masked_fill(~used.any(0), -torch.inf).log_softmax(-1)
            scores = scores + torch.where(present, told[:, slot], 0.0)
        return scores

    def _states(self, view: View, rows: Tensor, slot: Tensor, weight: Tensor) -> Adapted:
        """What the support rows are before each block, and what is simply said of them."""
        labels = (slot[:, None] == torch.arange(SLOTS, device=slot.device)) * weight[:, None].to(rows.dtype)
        known, said = opinions(rows, labels, view.share)
        tokens, states = self._tokens(view.share, rows, said) + self.codes[slot], []
        for block in self.blocks:
            states.append(tokens)
            tokens = block(tokens, tokens, weight)
        return {"opinions": known._asdict(), "share": view.share, "states": states, "weight": weight}

    def _told(self, rows: Tensor, state: Adapted) -> Tensor:
        """Logits ``(Q, SLOTS)``."""
        said = Opinions(**state["opinions"]).of(rows)
        tokens = self._tokens(state["share"], rows, said) + self.codes[SLOTS]
        for block, known in zip(self.blocks, state["states"], strict=True):
            tokens = block(tokens, known, state["weight"])
        return self.out(self.norm(tokens)) + (self.trust[:, None] * said).sum(-2)

    def _tokens(self, share: Tensor, rows: Tensor, said: Tensor) -> Tensor:
        seen = torch.stack([rows, rows * share], -2)[..., :COLUMNS]
        seen = F.pad(seen, (0, COLUMNS - seen.shape[-1]))
        return self.read(torch.cat([seen.flatten(-2), said.flatten(-2)], -1))


class View(NamedTuple):
    """How the network sees columns ``(F,)``: which, from where, in what unit, and how much they tell."""

    columns: Tensor
    mean: Tensor
    scale: Tensor
    share: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """``(N, F)`` of ``(N, F)``: sorted, scaled, and no value far out."""
        return TAIL * torch.tanh((x[:, self.columns] - self.mean) * self.scale / TAIL)


def _view(x: Tensor, member: Tensor, weight: Tensor, like: View | None = None) -> tuple[View, Tensor]:
    """The view, and the place of each class in their order ``(way,)``, absent ones last; columns sorted and turned as
    in ``like`` where it is given."""
    member = member.to(x.dtype)
    share_of_row = (weight / weight.sum().clamp_min(1e-12)).to(x.dtype)
    mean = share_of_row @ x
    variance = share_of_row @ (x - mean).square()
    size = member.sum(0)
    means = member.mT @ (x - mean) / size.clamp_min(1e-12)[:, None]
    between = (size / size.sum().clamp_min(1e-12)) @ means.square()
    varies = variance > 1e-10 * (mean.square() + 1e-20)
    share = torch.where(varies, between / torch.where(varies, variance, 1.0), 0.0)
    scale = torch.where(varies, torch.where(varies, variance, 1.0).rsqrt(), 0.0)
    if like is not None:
        turn = torch.where(like.scale < 0, -1.0, 1.0)
        view = View(like.columns, mean[like.columns], turn * scale[like.columns], share[like.columns])
        return view, torch.arange(len(size), device=x.device)
    # Classes are sorted by their means over all columns, and columns turned to rise with them: ties are rare.
    level = (means * scale) @ share.square()
    rises = (size * level) @ (means * scale)
    columns = (share + 1e-3 * rises.abs() / size.sum().clamp_min(1e-12)).argsort(descending=True, stable=True)
    view = View(columns, mean[columns], torch.where(rises < 0, -scale, scale)[columns], share[columns])
    place = level.masked_fill(size == 0, torch.inf).argsort(stable=True).argsort()
    return view, place


def _scores(x: Tensor, known: Tensor, weight: Tensor) -> Tensor:
    """Normal scores ``(Q, F)`` of the ranks of values among known ones ``(N, F)``; ties have the middle one."""
    counted = (weight / weight.sum().clamp_min(1e-12)).to(x.dtype)
    share = [
        torch.einsum(
            "qnf,n->qf", (known < part[:, None]).to(x.dtype) + (known == part[:, None]).to(x.dtype) / 2, counted
        )
        for part in x.split(max(1, HELD // known.numel()))
    ]
    return torch.special.ndtri(torch.cat(share).clamp(EDGE, 1 - EDGE))


def _digits(place: Tensor, way: int) -> Tensor:
    """The slots of each class ``(digits, way)``: its place, or where there are more classes than slots, the digits of
    several shuffled numberings of them."""
    if way <= SLOTS:
        return place[None]
    generator = torch.Generator().manual_seed(0)
    count = 2 + 2 * math.ceil(math.log(way, SLOTS))
    table = torch.stack([torch.randperm(way, generator=generator) % SLOTS for _ in range(count)])
    return table.to(place.device)[:, place]
