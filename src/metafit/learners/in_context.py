"""A transformer that reads a table's labelled rows and tells the class of others, in one pass."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafit.errors import BadInput
from metafit.learners.attention import Block, ask, read
from metafit.learners.base import Adapted, Learner, class_means, mask_absent, members
from metafit.learners.opinions import OPINIONS, TAIL, Opinions, opinions
from metafit.task import Examples, weights

SLOTS = 10  # classes that it tells apart at once
COLUMNS = 32  # that it reads
EDGE = 0.02  # no rank is nearer to the ends


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

    weighs = False

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

    def embed(self, x: Any) -> Tensor:
        return self.body(x).to(self.trust.dtype)

    def adapt(self, support: Examples) -> Adapted:
        assert self.way is not None  # the catalogue refuses regression
        x, weight = self.embed(support.x), weights(support)
        with torch.autocast(x.device.type, enabled=False):  # what columns and ranks are takes full precision
            plain, means, size = _columns(x, support, self.way)
            view, place = _sorted(plain, means, size)
        views = [self._view(x, view, place, support.y, weight)]
        if self.ranks:  # in the order of the values: ranks of few rows tie too often to have one
            scores = _scores(x, x, weight)
            with torch.autocast(x.device.type, enabled=False):
                ranked = _columns(scores, support, self.way)[0].turned(view.columns, view.turn)
            views.append(self._view(scores, ranked, place, support.y, weight))
        return {"views": views, "x": x, "weight": weight, "present": size > 0}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        x = self.embed(x)
        seen = [x, _scores(x, adapted["x"], adapted["weight"])] if self.ranks else [x]
        answers = [self._answer(one, known, adapted) for one, known in zip(seen, adapted["views"], strict=True)]
        return mask_absent(torch.stack(answers).mean(0), adapted["present"])

    def _view(self, x: Tensor, view: View, place: Tensor, y: Tensor, weight: Tensor) -> Adapted:
        """The support set through a view: for each digit of the classes, what is simply said, and the rows' states."""
        rows, slots, read_as = view.rows(x), _digits(place, len(place)), []  # slots: (digits, way)
        for slot in slots:
            labels = (slot[y][:, None] == torch.arange(SLOTS, device=y.device)) * weight[:, None].to(rows.dtype)
            known, said = opinions(rows, labels, view.share)
            tokens = self._tokens(view.share, rows, said) + self.codes[slot[y]]
            read_as.append({"opinions": known._asdict(), "states": read(self.blocks, tokens, weight)})
        return {"view": view._asdict(), "slots": slots, "digits": read_as}

    def _answer(self, x: Tensor, known: Adapted, adapted: Adapted) -> Tensor:
        """Log-probabilities ``(Q, way)``; 0 for absent classes."""
        view, present = View(**known["view"]), adapted["present"]
        rows, scores = view.rows(x), x.new_zeros(len(x), len(present))
        for slot, digit in zip(known["slots"], known["digits"], strict=True):
            said = Opinions(**digit["opinions"]).of(rows)
            tokens = self._tokens(view.share, rows, said) + self.codes[SLOTS]
            tokens = self.norm(ask(self.blocks, tokens, digit["states"], adapted["weight"]))
            logits = self.out(tokens) + (self.trust[:, None] * said).sum(-2)
            used = (slot[:, None] == torch.arange(SLOTS, device=slot.device)) & present[:, None]
            told = logits.masked_fill(~used.any(0), -torch.inf).log_softmax(-1)
            scores = scores + torch.where(present, told[:, slot], 0.0)
        return scores

    def _tokens(self, share: Tensor, rows: Tensor, said: Tensor) -> Tensor:
        seen = torch.stack([rows, rows * share], -2)[..., :COLUMNS]
        seen = F.pad(seen, (0, COLUMNS - seen.shape[-1]))
        return self.read(torch.cat([seen.flatten(-2), said.flatten(-2)], -1))


class View(NamedTuple):
    """How the network sees columns ``(F,)``: which, turned (−1) or not (1), from where, in what unit, and how much of
    their variance is between the classes."""

    columns: Tensor
    turn: Tensor
    mean: Tensor
    scale: Tensor
    share: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """``(N, F)`` of ``(N, F)``: sorted, scaled, and no value far out."""
        return TAIL * torch.tanh((x[:, self.columns] - self.mean) * (self.turn * self.scale) / TAIL)

    def turned(self, columns: Tensor, turn: Tensor) -> View:
        """Those columns of it, in that order, turned so."""
        return View(self.columns[columns], turn, self.mean[columns], self.scale[columns], self.share[columns])


def _columns(x: Tensor, support: Examples, way: int) -> tuple[View, Tensor, Tensor]:
    """The columns as they come; each class's mean in their units ``(way, F)``, and its size ``(way,)``."""
    weight = weights(support)
    counted = (weight / weight.sum().clamp_min(1e-12)).to(x.dtype)
    mean = counted @ x
    variance = counted @ (x - mean).square()
    means, _ = class_means(x - mean, support, way)
    size = members(support, way).to(x.dtype).sum(0)
    between = (size / size.sum().clamp_min(1e-12)) @ means.square()
    varies = variance > 1e-10 * (mean.square() + 1e-20)
    share = torch.where(varies, between / torch.where(varies, variance, 1.0), 0.0)
    scale = torch.where(varies, torch.where(varies, variance, 1.0).rsqrt(), 0.0)
    place = torch.arange(x.shape[-1], device=x.device)
    return View(place, torch.ones_like(mean), mean, scale, share), means * scale, size


def _sorted(view: View, means: Tensor, size: Tensor) -> tuple[View, Tensor]:
    """The columns sorted by what they tell and turned to rise with the classes; the place of each class in their order
    ``(way,)``, absent ones last. Classes are sorted by their means over all columns: ties are rare."""
    level = means @ view.share.square()
    rises = (size * level) @ means
    columns = (view.share + 1e-3 * rises.abs() / size.sum().clamp_min(1e-12)).argsort(descending=True, stable=True)
    place = level.masked_fill(size == 0, torch.inf).argsort(stable=True).argsort()
    return view.turned(columns, torch.where(rises < 0, -1.0, 1.0).to(means.dtype)[columns]), place


def _scores(x: Tensor, known: Tensor, weight: Tensor) -> Tensor:
    """Normal scores ``(Q, F)`` of the ranks of values among known ones ``(N, F)``; ties have the middle one."""
    values, order = known.mT.contiguous().sort(-1)
    below = F.pad(weight.to(x.dtype)[order].cumsum(-1), (1, 0))  # (F, N + 1)
    asked = x.mT.contiguous()
    places = (torch.searchsorted(values, asked, right=right) for right in (False, True))
    low, high = (below.gather(-1, place) for place in places)
    share = (low + high).mT / (2 * weight.sum().clamp_min(1e-12))
    with torch.autocast(x.device.type, enabled=False):
        return torch.special.ndtri(share.clamp(EDGE, 1 - EDGE))


def _digits(place: Tensor, way: int) -> Tensor:
    """The slots of each class ``(digits, way)``: its place, or where there are more classes than slots, the digits of
    several shuffled numberings of them."""
    if way <= SLOTS:
        return place[None]
    generator = torch.Generator().manual_seed(0)
    count = 2 + 2 * math.ceil(math.log(way, SLOTS))
    table = torch.stack([torch.randperm(way, generator=generator) % SLOTS for _ in range(count)])
    return table.to(place.device)[:, place]
