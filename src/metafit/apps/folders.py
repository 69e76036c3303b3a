"""From files to answers: what ``metafit adapt`` and ``metafit predict`` do."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metafit.apps.estimators import FewShotClassifier, FewShotRegressor
from metafit.apps.files import KIND, load
from metafit.apps.online import OnlineClassifier
from metafit.apps.scoring import accuracy_told, error_told
from metafit.data import Table, read, table
from metafit.data.diversity import UNUSUAL
from metafit.data.folder import check_images, images_by_class, images_of
from metafit.data.tables import is_table, rows
from metafit.disk import writable_folder
from metafit.errors import BadInput
from metafit.learners import entry
from metafit.progress import say
from metafit.weights import free_for, load_index


def adapt_folder(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    text: str | None = None,
    label: str = "label",
    features: Sequence[str] | None = None,
    learner: str = "auto",
    backbone: str | None = "auto",
    regression: bool = False,
) -> FewShotClassifier | FewShotRegressor:
    """Fits an estimator to a labelled table or folder of images, and saves it.

    Args:
        data: a table with a label column, or a folder with one sub-folder of images a class.
        out: folder for the predictor.
        model: a meta-trained model folder; the packaged default without it.
        text, label, features: columns of a table.
        learner, backbone: of the estimator, where there is no model.
        regression: the labels are numbers.

    Raises:
        BadInput: from reading, fitting or writing; nothing is written then.
    """
    if Path(data).is_dir() and Path(data).resolve() == Path(out).resolve():
        raise BadInput(f"output folder {out}: it is the folder of the data; name another")
    free_for(out, KIND)
    kind = FewShotRegressor if regression else OnlineClassifier
    estimator = kind(model=model, learner=learner, backbone=backbone)
    if is_table(data):
        trained_on = (
            None if model is None or text is not None else load_index(model, "learner")["recipe"].get("columns")
        )
        if trained_on is not None and (features is None or set(features) == set(trained_on)):
            features = trained_on  # by their names, however the file orders them
        found = table(data, text, label, features, numeric_label=regression)
        estimator.columns_ = {"text": text, "features": list(found.features), "label": label}
        x, y = found.x, found.y
    elif regression:
        raise BadInput(f"{data}: numbers to predict come from a table; give a .csv, .tsv or .parquet file")
    else:
        source = read(data)
        x = source.x if source.raw is None else source.raw
        y = [source.classes[c] for c in source.y.tolist()]
        estimator.columns_ = {}
    estimator.fit(x if isinstance(x, list) else x.numpy(), y)
    if model is None and learner not in ("auto", "in-context") and entry(learner).meta_trained:
        say(
            f"{learner} learns from past tasks, and has seen none: train it first (metafit train) and name it by "
            "--model, or leave --learner out"
        )
    estimator.save(out)
    say(f"learned {len(set(y or []))} {'values' if regression else 'classes'} from {len(y or [])} examples: {out}")
    usual = getattr(estimator, "usual_", None)
    if usual is not None and usual < UNUSUAL:
        say(
            f"this task is unlike those that {model} was trained on: compare its answers with those of `metafit adapt` "
            "without --model before you rely on them"
        )
    return estimator


def update_folder(
    folder: str | os.PathLike[str], data: str | os.PathLike[str] | None = None, forget: Sequence[str] = ()
) -> OnlineClassifier:
    """Goes on learning in a folder of ``adapt_folder``: classes to forget, then more labelled examples.

    Args:
        folder: the predictor; it holds the old one whole until it holds the new one.
        data: a table with the columns that it learned from, or a folder with one sub-folder of images a class.
        forget: classes.

    Raises:
        BadInput: no predictor of classes, or from reading, learning or writing; the folder then stays as it was.
    """
    estimator = load(folder)
    if not isinstance(estimator, OnlineClassifier):
        raise BadInput(
            f"{folder}: holds a {type(estimator).__name__}, which remembers no examples; adapt it to all of them anew"
        )
    writable_folder(folder)
    done = [f"forgot {label!r}" for label in forget]
    for label in forget:  # labels that are numbers, too
        estimator.forget(next((known for known in estimator.classes_.tolist() if str(known) == label), label))
    if data is not None:
        x, y = _labelled(estimator, data, folder)
        known, alarms = set(estimator.classes_.tolist()), len(estimator.drift_.alarms)
        estimator.partial_fit(x, y)
        new = ", ".join(repr(label) for label in sorted(set(y) - known))
        done.append(f"learned {len(y)} more examples" + (f", new classes {new}" if new else ""))
        if len(estimator.drift_.alarms) > alarms:
            done.append(
                f"drift: the new examples are not like those before (a false alarm once in {estimator.drift_.every} "
                "examples at most, on average); look at their labels, and adapt anew if the old ones no longer hold"
            )
    estimator.save(folder)
    for line in done:
        say(line)
    return estimator


def predict_folder(folder: str | os.PathLike[str], data: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Answers for every row of a table, or every image of a folder; says how right they are where there are labels.

    Returns:
        For each input: the columns of the table, or ``file``; ``prediction``; for classes, its ``confidence``.

    Raises:
        BadInput: not a predictor, or inputs of another kind than it learned from.
    """
    estimator = load(folder)
    asked = _images if estimator.inputs_.modality == "image" else _rows
    x, shown, labels = asked(estimator, folder, data)
    if estimator.transductive_:
        say(f"answers depend on the other inputs of the same call: {estimator.transductive_}")
    if isinstance(estimator, FewShotRegressor):
        values = estimator.predict(x)
        _check_finite(data, values)
        told = [{"prediction": value} for value in values.tolist()]
        score = error_told(labels, values.tolist()) if values.ndim == 1 else ""
    else:
        probabilities = estimator.predict_proba(x)
        _check_finite(data, probabilities)
        answers = estimator.classes_[probabilities.argmax(1)].tolist()
        sure = probabilities.max(1).tolist()
        told = [{"prediction": answer, "confidence": round(p, 4)} for answer, p in zip(answers, sure, strict=True)]
        score = accuracy_told(labels, answers, estimator.classes_.tolist())
    replaced = [name for name in told[0] if name in shown[0]]
    if replaced:
        say(f"{data}: among the answers, its columns {', '.join(map(repr, replaced))} are replaced")
    if score:
        say(score)
    return [{**row, **answer} for row, answer in zip(shown, told, strict=True)]


