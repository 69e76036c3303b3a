"""Relation networks: the comparison of a query with a class is learned, too."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from metafit.learners.base import Adapted, Learner, class_means, mask_absent
from metafit.task import Examples


class RelationLearner(Learner):
    """A small network scores how a query relates to a class (Sung et al., 2018, arXiv:1711.06025, eq. 1-2).

    The network sees the embedding of the query beside that of the class. Here a class is the mean of its examples
    (the paper's is their sum), so that what was trained at one shot serves any; and the scores are logits under
    cross-entropy (the paper's are numbers between 0 and 1 under squared error).

    Args:
        body: the embedding, from inputs to ``(N, dim)``.
        dim: its size.
        way: the most classes of a task.
        hidden: units of the network.
    """

    def __init__(self, body: nn.Module, dim: int, way: int, hidden: int = 128):
        super().__init__(way)
        self.body = body
        # the first layer of the pair, as the sum of a part for each: no (Q, way, 2·dim) is ever made
        self.of_class, self.of_query = nn.Linear(dim, hidden), nn.Linear(dim, hidden, bias=False)
        self.between, self.last = nn.Linear(hidden, hidden), nn.Linear(hidden, 1)

    def adapt(self, support: Examples) -> Adapted:
        means, here = class_means(self.body(support.x), support, self.way)
        return {"classes": self.of_class(means), "present": here}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        pairs = F.relu(self.of_query(self.body(x))[:, None] + adapted["classes"])
        return mask_absent(self.last(F.relu(self.between(pairs)))[..., 0], adapted["present"])
