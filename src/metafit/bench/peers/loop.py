"""The plain loop, as learn2learn's ``clone`` and ``adapt`` run MAML: task after task, step after step."""

from __future__ import annotations

import copy

import torch
from torch.func import functional_call

from metafit.bench.problem import Gradient, Problem, Step
from metafit.task import count, take


def step(problem: Problem) -> Step:
    network, criterion = copy.deepcopy(problem.network), problem.criterion
    parameters: dict[str, torch.Tensor] = {n: p for n, p in network.named_parameters() if p.requires_grad}
    tasks = [take(problem.tasks, i) for i in range(count(problem.tasks))]

    def call() -> Gradient:
        network.zero_grad()
        total = torch.zeros((), dtype=next(network.parameters()).dtype)
        for support, query in tasks:
            fast = parameters
            for _ in range(problem.steps):
                loss = criterion(functional_call(network, fast, (support.x,)), support.y)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {name: p - problem.rate * g for (name, p), g in zip(fast.items(), grads, strict=True)}
            loss = criterion(functional_call(network, fast, (query.x,)), query.y) / len(tasks)
            loss.backward()
            total += loss.detach().cpu()
        return total, {name: p.grad for name, p in parameters.items() if p.grad is not None}

    return call
