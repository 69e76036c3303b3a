"""Estimators in the manner of scikit-learn, for people who have a few labels."""

from metafit.apps.estimators import FewShotClassifier, FewShotRegressor
from metafit.apps.files import load
from metafit.apps.online import OnlineClassifier

__all__ = ["FewShotClassifier", "FewShotRegressor", "OnlineClassifier", "load"]
