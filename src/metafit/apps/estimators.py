"""Estimators in the manner of scikit-learn: a pretrained or meta-trained model learns a new task from a few labels."""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metafit import backbones
from metafit.apps.calibration import held_out, temperature
from metafit.apps.inputs import Inputs, load_backbone, missing_label, modality_of, raw_items
from metafit.apps.usual import network_of, usual
from metafit.backbones.base import Backbone
from metafit.data.labels import warn_lookalikes
from metafit.errors import BadInput, some
from metafit.learners import Learner, build, entry
from metafit.task import Examples
from metafit.training.store import Model, load_model

# Median of the temperature and spread of its logarithm, by learner and kind of input: see FewShotClassifier.
TEMPERATURES = {
    ("linear", "text"): (0.25, 0.25),
    ("linear", "image"): (1.2, 0.25),
    ("linear", "vector"): (1.0, 0.25),
    ("centroid", "text"): (0.5, 0.5),
    ("centroid", "image"): (0.5, 0.5),
    ("centroid", "vector"): (5.0, 0.5),
    ("in-context", "vector"): (0.75, 0.15),
}
READ = 1000  # rows that the in-context learner reads where none is named: its time grows with their square
UNMEASURED = (1.0, 1.0)
META_TRAINED = (1.0, 0.25)  # its loss over the training tasks has set the scale of its logits


