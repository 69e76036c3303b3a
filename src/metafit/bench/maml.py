"""Second-order MAML against the libraries that do it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from metafit import backbones
from metafit.bench import sources
from metafit.bench.ours import Ours
from metafit.bench.peers import higher, loop, parallel_metalearn, torchopt
from metafit.bench.problem import Problem, Step, distance
from metafit.bench.race import Contender, Settings, race
from metafit.bench.roofline import beside_roofline
from metafit.data import Sinusoids, TaskSampler
from metafit.learners import low_rank
from metafit.task import Task

EXACT = 1e-5  # relative, in float64, over the first tasks: a peer that is further off computes something else
CLOSE = 1e-3  # relative: what we time, beside the loop in float64, unless the loop itself is about as far off
EXACT_TASKS = 2
SLOWER, LESS = 1.6, 0.35  # than the fastest peer: what the low-memory mode may take


def sinusoid(settings: Settings) -> list[dict[str, Any]]:
    """Regression with an MLP 1-40-40-1."""
    batch = 3 if settings.quick else 25
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU())
    tasks = Sinusoids(shot=10, query=10, batch=batch).draw(0)
    problem = _problem(body, 40, None, tasks, steps=5, rate=0.01, chunk=batch, device=settings.device)
    title = f"sinusoids, MLP 1-40-40-1, {batch} tasks, 10 shots, 5 steps, second order"
    data = "sinusoids, drawn as Finn et al. 2017 define them"
    return [_race("sinusoid", title, 40, Ours(problem, settings.steps), problem, settings, data)]


def conv4_5way(settings: Settings) -> list[dict[str, Any]]:
    """Conv4-64 with batch normalisation, one step: beside the peers, and beside the convolution; in bf16, too."""
    problem, data = _conv4(5, 2 if settings.quick else 32, 1, 0.4, settings)
    title = f"Conv4-64, 5-way 1-shot, 1 query, {len(problem.tasks.query.y)} tasks, 1 step, second order"
    ours = Ours(problem, settings.steps)
    row = _race("conv4-5way", title, 2, ours, problem, settings, data)
    half = Ours(problem, settings.steps, "bf16")
    beside_best = _race(
        "conv4-5way-bf16",
        f"{title}, bf16 against the fastest peer's fp32",
        3,
        half,
        problem,
        settings,
        data,
        [row["peer"]],
    )
    return [row | beside_roofline(ours, problem, settings), beside_best]


def conv4_20way(settings: Settings) -> list[dict[str, Any]]:
    """Conv4-64, five steps: beside the peers, and with little memory beside our own way."""
    problem, data = _conv4(20, 2 if settings.quick else 16, 5, 0.1, settings)
    title = f"Conv4-64, 20-way 1-shot, 1 query, {len(problem.tasks.query.y)} tasks, 5 steps, second order"
    settings = replace(settings, seconds=2 * settings.seconds)  # a call takes seconds, and there are many contenders
    row = _race("conv4-20way", title, 1.2, Ours(problem, settings.steps), problem, settings, data, memory_target=1.0)
    low = _race(
        "conv4-20way-memory",
        f"{title}, in low-memory mode",
        round(1 / SLOWER, 3),
        Ours(problem, settings.steps, low_memory=True),
        problem,
        settings,
        data,
        [row["peer"]],
        note=f"the target is {SLOWER} times the fastest peer's time at most, and {LESS} times its memory",
        memory_target=LESS,
    )
    return [row, low]


def lora(settings: Settings) -> list[dict[str, Any]]:
    """Low-rank adapters of the query and value projections, and the head; the rest of the MiniLM is one for all."""
    source, backbone, batch = sources.intents(), backbones.load("minilm-l6"), 2 if settings.quick else 8
    rows = source.with_x(torch.arange(len(source)), "vector")
    drawn = TaskSampler(rows, way=5, shot=1, query=3, batch=batch).draw(0)
    used = torch.cat([drawn.support.x, drawn.query.x], 1)
    tokens = backbone.preprocess([source.x[row] for row in used.flatten().tolist()])
    tokens = {name: value.unflatten(0, used.shape) for name, value in tokens.items()}
    shots = drawn.support.x.shape[1]
    tasks = drawn._replace(
        support=drawn.support._replace(x={name: value[:, :shots] for name, value in tokens.items()}),
        query=drawn.query._replace(x={name: value[:, shots:] for name, value in tokens.items()}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = low_rank(backbone, rank=4)
    problem = _problem(body, backbone.out_dim, 5, tasks, steps=3, rate=0.1, chunk=batch, device=settings.device)
    title = f"LoRA rank 4 on MiniLM, {batch} tasks of 5-way 1-shot texts, 3 queries, 3 steps, second order"
    problem = problem._replace(scope="lora")
    packed = tree_map(lambda x: x.to(settings.device), _packed(tasks))
    ours = Ours(problem._replace(tasks=packed), settings.steps)
    return [_race("lora", title, 2, ours, problem, settings, sources.described(source))]


def _packed(tasks: Task) -> Task:
    """Texts end to end, as our training lays them; the peers' networks see them padded to the longest."""
    return tasks._replace(**{name: part._replace(x=backbones.pack(part.x)) for name, part in tasks._asdict().items()})


