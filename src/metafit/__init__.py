"""Meta-learning on pretrained models: learn a new task from a handful of examples.

The names below are what most programs need; the packages (``metafit.data``, ``metafit.backbones``, ...) hold the rest.
Each name is imported when it is first used, so that ``import metafit`` itself takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metafit._version import __version__
from metafit.errors import BadInput

if TYPE_CHECKING:
    from metafit.apps import FewShotClassifier, FewShotRegressor, OnlineClassifier
    from metafit.data import Source, TaskSampler
    from metafit.evaluation.evaluate import compare, evaluate
    from metafit.learners import build
    from metafit.over_tasks import meta_gradient
    from metafit.task import Examples, Task
    from metafit.training.meta_train import meta_train
    from metafit.training.store import load_model

__all__ = [
    "BadInput",
    "Examples",
    "FewShotClassifier",
    "FewShotRegressor",
    "OnlineClassifier",
    "Source",
    "Task",
    "TaskSampler",
    "__version__",
    "build",
    "compare",
    "evaluate",
    "load_model",
    "meta_gradient",
    "meta_train",
]

_HOME = {
    "Examples": "metafit.task",
    "FewShotClassifier": "metafit.apps",
    "FewShotRegressor": "metafit.apps",
    "OnlineClassifier": "metafit.apps",
    "Source": "metafit.data",
    "Task": "metafit.task",
    "TaskSampler": "metafit.data",
    "build": "metafit.learners",
    "compare": "metafit.evaluation.evaluate",
    "evaluate": "metafit.evaluation.evaluate",
    "load_model": "metafit.training.store",
    "meta_gradient": "metafit.over_tasks",
    "meta_train": "metafit.training.meta_train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'metafit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
