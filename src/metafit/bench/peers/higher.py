"""higher 0.2.1: ``innerloop_ctx``, as its MAML example."""

from __future__ import annotations

import copy

import torch

from metafit.bench.problem import Gradient, Problem, Step
from metafit.task import count, take


def step(problem: Problem) -> Step:
    import higher

    network, criterion = copy.deepcopy(problem.network), problem.criterion
    rule = torch.optim.SGD(network.parameters(), lr=problem.rate)
    tasks = [take(problem.tasks, i) for i in range(count(problem.tasks))]

    def call() -> Gradient:
        network.zero_grad()
        total = torch.zeros((), dtype=next(network.parameters()).dtype)
        for support, query in tasks:
            with higher.innerloop_ctx(network, rule, copy_initial_weights=False) as (fast, inner):
                for _ in range(problem.steps):
                    inner.step(criterion(fast(support.x), support.y))
                loss = criterion(fast(query.x), query.y) / len(tasks)
                loss.backward()
            total += loss.detach().cpu()
        return total, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    return call
