"""Evaluation: the same unseen tasks for every learner, intervals, paired differences, the report."""

from metafit.evaluation.diversity import describe_tasks
from metafit.evaluation.evaluate import Evaluation, compare, evaluate
from metafit.evaluation.gallery import gallery
from metafit.evaluation.plots import comparison_figure
from metafit.evaluation.report import verdict, write_report
from metafit.evaluation.result import Contender, describe, result, write_result
from metafit.evaluation.statistics import coverage, interval, reliability

__all__ = [
    "Contender",
    "Evaluation",
    "compare",
    "comparison_figure",
    "coverage",
    "describe",
    "describe_tasks",
    "evaluate",
    "gallery",
    "interval",
    "reliability",
    "result",
    "verdict",
    "write_report",
    "write_result",
]
