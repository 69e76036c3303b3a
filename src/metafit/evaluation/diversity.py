"""How different the training tasks are from each other, and how alike the test tasks are to them."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from metafit.data.diversity import UNUSUAL, likeness, similarities, vendi


def describe_tasks(training: Float[Tensor, "t dim"], test: Float[Tensor, "n dim"]) -> dict[str, Any]:
    """What the report says of the tasks, from embeddings of some of each (``data.diversity.task_embeddings``).

    Returns:
        ``tasks`` looked at; ``effective``, how many different ones there are among them (``vendi``); ``similarity``,
        the mean cosine between two of them; ``nearest``, that of a test task with the training task most like it, and
        ``among_training`` the same of training tasks; ``unlike``, the share of test tasks that are further from the
        training tasks than 95 % of those are from each other.
    """
    kernel, total = similarities(training), len(training)
    alike = likeness(test, training)
    figures = {
        "effective": vendi(kernel),
        "similarity": float((kernel.sum() - kernel.trace()) / (total * (total - 1))),
        "nearest": alike["nearest"],
        "among_training": alike["among_known"],
        "unlike": float((alike["rank"] < UNUSUAL).double().mean()),
    }
    return {"tasks": total, **{name: round(value, 6) for name, value in figures.items()}}
