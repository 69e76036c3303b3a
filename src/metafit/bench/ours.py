"""How metafit itself is called by the gradient-based workloads."""

from __future__ import annotations

import copy

from metafit.bench.problem import Gradient, Problem, Step
from metafit.learners import GradientLearner
from metafit.optim import SGD
from metafit.over_tasks import meta_gradient


def step(problem: Problem) -> Step:
    """One outer step of many, in whatever way ``meta_gradient`` chooses."""
    network = copy.deepcopy(problem.network)
    body, head = network.get_submodule("body"), network.get_submodule("head")
    learner = GradientLearner(body, head, problem.way, problem.scope, SGD(problem.rate), steps=problem.steps)

    def call() -> Gradient:
        loss, _, gradients = meta_gradient(learner, problem.tasks)
        return loss, {name.removeprefix("model."): gradient for name, gradient in gradients.items()}

    return call
