"""How near to the machine's own speed: the arithmetic that a method needs beside one large convolution."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from metafit.bench.peers import loop
from metafit.bench.problem import Problem, Step
from metafit.bench.race import Settings
from metafit.bench.timing import interleave
from metafit.task import count

BATCHES = (160, 512)  # of 64 channels, 14×14: what fits the caches, and what does not


def beside_roofline(step: Step, problem: Problem, settings: Settings) -> dict[str, Any]:
    """Tasks a second, and their arithmetic as a share of the best rate of a ``channels_last`` convolution.

    The arithmetic is counted in the plain loop, which does what the method needs and no more; the convolution is timed
    in turn with ours.
    """
    with FlopCounterMode(display=False) as counter:
        loop.step(problem)()
    work = counter.get_total_flops()
    device = problem.tasks.support.y.device
    convolution = torch.nn.Conv2d(64, 64, 3, padding=1, device=device).requires_grad_(False)
    convolution.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = []
    for batch in BATCHES[:1] if settings.quick else BATCHES:
        x = torch.ones(batch, 64, 14, 14, device=device).to(memory_format=torch.channels_last)
        limits = settings.rounds, settings.seconds / 3, settings.least
        duel = interleave(step, {"convolution": partial(convolution, x)}, *limits)["convolution"]
        one = 2 * batch * 14 * 14 * 64 * 64 * 9
        found.append((work / one * duel.ratio.median, duel.ours, one / duel.peer))
    share, seconds, rate = min(found)  # beside the faster convolution
    return {
        "tasks_per_second": round(count(problem.tasks) / seconds, 2),
        "gflop_per_task": round(work / count(problem.tasks) / 1e9, 3),
        "roofline_gflops": round(rate / 1e9, 1),
        "share": round(share, 3),
        "share_target": 0.45,
    }
