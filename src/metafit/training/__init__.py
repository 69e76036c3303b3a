"""Meta-training, pretraining and model folders."""

from metafit.training.distil import distil
from metafit.training.meta_train import meta_train, of_torchrun
from metafit.training.pretrain import pretrain
from metafit.training.ranks import fully_sharded
from metafit.training.run import Training
from metafit.training.self_supervised import pretrain_alike, pretrain_denoising
from metafit.training.store import Model, Recipe, load_model, save_model, save_tasks
from metafit.training.tracking import Run, track

__all__ = [
    "Model",
    "Recipe",
    "Run",
    "Training",
    "distil",
    "fully_sharded",
    "load_model",
    "meta_train",
    "of_torchrun",
    "pretrain",
    "pretrain_alike",
    "pretrain_denoising",
    "save_model",
    "save_tasks",
    "track",
]