class _FewShot(BaseEstimator):
    """What the classifier and the regressor share: inputs, the learner, and what it learned."""

    columns_: dict[str, Any]  # of the table that it learned from, where there is one; kept by ``save``

    def __init__(
        self,
        model: str | os.PathLike[str] | Model | None = None,
        learner: str = "auto",
        backbone: str | Backbone | None = "auto",
        options: dict[str, Any] | None = None,
        random_state: Any = None,
    ):
        self.model = model
        self.learner = learner
        self.backbone = backbone
        self.options = options
        self.random_state = random_state

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Saves what ``fit`` learned, whole or not at all: tensors as safetensors, the rest as JSON.

        A backbone that is not trained is named, with a fingerprint of its weights, and not stored.

        Raises:
            BadInput: the folder cannot be written, or the classes are of a type that JSON cannot hold.
        """
        from metafit.apps.files import save

        check_is_fitted(self)
        save(self, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], backbone: nn.Module | None = None) -> Any:
        """Loads a saved estimator, offline and without the data it was fitted on.

        Args:
            folder: what ``save`` wrote.
            backbone: the backbone, or the network that was trained, where it is your own and no name can load it.

        Raises:
            BadInput: no such folder, damaged, of another kind, or made with other weights of the backbone.
        """
        from metafit.apps.files import load

        found = load(folder, backbone)
        if not isinstance(found, cls):
            raise BadInput(f"model folder {folder}: holds a {type(found).__name__}; load it with that class")
        return found

    def _plan(self, X: Any) -> tuple[Model | None, Inputs]:
        """The trained model, if there is one, and what inputs go through, before anything is computed."""
        model = self._trained()
        options: dict[str, Any] = {} if model is None else model.recipe.backbone_options
        own = not (isinstance(self.backbone, str) and self.backbone == "auto")
        found = modality_of(X)
        backbone = self.backbone if own else backbones.DEFAULTS[found]
        trained = model is not None and model.recipe.trained
        if model is not None:
            named = model.recipe.backbone
            if own and (named is not None or trained):
                raise BadInput(f"{self._where} has a backbone ({named or 'a network of its own'}); leave backbone= out")
            if trained:
                backbone = network_of(model.learner)
            elif not own:
                backbone = named
        if backbone is None and found != "vector":
            raise BadInput(f"X holds {found}s, which need a backbone to become numbers: name it as backbone=")
        if backbone is not None:
            network = load_backbone(backbone, options)
            if network.modality == "image" and found == "text":
                found = "image"  # strings are paths, where images are read
            if network.modality != found:
                raise BadInput(
                    f"X holds {found}s, and the backbone {network.name!r} reads {network.modality}s; name another"
                )
        plain = model is None and backbone is None
        return model, Inputs(found, backbone, options, trained, torch.float64 if plain else torch.float32)

    def _trained(self) -> Model | None:
        if self.model is None:
            return None
        if self.learner != "auto" or self.options:
            raise BadInput("model= names a learner that is trained; leave learner and options out, or leave model out")
        model = self.model if isinstance(self.model, Model) else load_model(self.model)
        return replace(model, learner=copy.deepcopy(model.learner).eval())

    @property
    def _where(self) -> str:
        return f"model folder {self.model}" if isinstance(self.model, (str, os.PathLike)) else "the model"

    def _check(self, X: Any, y: Any, inputs: Inputs, numeric: bool, reset: bool = True) -> tuple[Any, np.ndarray]:
        """X and y, proven usable; without ``reset``, with the features that were learned from."""
        if inputs.modality == "vector":
            deep = inputs.dtype != torch.float64  # a network of the user's own may read more than rows
            X, y = validate_data(
                self, X, y, reset, dtype=np.float64, multi_output=numeric, y_numeric=numeric, allow_nd=deep
            )
        else:
            for stale in ("n_features_in_", "feature_names_in_"):
                if hasattr(self, stale):
                    delattr(self, stale)
            X = raw_items(X, inputs.modality)
            if y is None:
                raise BadInput("y is None; pass one label for each input")
            if numeric:
                y = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
            check_consistent_length(X, y)
        return X, y if numeric else column_or_1d(y, warn=True)

    def _learn(self, X: Any, y: Tensor, model: Model | None, inputs: Inputs, way: int | None) -> tuple[Any, Examples]:
        """Adapts the learner to (X, y): class indices ``(N,)``, or targets ``(N, D)``.

        Returns:
            The inputs in the form to remember them in, and as the learner read them.
        """
        outputs = 1 if way is not None else y.shape[1]
        if model is None:
            if inputs.backbone is None:
                inputs.standardise(X)
            kept = inputs.kept(X)
            learner = self._build(kept.shape[1], inputs, len(y), way, outputs)
        else:
            learner = model.learner
            self._suits(learner, way, outputs)
            self._check_columns(model.recipe.columns or [])
            scaling = model.recipe.scaling
            if scaling is not None:
                self._check_features(X.shape[1], learner)
                inputs.mean, inputs.scale = torch.tensor(scaling["mean"]), torch.tensor(scaling["scale"])
            kept = inputs.kept(X)
            if not inputs.trained:
                self._check_features(kept.shape[1], learner)
        support = Examples(inputs.read(kept), y.to(inputs.dtype) if way is None else y)
        with torch.no_grad():
            adapted = tree_map(laid_out, learner.adapt(support))
        self.inputs_, self.learner_, self.adapted_ = inputs, learner, adapted
        self.transductive_ = learner.transductive or inputs.transductive
        return kept, support

    def _build(self, dim: int, inputs: Inputs, examples: int, way: int | None, outputs: int) -> Learner:
        name, options = self._chosen(inputs, examples, way)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(check_random_state(self.random_state).randint(2**31 - 1)))
            return build(name, dim, way, outputs=outputs, **options).to(inputs.dtype).eval()

    def _chosen(self, inputs: Inputs, examples: int, way: int | None) -> tuple[str, dict[str, Any]]:
        """The learner without a model, and its options."""
        name, options = self.learner, dict(self.options or {})
        if name == "auto":
            rows = inputs.modality == "vector"
            few = rows and way is not None and examples <= READ and not options
            name = "centroid" if rows and examples == way else "in-context" if few else "linear"
            if rows and way is None:
                options.setdefault("strength", 3.0)
        return name, options

    def _check_features(self, found: int, learner: Learner) -> None:
        if found != learner.recipe["dim"]:
            raise BadInput(
                f"X has {found} features and {self._where} was trained on {learner.recipe['dim']}; pass the same ones"
            )

    def _check_columns(self, columns: list[str]) -> None:
        """Whether a data frame has those that the model was trained on; another number of them is told elsewhere."""
        names = list(getattr(self, "feature_names_in_", columns))
        if len(names) == len(columns) and names != columns:
            raise BadInput(
                f"X has the columns {some(names, 8)}, and {self._where} was trained on {some(columns, 8)}, in this "
                "order; pass the same ones"
            )

    def _suits(self, learner: Learner, way: int | None, outputs: int) -> None:
        """Whether the trained learner can do this task; one for any number of classes is set to theirs."""
        where = self._where
        if (learner.way is None) != (way is None):
            raise BadInput(
                f"{where} predicts {'numbers' if learner.way is None else 'classes'}; use the other estimator"
            )
        if way is None or learner.way is None:
            if learner.recipe["outputs"] != outputs:
                raise BadInput(f"y has {outputs} targets and {where} was trained for {learner.recipe['outputs']}")
        elif entry(learner.recipe["name"]).any_way:
            learner.way = way
        elif way > learner.way:
            raise BadInput(
                f"y has {way} classes and {where} was trained for at most {learner.way}; drop classes, train with a "
                "larger way, or train a learner for any number of classes (protonet)"
            )

    def _outputs(self, X: Any) -> Tensor:
        """The learner's outputs for all inputs, computed in batches."""
        check_is_fitted(self)
        if self.inputs_.modality == "vector":
            deep = self.inputs_.dtype != torch.float64
            X = validate_data(self, X, dtype=np.float64, reset=False, allow_nd=deep)
        else:
            X = raw_items(X, self.inputs_.modality)
        with torch.no_grad():
            batches = self.inputs_.batches(X, together=bool(self.transductive_))
            return torch.cat([self.learner_.predict(self.adapted_, batch) for batch in batches])

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "adapted_")