def _conv4(way: int, batch: int, steps: int, rate: float, settings: Settings) -> tuple[Problem, str]:
    source = sources.drawings()
    tasks = TaskSampler(source, way, shot=1, query=1, batch=batch).draw(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = backbones.load("conv4", width=8 if settings.quick else 64).requires_grad_(True)
    problem = _problem(body, body.out_dim, way, tasks, steps, rate, chunk=8, device=settings.device)
    return problem, sources.described(source)


def _problem(body: nn.Module, dim: int, way: int | None, tasks: Any, steps: int, rate: float, chunk: int,
             device: str) -> Problem:  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(OrderedDict(body=body, head=nn.Linear(dim, way or 1)))
    return Problem(network.train().to(device), way, tree_map(lambda x: x.to(device), tasks), steps, rate, chunk)


def _race(
    workload: str,
    title: str,
    target: float,
    ours: Ours,
    problem: Problem,
    settings: Settings,
    data: str,
    only: Sequence[str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    peers = [_contender(name, step, problem) for name, step in _peers(problem).items() if only is None or name in only]
    me = _me(ours, problem)
    return race(workload, title, target, me, peers, settings, data=data, backend=str(ours.plan), **more)


def _me(ours: Ours, problem: Problem) -> Contender:
    """What we time, compared in float32 with the loop in float64."""
    exact = loop.step(problem.exact())()
    off = distance(ours(), exact)
    note = str(ours.plan)
    if off > CLOSE:
        note += f"; differs by {off:.1e} from float64, where the plain loop in float32 differs by "
        note += f"{distance(loop.step(problem)(), exact):.1e}"
    return Contender(ours.name, ours, note, differs=off)


def _peers(problem: Problem) -> dict[str, Callable[[Problem], Step]]:
    peers: dict[str, Callable[[Problem], Step]] = {
        "plain loop": loop.step,
        "higher": higher.step,
        "torchopt": torchopt.step,
        "parallel-metalearn, vmap": partial(parallel_metalearn.step, backend="vmap"),
        "parallel-metalearn, sequential": partial(parallel_metalearn.step, backend="sequential"),
    }
    if any(isinstance(module, nn.BatchNorm2d) for module in problem.network.modules()):
        own = partial(parallel_metalearn.step, backend="vmap", own_norm=True)
        peers["parallel-metalearn, vmap, its own batch norm"] = own
    return peers


def _contender(name: str, step: Callable[[Problem], Step], problem: Problem) -> Contender:
    """The peer, proven to compute the same gradient; not timed where it does not, or cannot be run."""
    try:
        exact = problem.exact(EXACT_TASKS)
        off = distance(step(exact)(), loop.step(exact)())
        if off > EXACT:
            return Contender(name, None, f"not timed: its loss or gradient is off by {off:.1e}", differs=off)
        return Contender(name, step(problem), differs=off)
    except ImportError:
        return Contender(name, None, "not installed; the extra bench brings it")
    except Exception as error:  # whatever a library of others raises: the row says so, the others are timed
        return Contender(name, None, f"fails: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
