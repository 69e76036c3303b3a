"""Meta-optimizers: how gradients become new parameters, a rule that can itself be learned."""

from metafit.optim.adam import Adam
from metafit.optim.alfa import ALFA
from metafit.optim.base import MetaOptimizer, Params, State
from metafit.optim.curvature import MetaCurvature
from metafit.optim.defences import DropGrad, EarlyStop, Proximal
from metafit.optim.lstm import LSTMOptimizer
from metafit.optim.meta_sgd import MetaSGD
from metafit.optim.mlp import MLPOptimizer
from metafit.optim.per_step import PerStepSGD
from metafit.optim.sgd import SGD
from metafit.optim.t_net import TNet

__all__ = [
    "ALFA",
    "SGD",
    "Adam",
    "DropGrad",
    "EarlyStop",
    "LSTMOptimizer",
    "MLPOptimizer",
    "MetaCurvature",
    "MetaOptimizer",
    "MetaSGD",
    "Params",
    "PerStepSGD",
    "Proximal",
    "State",
    "TNet",
]
