"""Meta-training, pretraining and model folders."""

from metafit.training.distil import distil
from metafit.training.meta_train import Training, meta_train
from metafit.training.pretrain import pretrain
from metafit.training.self_supervised import pretrain_alike, pretrain_denoising
from metafit.training.store import Model, Recipe, load_model, save_model, save_tasks

__all__ = [
    "Model",
    "Recipe",
    "Training",
    "distil",
    "load_model",
    "meta_train",
    "pretrain",
    "pretrain_alike",
    "pretrain_denoising",
    "save_model",
    "save_tasks",
]