class AsWritten(float):
    """A number of a table, which CSV gets in the digits that the file has."""

    cell: str

    def __new__(cls, cell: Any) -> AsWritten:
        made = super().__new__(cls, cell)
        made.cell = str(cell)
        return made

    def __str__(self) -> str:
        return self.cell


Asked = tuple[Any, list[dict[str, Any]], list[Any]]  # inputs, what is shown of each, and its label or None


def _images(estimator: Any, folder: str | os.PathLike[str], data: str | os.PathLike[str]) -> Asked:
    """Images in sub-folders that are called as classes count as labelled."""
    if not Path(data).is_dir():
        raise BadInput(f"{data}: {folder} learned from images; give a folder of images")
    files = images_of(Path(data))
    check_images(files)
    classes = {str(label) for label in getattr(estimator, "classes_", np.array([])).tolist()}
    first = [file.relative_to(data).parts[0] for file in files]
    labels = [name if name in classes else None for name in first]
    return files, [{"file": str(file)} for file in files], labels


def _rows(estimator: Any, folder: str | os.PathLike[str], data: str | os.PathLike[str]) -> Asked:
    """Rows of a table with the columns that it learned from, and perhaps others."""
    text, found = _table(estimator, folder, data, None)
    shown = [{name: _plain(cell) for name, cell in row.items()} for row in rows(data, found)]
    label = estimator.columns_.get("label", "label")
    labels = [None if label in found.features else row.get(label) for row in shown]
    if text:
        return found.x, shown, labels
    x = found.x.numpy()
    if x.shape[1] != estimator.n_features_in_:
        raise BadInput(
            f"{data}: {x.shape[1]} feature columns, {folder} learned from {estimator.n_features_in_}; "
            "give the same columns"
        )
    for row in shown:
        row |= {name: AsWritten(row[name]) for name in found.features}
    return x, shown, labels


def _labelled(
    estimator: OnlineClassifier, data: str | os.PathLike[str], folder: str | os.PathLike[str]
) -> tuple[Any, list[Any]]:
    """More inputs and labels for it, as ``adapt_folder`` read the first."""
    if estimator.inputs_.modality == "image":
        images = images_by_class(data)
        return [f for files in images.values() for f in files], [name for name, files in images.items() for _ in files]
    text, found = _table(estimator, folder, data, estimator.columns_.get("label", "label"))
    return found.x if text else found.x.numpy(), found.y or []


def _table(
    estimator: Any, folder: str | os.PathLike[str], data: str | os.PathLike[str], label: str | None
) -> tuple[str | None, Table]:
    """Its text column, if it reads texts, and the table with the columns that it learned from."""
    if not is_table(data):
        raise BadInput(
            f"{data}: {folder} learned from a table; give a .csv, .tsv or .parquet file with the same columns"
        )
    text, features = _columns(estimator)
    return text, table(data, text, label, features)


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV with a header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else ["prediction"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _columns(estimator: FewShotClassifier | FewShotRegressor) -> tuple[str | None, list[str] | None]:
    """Its text column, or its feature columns; ``None`` for all numeric ones, where it was fitted to bare arrays."""
    if estimator.columns_:
        text = estimator.columns_["text"]
        return text, None if text else estimator.columns_["features"]
    if estimator.inputs_.modality == "text":
        return "text", None
    names = getattr(estimator, "feature_names_in_", None)
    return None, None if names is None else list(names)


def _plain(cell: Any) -> Any:
    """A cell as JSON has it: dates and the like as texts, what is no number as nothing."""
    if isinstance(cell, float) and not math.isfinite(cell):
        return None
    return cell if cell is None or isinstance(cell, str | int | float) else str(cell)


def _check_finite(data: str | os.PathLike[str], answers: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(answers.reshape(len(answers), -1)).all(1))
    if len(bad):
        raise BadInput(
            f"{data}: the answer to input {bad[0] + 1} is not a finite number ({len(bad)} such); its features may be "
            "far larger than those that were learned from"
        )
