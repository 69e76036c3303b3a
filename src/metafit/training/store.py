"""A trained model as a folder: weights as safetensors, everything else as JSON."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from metafit import backbones
from metafit.errors import BadInput
from metafit.learners import Learner, build
from metafit.weights import load_folder, save_folder

TASKS = "tasks.json"
STATE, STATE_KIND = "state.json", "training state"


@dataclass
class Recipe:
    """How a model is made again before its weights are loaded.

    Attributes:
        backbone: name of the backbone, ``None`` where inputs are plain feature vectors.
        backbone_options: what it is loaded with.
        trained: whether the backbone is part of the learner (trained and saved with it) or gives frozen features.
        scaling: ``{"mean": [...], "scale": [...]}`` of plain vectors: x becomes (x − mean) / scale.
        columns: names of the columns of plain vectors, in order, where they came with names.
        classes: names of the classes that it was trained on, or chosen by, which cannot test it.
        source: the data that it was meta-trained on, for people.
        training: the protocol and the options of meta-training, for people.
    """

    backbone: str | None = None
    backbone_options: dict[str, Any] = field(default_factory=dict)
    trained: bool = False
    scaling: dict[str, list[float]] | None = None
    columns: list[str] | None = None
    classes: list[str] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


@dataclass
class Model:
    """A learner and what its inputs go through first.

    Attributes:
        tasks: embeddings of some of its training tasks (``data.diversity.task_embeddings``), where they were kept.
    """

    learner: Learner
    recipe: Recipe
    history: list[dict[str, Any]] = field(default_factory=list)
    tasks: Tensor | None = None


def save_model(
    folder: str | os.PathLike[str],
    learner: Learner,
    recipe: Recipe,
    history: list[dict[str, Any]] | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Saves a learner of the catalogue; the folder holds the old model whole until it holds the new one.

    Args:
        weights: where the learner's own are spread over processes.

    Raises:
        BadInput: the learner was not made by ``build``, so that nothing says how to make it again.
    """
    if not hasattr(learner, "recipe"):
        raise BadInput(
            f"learner {type(learner).__name__} cannot be saved: it is not of the catalogue; save its state_dict()"
        )
    about = {"learner": learner.recipe, "recipe": asdict(recipe), "history": history or []}
    weights = learner.state_dict() if weights is None else weights
    # what the training was judged by is none of the model's
    save_folder(folder, "learner", about, {n: w for n, w in weights.items() if not n.startswith("criterion.")})


def load_model(folder: str | os.PathLike[str], body: nn.Module | None = None) -> Model:
    """Loads what ``save_model`` saved, offline.

    Args:
        folder: the model folder.
        body: the network, where the model was made with a module that has no name in the backbone catalogue.

    Raises:
        BadInput: no such folder, not a model, damaged, or from a newer metafit.
    """
    about, tensors = load_folder(folder, "learner")
    if "env" in about["learner"]:
        raise BadInput(
            f"model folder {folder}: holds an agent that acts in environments; metafit.rl.load_agent loads it"
        )
    recipe, own = Recipe(**about["recipe"]), body is not None
    if body is None and recipe.trained:
        if recipe.backbone is None:
            raise BadInput(f"model folder {folder}: it was made with a network of your own; pass it as body=")
        body = backbones.load(recipe.backbone, **recipe.backbone_options)
    made = about["learner"]
    learner = build(made["name"], made["dim"], made["way"], body, made["outputs"], **made["options"])
    for name, value in learner.state_dict(keep_vars=True).items():
        if name in tensors:  # in the precision that they were saved in
            value.data = value.data.to(tensors[name].dtype)
    try:
        learner.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split()).partition(": ")[2]
        what = "the network that body= gives"
        if not own:
            what = "this version of metafit (train it anew), or were made with a network of your own (pass it as body=)"
        raise BadInput(f"model folder {folder}: its weights do not fit {what}: {reason}") from None
    tasks = load_folder(folder, "training tasks", TASKS)[1]["embeddings"] if (Path(folder) / TASKS).exists() else None
    return Model(learner.eval(), recipe, about["history"], tasks)


def save_tasks(folder: str | os.PathLike[str], embeddings: Tensor) -> None:
    """Keeps embeddings of training tasks beside the model, which new tasks are held against."""
    save_folder(folder, "training tasks", {}, {"embeddings": embeddings.float()}, TASKS)
