"""How metafit itself is called by the gradient-based workloads."""

from __future__ import annotations

import copy
from dataclasses import replace

from metafit.bench.problem import Gradient, Problem
from metafit.learners import GradientLearner
from metafit.learners.gradient import Precision
from metafit.optim import SGD
from metafit.over_tasks import meta_gradient, plan_for


class Ours:
    """One outer step of a long training, in whatever way ``meta_gradient`` chooses.

    Args:
        problem: what to compute.
        steps: how many such steps are to come.
        precision: of the model, see ``GradientLearner``.
        low_memory: in the same way, but as where memory is scarce: inner steps keep no graph, tasks run one after
            another, and what is freed goes back to the system.
    """

    def __init__(self, problem: Problem, steps: int, precision: Precision = "full", low_memory: bool = False):
        network = copy.deepcopy(problem.network)
        body, head = network.get_submodule("body"), network.get_submodule("head")
        rule = SGD(problem.rate)
        self.learner = GradientLearner(
            body, head, problem.way, problem.scope, rule, steps=problem.steps, precision=precision
        )
        self.tasks = problem.tasks
        self.name = f"metafit{', bf16' if precision == 'bf16' else ''}{', low memory' if low_memory else ''}"
        chosen = plan_for(self.learner, self.tasks, steps=steps)  # once, as a training does
        self.plan = replace(chosen, mixed=True, abreast=1, thrift=True) if low_memory else chosen

    def __call__(self) -> Gradient:
        loss, _, gradients = meta_gradient(self.learner, self.tasks, self.plan)
        return loss, {name.removeprefix("model."): gradient for name, gradient in gradients.items()}
