"""A classifier of which the queries are told apart with confidence, and evenly."""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from metafit.errors import BadInput
from metafit.learners.base import Adapted, mask_absent, members
from metafit.learners.prototype import PrototypeLearner
from metafit.task import Examples

TINY = 1e-30


class TIMLearner(PrototypeLearner):
    """Class weights that maximise the mutual information of queries and their answers, beside the support labels (TIM,
    Boudiaf et al., 2020, arXiv:2008.11297, eq. 3), by the paper's alternating updates (propositions 1 and 2).

    Scores are −‖z − w‖² / τ of features of length 1. Transductive: an answer depends on the other queries that it is
    asked with; it takes the classes to be about as frequent as each other among them.

    Args:
        body: the embedding, from inputs to ``(N, dim)``.
        way: the most classes of a task.
        temperature: τ; 2/15 is the paper's.
        rounds: of alternating updates.
        confidence: α, the weight of the conditional entropy.
        labels: λ, the weight of the support labels.
    """

    def __init__(
        self,
        body: nn.Module,
        way: int,
        temperature: float = 2 / 15,
        rounds: int = 50,
        confidence: float = 1.0,
        labels: float = 1.0,
    ):
        super().__init__(body, way, "euclidean", temperature, normalise=True)
        if index(rounds) < 1:
            raise BadInput(f"rounds {rounds}: needs at least 1")
        if not (confidence >= 0 and labels > 0):
            raise BadInput(f"confidence {confidence}, labels {labels}: need 0 or more, and more than 0")
        self.rounds, self.confidence, self.labels = rounds, confidence, labels

    @property
    def transductive(self) -> str:
        return "the classifier maximises its information about the query inputs"

    def adapt(self, support: Examples) -> Adapted:
        assert self.way is not None
        return {
            **super().adapt(support),
            "known": self.embed(support.x),
            "member": members(support, self.way),
        }

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        asked = self.embed(x)
        return mask_absent(self.scores(asked, self.classifier(adapted, asked)), adapted["present"])

    def classifier(self, adapted: Adapted, asked: Tensor) -> Tensor:
        """The class weights ``(way, dim)`` after all rounds, for embedded queries."""
        known, here = adapted["known"], adapted["present"]
        member = adapted["member"].to(known.dtype)
        counts = member.sum(-1, keepdim=True)
        heft = self.labels * len(asked) / ((1 + self.confidence) * counts.sum().clamp_min(1))
        found: Tensor = adapted["prototypes"]
        for _ in range(self.rounds):
            p = mask_absent(self.scores(asked, found), here).softmax(-1)
            q = balanced(p, self.confidence)
            told = counts * mask_absent(self.scores(known, found), here).softmax(-1)
            pull = heft * pulled(known, member, told, found) + pulled(asked, q, p, found)
            found = pull / torch.where(here, heft * member.sum(0) + q.sum(0), 1.0)[:, None]
        return found


def balanced(p: Tensor, confidence: float) -> Tensor:
    """Surer answers than p, of which each class gets a fairer share (proposition 1)."""
    sharp = p ** (1 + confidence)
    even = sharp / sharp.sum(0).clamp_min(TINY).sqrt()
    return even / even.sum(-1, keepdim=True).clamp_min(TINY)


def pulled(features: Tensor, target: Tensor, found: Tensor, centres: Tensor) -> Tensor:
    """Σᵢ targetᵢₖ·zᵢ + foundᵢₖ·(wₖ − zᵢ), for each class."""
    return target.mT @ features + found.sum(0)[:, None] * centres - found.mT @ features
