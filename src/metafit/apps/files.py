"""A fitted estimator as a folder: tensors as safetensors, everything else as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from metafit import backbones
from metafit.apps.coreset import known_from
from metafit.apps.drift import Drift
from metafit.apps.estimators import FewShotClassifier, FewShotRegressor, channels_last
from metafit.apps.inputs import Inputs, load_backbone
from metafit.apps.online import OnlineClassifier
from metafit.backbones.base import Backbone
from metafit.errors import BadInput
from metafit.learners import build
from metafit.weights import free_for, load_folder, save_folder, under

KIND = "predictor"
ESTIMATORS = {kind.__name__: kind for kind in (FewShotClassifier, FewShotRegressor, OnlineClassifier)}
Estimator = FewShotClassifier | FewShotRegressor


def save(estimator: Estimator, folder: str | os.PathLike[str]) -> None:
    """Saves a fitted estimator; the folder holds the old one whole until it holds the new one."""
    free_for(folder, KIND)
    inputs, learner = estimator.inputs_, estimator.learner_
    leaves, structure = tree_flatten(estimator.adapted_)
    tensors = {f"adapted/{i}": leaf for i, leaf in enumerate(leaves)}
    tensors |= {f"learner/{name}": value for name, value in learner.state_dict().items()}
    if inputs.mean is not None and inputs.scale is not None:
        tensors |= {"inputs/mean": inputs.mean, "inputs/scale": inputs.scale}
    about = {
        "estimator": type(estimator).__name__,
        "parameters": {name: _plain(value) for name, value in estimator.get_params().items()},
        "learner": {**learner.recipe, "way": learner.way},
        "adapted": treespec_dumps(structure),
        "channels_last": [i for i, leaf in enumerate(leaves) if channels_last(leaf)],
        "inputs": {
            "modality": inputs.modality,
            "trained": inputs.trained,
            "dtype": str(inputs.dtype).removeprefix("torch."),
            "backbone": _backbone(inputs),
        },
        "transductive": estimator.transductive_,
        "features": getattr(estimator, "n_features_in_", None),
        "columns": getattr(estimator, "columns_", {}),
        "feature_names": list(getattr(estimator, "feature_names_in_", [])),
    }
    if isinstance(estimator, FewShotClassifier):
        about |= {"classes": _labels(estimator.classes_), "temperature": estimator.temperature_}
        if isinstance(estimator, OnlineClassifier):
            about["stream"], remembered = _stream(estimator)
            tensors |= remembered
    else:
        tensors["target/mean"] = torch.tensor(estimator.target_mean_)
        tensors["target/scale"] = torch.tensor(estimator.target_scale_)
        about["one_target"] = estimator._one_target
    # leaves may share memory (the means of one class each), which safetensors refuses
    save_folder(folder, KIND, about, {name: value.detach().clone() for name, value in tensors.items()})


def load(folder: str | os.PathLike[str], backbone: nn.Module | None = None) -> Estimator:
    """Loads a fitted estimator, whichever it is, offline and without the data it was fitted on.

    Args:
        folder: what ``save`` wrote.
        backbone: the backbone, or the network that was trained, where it is your own and no name can load it.

    Raises:
        BadInput: no such folder, damaged, of another kind, or made with other weights of the backbone.
    """
    about, tensors = load_folder(folder, KIND)
    parameters = about["parameters"]
    if isinstance(backbone, Backbone) and parameters["model"] is None:
        parameters["backbone"] = backbone
    estimator = ESTIMATORS[about["estimator"]](**parameters)
    estimator.inputs_ = _inputs(folder, about["inputs"], tensors, backbone)
    made, inputs = about["learner"], estimator.inputs_
    body = inputs.backbone if isinstance(inputs.backbone, Backbone) else backbone
    if not inputs.trained:
        body = None
    elif body is None:
        raise BadInput(f"model folder {folder}: it holds a network of your own; pass one like it as backbone=")
    learner = build(made["name"], made["dim"], made["way"], body, made["outputs"], **made["options"]).to(inputs.dtype)
    try:
        learner.load_state_dict(under("learner/", tensors))
    except RuntimeError:
        raise BadInput(f"model folder {folder}: its weights do not fit the network that is given") from None
    estimator.learner_ = learner.eval()
    adapted = under("adapted/", tensors)
    leaves = [adapted[str(i)] for i in range(len(adapted))]
    for i in about["channels_last"]:
        leaves[i] = leaves[i].contiguous(memory_format=torch.channels_last)
    estimator.adapted_ = tree_unflatten(leaves, treespec_loads(about["adapted"]))
    estimator.transductive_ = about["transductive"]
    if about["features"] is not None:
        estimator.n_features_in_ = about["features"]
    estimator.columns_ = about.get("columns", {})
    if about["feature_names"]:
        estimator.feature_names_in_ = np.array(about["feature_names"], dtype=object)
    if isinstance(estimator, FewShotClassifier):
        kind, values = about["classes"]
        estimator.classes_ = np.array(values, dtype=kind)
        estimator.temperature_ = about["temperature"]
        if isinstance(estimator, OnlineClassifier):
            _resume_stream(estimator, about["stream"], tensors)
    else:
        estimator.target_mean_ = tensors["target/mean"].numpy()
        estimator.target_scale_ = tensors["target/scale"].numpy()
        estimator._one_target = about["one_target"]
    return estimator


def _stream(estimator: OnlineClassifier) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """All that going on needs beside what predicting needs; classes are named by their index."""
    index = {label: i for i, label in enumerate(estimator.classes_.tolist())}
    drift = asdict(estimator.drift_)
    for name, by_class in (("met", estimator.drift_.met), ("scores", estimator.drift_.scores)):
        drift[name] = [[index[label], value] for label, value in by_class.items()]
    about: dict[str, Any] = {"meta_trained": estimator._meta_trained, "drift": drift}
    tensors = {f"sums/{index[c]}/{name}": sum for c, sums in estimator._sums.items() for name, sum in sums.items()}
    for name, memory in (("memory", estimator.memory_), ("rejected", estimator.rejected_)):
        about[name] = {}
        for label, part in memory.items():
            about[name][str(index[label])], kept = part.state()
            tensors |= {f"{name}/{index[label]}/{field}": value for field, value in kept.items()}
    return about, tensors


def _resume_stream(estimator: OnlineClassifier, about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    labels, drift = estimator.classes_.tolist(), about["drift"]
    estimator._meta_trained = about["meta_trained"]
    by_class = {name: {labels[i]: value for i, value in drift[name]} for name in ("met", "scores")}
    estimator.drift_ = Drift(**{**drift, **by_class})
    estimator.memory_, estimator.rejected_ = (
        {labels[int(i)]: known_from(part, under(f"{name}/{i}/", tensors)) for i, part in about[name].items()}
        for name in ("memory", "rejected")
    )
    sums = {label: under(f"sums/{i}/", tensors) for i, label in enumerate(labels)}
    estimator._sums = {label: row for label, row in sums.items() if row}


def _backbone(inputs: Inputs) -> dict[str, Any] | None:
    if inputs.backbone is None:
        return None
    found = load_backbone(inputs.backbone, inputs.options)
    named = found.options is not None
    return {
        "name": found.name,
        "options": found.options if named else None,
        "fingerprint": None if inputs.trained else found.fingerprint(),
    }


def _inputs(
    folder: str | os.PathLike[str], about: dict[str, Any], tensors: dict[str, Any], own: nn.Module | None
) -> Inputs:
    inputs = Inputs(about["modality"], trained=about["trained"], dtype=getattr(torch, about["dtype"]))
    inputs.mean, inputs.scale = tensors.get("inputs/mean"), tensors.get("inputs/scale")
    named = about["backbone"]
    if named is None:
        return inputs
    if isinstance(own, Backbone):
        inputs.backbone = own
    elif named["options"] is None:
        raise BadInput(f"model folder {folder}: its backbone {named['name']!r} is your own; pass it as backbone=")
    elif inputs.trained:  # a network of its own, whose weights come from the folder
        inputs.backbone, inputs.options = backbones.load(named["name"], **named["options"]), named["options"]
    else:
        inputs.backbone, inputs.options = named["name"], named["options"]
    if not inputs.trained and load_backbone(inputs.backbone, inputs.options).fingerprint() != named["fingerprint"]:
        raise BadInput(
            f"model folder {folder}: the backbone {named['name']!r} has other weights or preprocessing here than where "
            "it was saved; install the metafit that saved it, or fit again"
        )
    return inputs


def _labels(classes: np.ndarray) -> tuple[str, list[Any]]:
    """Type and values of the classes; text, whole numbers, floats and booleans come back as they were."""
    values = classes.tolist()
    try:
        same = json.loads(json.dumps(values, allow_nan=False)) == values
    except (TypeError, ValueError):
        same = False
    if not same:
        raise BadInput(f"classes of type {type(values[0]).__name__} cannot be saved; use texts or numbers as labels")
    return classes.dtype.str if classes.dtype.kind != "O" else "object", values


def _plain(value: Any) -> Any:
    """A constructor parameter as JSON has it; ``None`` for objects that only live in memory."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return None