class FewShotClassifier(ClassifierMixin, _FewShot):
    """Learns classes from a few labelled texts, images or rows of numbers, with the confidence that it deserves.

    On a pretrained backbone, or, with ``model``, with what meta-training learned. Texts are a sequence of str; images
    a sequence of ``pathlib.Path``, PIL images or uint8 arrays (str paths too where an image backbone is named);
    numbers an array ``(N, F)``, which is standardised by the support set (then divided by √F).

    ``predict_proba`` divides the logits by one temperature, fitted by cross-validation on the support set with a prior
    measured on other tasks (the prior alone where every class has one example). Measured on packaged data, 5-way
    (tables: up to 5), accuracy in percent at 1 / 5 / 20 examples a class, linear, centroid, 5 nearest neighbours:

    - home-intents, MiniLM: 87.3/96.5/99.3, 86.8/95.7/98.5, 86.8/93.7/95.8;
    - animals, EfficientNet-Lite0: 60.9/86.9/94.3, 59.0/81.5/86.5, 59.0/84.1/93.5;
    - 22 KEEL tables: 57.9/71.7/81.7, 57.9/69.0/76.6, 57.9/70.4/78.8.

    On 63 tables at 5 / 10 / 20 examples a class the in-context learner, which ships pretrained, has 68.2/73.1/76.6, a
    logistic regression 66.8/70.7/74.3, a random forest 67.6/72.3/76.0 (benchmarks/RESULTS.md).

    So ``"auto"`` is in-context for numbers up to 1,000 rows, beyond that and for texts and images linear (logistic
    regression); for numbers with one example a class, centroid, as the confidence of linear cannot be mended there
    (expected calibration error 0.25 at the best temperature, centroid 0.07). The fitted temperature took the expected
    calibration error at 5 examples a class, from logits as they are, from 0.25 to 0.01 (home-intents), 0.28 to 0.06
    (chatter-topics) and 0.02 to 0.03 (animals).

    Args:
        model: a folder of ``metafit train`` or ``save_model``, or a ``training.Model``; ``fit`` then adapts it.
        learner: a name of the catalogue of learners, or ``"auto"``.
        backbone: a name of the catalogue of backbones, a ``Backbone``, ``None`` for plain numbers, or ``"auto"``:
            minilm-l6 for text, efficientnet-lite0 for images, none for numbers.
        options: of the learner.
        random_state: of learners that start from random weights.

    Attributes:
        classes_: the sorted labels.
        temperature_: what logits are divided by.
        usual_: how usual this task is among those that ``model`` was trained on, from 1 to 0: the share of them that
            are as far from the nearest other, or further; ``None`` where the model did not keep them.
        transductive_: why answers depend on the other inputs of the same call; empty where they do not.
        learner_, adapted_: the learner, and what it made of the support set.
        inputs_: what inputs go through first.
        n_features_in_, feature_names_in_: of numbers.

    >>> few = FewShotClassifier().fit([[0.0], [0.2], [1.0], [1.2]], ["off", "off", "on", "on"])
    >>> few.predict([[0.1], [1.1]]).tolist()
    ['off', 'on']
    """

    def fit(self, X: Any, y: Any) -> FewShotClassifier:
        """Learns the classes.

        Raises:
            BadInput: one class only, a blank text, a missing label, or inputs that the model cannot take.
        """
        model, inputs = self._plan(X)
        X, labels = self._check(X, y, inputs, numeric=False)
        classes, index = distinct(labels)
        if len(classes) < 2:
            raise BadInput(
                f"y has 1 class only ({classes.tolist()[0]!r}): at least 2 classes are needed; add examples of another"
            )
        if classes.dtype.kind in "OU":
            warn_lookalikes([str(name) for name in classes], "y")
        kept, support = self._learn(X, torch.as_tensor(index), model, inputs, len(classes))
        self.classes_ = classes
        self.usual_ = None if model is None or model.tasks is None else usual(support, model.tasks, self.learner_)
        with torch.no_grad():
            held = held_out(self.learner_, support)
        self.temperature_ = temperature(held, *self._usual_temperature(model is not None))
        self._learned(kept, labels)
        return self

    def _learned(self, kept: Any, labels: np.ndarray) -> None:
        """Told by ``fit`` what it learned from."""

    def _usual_temperature(self, trained: bool) -> tuple[float, float]:
        """Median and spread of the temperature, by what was measured on other tasks."""
        if trained:
            return META_TRAINED
        known = (self.learner_.recipe["name"], self.inputs_.modality)
        return UNMEASURED if self.options else TEMPERATURES.get(known, UNMEASURED)

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each input ``(N,)``."""
        index = self._logits(X).argmax(1).numpy()
        return self.classes_[index]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class ``(N, C)``, in the order of ``classes_``."""
        return self._logits(X).softmax(1).numpy()

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """The natural logarithm of ``predict_proba``."""
        return self._logits(X).log_softmax(1).numpy()

    def _logits(self, X: Any) -> Tensor:
        outputs = self._outputs(X)
        return outputs[:, : len(self.classes_)].double() / self.temperature_


