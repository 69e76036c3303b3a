"""Meta-training: fits a learner over many tasks."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from metafit.data.families import Families
from metafit.data.randomness import derive, keys
from metafit.data.sampler import Tasks
from metafit.disk import writable_folder
from metafit.errors import BadInput
from metafit.learners import Learner
from metafit.losses import UncertaintyWeights
from metafit.over_tasks import Backend, Plan, compiles, meta_gradient, over_tasks, plan_for
from metafit.progress import progress, say
from metafit.task import Task
from metafit.training.augment import Augment
from metafit.training.checkpoint import load_state, save_state
from metafit.training.store import Recipe, save_model

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass
class Training:
    """What meta-training did.

    Attributes:
        history: a row for each look at the validation tasks: step, mean training loss since the last, validation
            metric (``None`` without validation tasks), seconds since the start.
        best_step, best: the step whose parameters were kept, and its validation metric.
        stopped: why training ended: "steps", "patience", "seconds".
        plan: how the batches were run; a resumed training goes on by it, so that its bits are the same.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    best: float | None = None
    stopped: str = "steps"
    plan: Plan | None = None

    @property
    def seconds(self) -> float:
        return self.history[-1]["seconds"] if self.history else 0.0


def meta_train(
    learner: Learner,
    tasks: Tasks,
    validation: Tasks | None = None,
    *,
    steps: int = 1000,
    rate: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: Literal["constant", "cosine"] = "cosine",
    warmup: int = 0,
    clip: float | None = 10.0,
    validate_every: int | None = None,
    validation_tasks: int = 100,
    patience: int | None = None,
    seconds: float | None = None,
    augment: Sequence[Augment] = (),
    uncertainty: bool = False,
    backend: Backend = "auto",
    fabric: Fabric | None = None,
    out: str | os.PathLike[str] | None = None,
    recipe: Recipe | None = None,
    resume: bool = False,
    watch: Sequence[Callable[[Mapping[str, Any]], None]] = (),
    show_progress: bool = True,
) -> Training:
    """Fits the meta-parameters to be right on the query sets of ``tasks``, and leaves the best ones in ``learner``.

    The best are those with the best validation metric on one fixed, seeded set of validation tasks (the last ones
    where there is no validation). The outer optimizer is AdamW. Under ``torchrun``, pass a ``Fabric`` with as many
    devices: each rank takes its share of every batch, and ranks average the gradients with one all-reduce.

    Args:
        learner: any learner of the catalogue or of your own.
        tasks: training tasks; step i takes the batch with index i.
        validation: validation tasks, of classes that are not in training.
        steps: outer steps.
        rate, weight_decay, schedule: of AdamW; ``"cosine"`` anneals the rate to 0 over the steps.
        warmup: outer steps over which the rate rises to where the schedule has it.
        clip: largest norm of the meta-gradient; ``None`` for none.
        validate_every: outer steps between looks at the validation tasks (a twentieth of ``steps``).
        validation_tasks: how many of them.
        patience: looks without a better validation metric before training stops; ``None`` never stops early.
        seconds: after which training stops, by the clock: what it then has learned depends on the machine.
        augment: changes to every training batch, in this order; a function of the tasks' seed and the step.
        uncertainty: whether each of the ``Families`` in ``tasks`` counts by a learned weight: ``UncertaintyWeights``.
        backend: how a batch of tasks is run: see ``plan_for``. What ``"auto"`` chose is kept in ``out``.
        out: folder for the best model and the state to resume from, each written whole at every look.
        recipe: how the model was made, for the folder.
        resume: go on from the state in ``out``, exactly; start afresh where there is none.
        watch: called on the first rank with each row of the history as it is made (``track`` makes one).

    Raises:
        BadInput: nothing to learn, or a folder that cannot be written or resumed from.
        KeyboardInterrupt: on Ctrl-C, with the best parameters so far in ``learner`` and in ``out``.
    """
    if not any(p.requires_grad for p in learner.parameters()):
        raise BadInput(f"learner {type(learner).__name__} has no meta-parameters to train: evaluate it as it is")
    if steps < 1:
        raise BadInput(f"steps {steps}: needs at least 1")
    if recipe is not None and not hasattr(learner, "recipe"):
        raise BadInput(f"learner {type(learner).__name__} is not of the catalogue: train it without recipe=")
    folder = None if out is None else writable_folder(out)
    from lightning_fabric import Fabric  # it takes seconds to import, which predicting need not pay

    fabric = fabric or Fabric(accelerator="auto", devices=1)
    fabric.launch()
    if tasks.batch % fabric.world_size:
        raise BadInput(f"batch {tasks.batch}: needs a multiple of the {fabric.world_size} processes")
    learner.to(fabric.device)
    balance = _balance(tasks).to(fabric.device) if uncertainty else None
    if fabric.world_size > 1:  # ranks must start from the same parameters, whatever they were seeded with
        for value in learner.state_dict().values():
            torch.distributed.broadcast(value, src=0)
    groups = [{"params": [p for p in learner.parameters() if p.requires_grad], "weight_decay": weight_decay}]
    groups += [] if balance is None else [{"params": [balance.log_variance], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, rate)
    kept = {} if balance is None else {"log_variance": balance.log_variance.data}
    if isinstance(tasks, Families):
        kept["family_losses"] = tasks.losses
    run = _Run(learner, optimizer, folder if fabric.is_global_zero else None, recipe, kept)
    if resume and folder is not None:
        run.step, run.training.history = load_state(
            folder, learner, optimizer, run.best_state, run.training, recipe, kept
        )
        if run.training.plan is not None and run.training.plan.backend == "compile" and not compiles(fabric.device):
            say(
                "the training was compiled, and this machine has no compiler: it goes on by another plan, and so with "
                "other rounding"
            )
            run.training.plan = None
    every = validate_every or max(1, steps // 20)
    share = tasks.batch // fabric.world_size
    started = time.perf_counter() - run.training.seconds
    losses: list[torch.Tensor] = []

    def late() -> bool:
        return seconds is not None and time.perf_counter() - started > seconds

    def look() -> bool:
        """Validates and saves; true where patience has run out."""
        value = None if validation is None else _validate(learner, validation, validation_tasks, backend, fabric)
        loss = float(torch.stack(losses).mean()) if losses else None
        losses.clear()
        row = {"step": run.step, "loss": loss, "validation": value, "seconds": round(time.perf_counter() - started, 3)}
        run.note(row)
        for watcher in watch if fabric.is_global_zero else ():
            watcher(row)
        return run.out_of_patience(patience)

    learner.train()
    try:
        with progress("meta-train", steps, "steps", show_progress and fabric.is_global_zero) as advance:
            advance(run.step)
            stop = run.out_of_patience(patience) if run.training.history else look()
            while run.step < steps and not stop and not late():
                annealed = 0.5 * (1 + math.cos(math.pi * run.step / steps)) if schedule == "cosine" else 1.0
                for group in optimizer.param_groups:
                    group["lr"] = rate * annealed * min(1.0, (run.step + 1) / max(1, warmup))
                learner.advance(run.step / steps)
                first = run.step * tasks.batch + fabric.global_rank * share
                batch = _on(fabric, tasks.tasks(first, first + share))
                generator = _generator(tasks.seed, first)
                for change in augment:
                    batch = change(batch, generator)
                if run.training.plan is None:
                    sure = steps if patience is None else min(steps, run.step + patience * every)  # it may stop then
                    sure = sure if seconds is None else run.step + 1
                    run.training.plan = plan_for(learner, batch, backend, steps=sure - run.step)
                family = tasks.family(run.step) if isinstance(tasks, Families) else None
                loss = _step(learner, optimizer, batch, run.training.plan, clip, fabric, balance, family)
                if isinstance(tasks, Families):
                    tasks.tell(run.step, float(loss))
                losses.append(loss)
                run.step += 1
                if run.step % every == 0 or run.step == steps or late():
                    stop = look()
                    advance(1, loss=run.training.history[-1]["loss"], validation=run.training.history[-1]["validation"])
                else:
                    advance(1)
            run.training.stopped = "patience" if stop else "steps" if run.step == steps else "seconds"
    finally:
        run.restore_best()
    return run.training


class _Run:
    """The state of a training: the step it is at, and the best parameters so far."""

    def __init__(
        self,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        folder: Path | None,
        recipe: Recipe | None,
        kept: dict[str, torch.Tensor],
    ):
        self.kept = kept
        self.learner, self.optimizer, self.folder, self.recipe = learner, optimizer, folder, recipe
        self.step, self.training = 0, Training()
        self.best_state = {name: value.detach().clone() for name, value in learner.state_dict().items()}

    def note(self, row: dict[str, Any]) -> None:
        training = self.training
        training.history.append(row)
        if self._better(row["validation"]):
            training.best, training.best_step = row["validation"], self.step
            for name, value in self.learner.state_dict().items():
                self.best_state[name].copy_(value)
            if self.folder is not None and self.recipe is not None:
                save_model(self.folder, self.learner, self.recipe, training.history)
        if self.folder is not None:
            save_state(
                self.folder, self.step, self.learner, self.optimizer, self.best_state, training, self.recipe, self.kept
            )

    def out_of_patience(self, patience: int | None) -> bool:
        since_best = sum(row["step"] > self.training.best_step for row in self.training.history)
        return patience is not None and since_best >= patience

    def _better(self, value: float | None) -> bool:
        best = self.training.best
        if value is None or best is None:
            return True
        return value < best if self.learner.way is None else value > best

    def restore_best(self) -> None:
        self.learner.load_state_dict(self.best_state)


def _step(
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    tasks: Task,
    plan: Plan,
    clip: float | None,
    fabric: Fabric,
    balance: UncertaintyWeights | None,
    family: int | None,
) -> torch.Tensor:
    loss, _, gradients = meta_gradient(learner, tasks, plan)
    parameters = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    flat = torch.cat([gradients[name].flatten() for name in parameters] + [loss[None]])
    if fabric.world_size > 1:
        flat = fabric.all_reduce(flat, reduce_op="mean")  # type: ignore[assignment]
    if not torch.isfinite(flat).all():
        raise BadInput(
            "meta-training diverged: the loss or its gradient is not finite; lower the rate or the inner rate"
        )
    flat, loss = flat[:-1], flat[-1]
    if balance is not None:
        leaf = loss.detach().requires_grad_()
        balanced = balance(leaf[None], torch.tensor([family], device=loss.device)).sum()
        weight, balance.log_variance.grad = torch.autograd.grad(balanced, (leaf, balance.log_variance))
        flat = flat * weight  # the batch is of one family, whose weight all its tasks share
    if clip is not None:
        flat = flat * (clip / flat.norm().clamp_min(1e-12)).clamp(max=1.0)
    for p, part in zip(parameters.values(), flat.split([p.numel() for p in parameters.values()]), strict=True):
        p.grad = part.view_as(p)
    optimizer.step()
    return loss


@torch.no_grad()
def _validate(learner: Learner, tasks: Tasks, count: int, backend: Backend, fabric: Fabric) -> float:
    learner.eval()
    values = []
    for start in range(0, count, tasks.batch):
        batch = _on(fabric, tasks.tasks(start, min(start + tasks.batch, count)))
        _, metrics = over_tasks(learner.loss, batch, backend)
        values.append(metrics["mse" if learner.way is None else "accuracy"])
    learner.train()
    mean = float(torch.cat(values).mean())
    if not math.isfinite(mean):
        raise BadInput("meta-training diverged: the validation error is not finite; lower the rate or the inner rate")
    return round(mean, 6)


def _balance(tasks: Tasks) -> UncertaintyWeights:
    if not isinstance(tasks, Families):
        raise BadInput("uncertainty: it weighs families, and these tasks are of one; give Families, or leave it out")
    return UncertaintyWeights(len(tasks.names))


def _generator(seed: int, first: int) -> torch.Generator:
    """Of a batch, whoever draws it."""
    key = derive(keys(seed, np.array([first])), 6)
    return torch.Generator().manual_seed(int(key[0]))


def _on(fabric: Fabric, tasks: Task) -> Task:
    return fabric.to_device(tasks)
