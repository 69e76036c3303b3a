"""Meta-optimizers: how gradients become new parameters, a rule that can itself be learned."""

from metafit.optim.base import MetaOptimizer, Params, State
from metafit.optim.meta_sgd import MetaSGD
from metafit.optim.sgd import SGD

__all__ = ["SGD", "MetaOptimizer", "MetaSGD", "Params", "State"]