class FewShotRegressor(RegressorMixin, _FewShot):
    """Learns numbers from a few examples: texts, images or rows of numbers, as :class:`FewShotClassifier`.

    Without ``model``, targets are standardised for the learner and given back in their own units. ``"auto"`` is
    ridge regression; on numbers its penalty is 1/3: on seven targets out of scikit-learn's diabetes, iris, wine and
    breast cancer tables its error relative to the variance was 0.81/0.49/0.37/0.29 from 5/10/20/50 examples, against
    0.89/0.58/0.39/0.28 with a penalty chosen by leave-one-out and 1.22/0.73/0.49/0.39 for 5 nearest neighbours.

    Args:
        model, backbone, options, random_state: as :class:`FewShotClassifier`.
        learner: a name of the catalogue that does regression, or ``"auto"``.

    Attributes:
        target_mean_, target_scale_: ``(D,)``, of the targets.
        transductive_, learner_, adapted_, inputs_, n_features_in_, feature_names_in_: as :class:`FewShotClassifier`.

    >>> few = FewShotRegressor(options={"strength": 1e6}).fit([[0.0], [1.0], [2.0]], [0.0, 10.0, 20.0])
    >>> few.predict([[3.0]]).round(2).tolist()
    [30.0]
    """

    def fit(self, X: Any, y: Any) -> FewShotRegressor:
        """Learns targets ``(N,)`` or ``(N, D)``.

        Raises:
            BadInput: a blank text, or inputs or targets that the model cannot take.
        """
        model, inputs = self._plan(X)
        X, targets = self._check(X, y, inputs, numeric=True)
        self._one_target = targets.ndim == 1
        targets = np.asarray(targets, dtype=np.float64).reshape(len(targets), -1)
        self.target_mean_, self.target_scale_ = np.zeros(targets.shape[1]), np.ones(targets.shape[1])
        if model is None:
            self.target_mean_, spread = targets.mean(0), targets.std(0)
            self.target_scale_ = np.where(spread > 0, spread, 1.0)
        scaled = torch.tensor((targets - self.target_mean_) / self.target_scale_)
        self._learn(X, scaled, model, inputs, None)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Values ``(N,)`` or ``(N, D)``, as the targets were; and their standard deviations where asked, in the same
        units.

        Raises:
            BadInput: standard deviations of a learner that tells none.
        """
        outputs = self._outputs(X).double()
        if return_std and not self.learner_.gaussian:
            raise BadInput(
                "return_std: this learner tells values alone; choose dkt, or a model of dkt, cnp, anp or tnp"
            )
        means = outputs.chunk(2, -1)[0] if self.learner_.gaussian else outputs
        values = self._as_given(means.numpy() * self.target_scale_ + self.target_mean_)
        if not return_std:
            return values
        log_variances = outputs.chunk(2, -1)[1]
        return values, self._as_given((log_variances / 2).exp().numpy() * self.target_scale_)

    def _as_given(self, values: np.ndarray) -> np.ndarray:
        return values[:, 0] if self._one_target else values

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def distinct(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sorted classes, and the index of each label among them.

    Raises:
        BadInput: a label is missing, or types that cannot be sorted are mixed.
    """
    missing = missing_label(labels)
    if missing is not None:
        raise BadInput(f"y: the label at index {missing} is missing; fill it in or drop the example")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The number of unique classes")  # as many as examples: one-shot
            check_classification_targets(labels)
        return np.unique(labels, return_inverse=True)
    except TypeError as error:
        raise BadInput(f"y mixes types of labels ({error}); make them all texts or all numbers") from error


def channels_last(value: Tensor) -> bool:
    """Whether it is laid out as convolutions like it, and not in plain order too."""
    return value.ndim == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)


def laid_out(value: Tensor) -> Tensor:
    """In one of the two layouts that a saved estimator comes back in: sums then round the same way."""
    return value if channels_last(value) else value.contiguous()
