"""A regularised linear model on the embeddings, fitted anew for each task by scikit-learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafit.errors import BadInput
from metafit.learners.base import Adapted, Learner, mask_absent, present
from metafit.task import Examples, weights


class LinearLearner(Learner):
    """Logistic regression, or ridge regression where ``way`` is ``None``. Nothing is meta-learned.

    Args:
        body: the embedding, from inputs to ``(N, dim)``.
        way: the most classes of a task, ``None`` for regression.
        strength: inverse of the L2 penalty (scikit-learn's C; ridge takes 1 / strength).
    """

    vmappable = False

    def __init__(self, body: nn.Module, way: int | None, strength: float = 1.0):
        super().__init__(way)
        if not strength > 0:
            raise BadInput(f"strength {strength}: needs to be above 0")
        self.body, self.strength = body, strength

    @torch.no_grad()
    def adapt(self, support: Examples) -> Adapted:
        features = self.body(support.x)
        x, y = features.double().cpu().numpy(), support.y.cpu().numpy()
        weight = weights(support).double().cpu().numpy()
        if self.way is None:
            from sklearn.linear_model import Ridge

            ridge = Ridge(alpha=1 / self.strength).fit(x, y, sample_weight=weight)
            coefficients, bias = ridge.coef_.reshape(y.shape[1], -1), ridge.intercept_.reshape(-1)
            return {"coefficients": features.new_tensor(coefficients), "bias": features.new_tensor(bias)}
        from sklearn.linear_model import LogisticRegression

        kept = weight > 0
        here = present(support, self.way)
        table = features.new_zeros(self.way, x.shape[1])
        bias = features.new_zeros(self.way)
        if int(here.sum()) > 1:
            model = LogisticRegression(C=self.strength, max_iter=1000).fit(x[kept], y[kept], sample_weight=weight[kept])
            if len(model.classes_) == 2:  # scikit-learn keeps the second class's score alone
                table[model.classes_[1]] = features.new_tensor(model.coef_[0])
                bias[model.classes_[1]] = float(model.intercept_[0])
            else:
                index = torch.as_tensor(model.classes_, device=features.device)
                table[index] = features.new_tensor(model.coef_)
                bias[index] = features.new_tensor(model.intercept_)
        return {"coefficients": table, "bias": bias, "present": here}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        outputs = self.body(x) @ adapted["coefficients"].T + adapted["bias"]
        return outputs if self.way is None else mask_absent(outputs, adapted["present"])
