"""Meta-training: fits a learner over many tasks."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from metafit import processes
from metafit.data.families import Families
from metafit.data.randomness import derive, keys
from metafit.data.sampler import Tasks
from metafit.errors import BadInput, Diverged, unknown
from metafit.learners import Learner, check_tasks
from metafit.losses import UncertaintyWeights
from metafit.over_tasks import Backend, Plan, compiles, over_tasks, plan_for
from metafit.progress import progress, say
from metafit.task import Task, take
from metafit.training.augment import Augment, check_augments
from metafit.training.average import Average
from metafit.training.checkpoint import load_state, save_state
from metafit.training.outer import OuterStep
from metafit.training.ranks import set_up, whole
from metafit.training.run import Run, Training
from metafit.training.schedule import Schedule, share_of_rate
from metafit.training.store import STATE, STATE_KIND, TASKS, Recipe, save_model
from metafit.weights import INDEX, check_kind, free_for, tidy

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Precision = Literal["fp32", "bf16", "fp16"]
FABRICS_NAMES = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def meta_train(
    learner: Learner,
    tasks: Tasks,
    validation: Tasks | None = None,
    *,
    steps: int = 1000,
    rate: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: Schedule = "cosine",
    warmup: int = 0,
    clip: float | None = 10.0,
    accumulate: int = 1,
    ema: float | None = None,
    precision: Precision | None = None,
    validate_every: int | None = None,
    validation_tasks: int = 100,
    patience: int | None = None,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    augment: Sequence[Augment] = (),
    uncertainty: bool = False,
    backend: Backend = "auto",
    fabric: Fabric | None = None,
    out: str | os.PathLike[str] | None = None,
    recipe: Recipe | None = None,
    save_every: int | None = None,
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
        rate, weight_decay, schedule: of AdamW; ``"cosine"`` and ``"linear"`` anneal the rate to 0 over the steps.
        warmup: outer steps over which the rate rises to where the schedule has it.
        clip: largest norm of the meta-gradient; ``None`` for none.
        accumulate: batches to a step, one after another, as if they were one: step i takes those with indices
            ``i * accumulate`` onwards.
        ema: decay of an exponential moving average of the parameters (see ``Average``), which is validated and kept in
            their place; ``None`` for none.
        precision: what the learner computes in: ``"bf16"`` and ``"fp16"`` are mixed, with parameters in fp32 and, for
            fp16, a loss scaler. That of the ``fabric`` where there is one, else ``"fp32"``: the parameters' own.
        validate_every: outer steps between looks at the validation tasks (a twentieth of ``steps``).
        validation_tasks: how many of them.
        patience: looks without a better validation metric before training stops; ``None`` never stops early.
        seconds: after which training stops, by the clock: what it then has learned depends on the machine.
        clock: what counts seconds, those of the history too: ``time.process_time`` leaves other work out.
        augment: changes to every training batch, in this order; a function of the tasks' seed and the step.
        uncertainty: whether each of the ``Families`` in ``tasks`` counts by a learned weight: ``UncertaintyWeights``.
        backend: how a batch of tasks is run: see ``plan_for``. What ``"auto"`` chose is kept in ``out``.
        fabric: devices, processes, precision and strategy, of ``lightning_fabric``; one process on the best device
            where ``None``. ``fully_sharded()`` is the strategy for a network that one device cannot hold.
        out: folder for the best model and the state to resume from, each written whole.
        recipe: how the model was made, for the folder.
        save_every: outer steps between states to resume from; ``None`` is one at every look.
        resume: go on from the state in ``out``, exactly; start afresh where there is none.
        watch: called on the first rank with each row of ``Training.history`` as it is made; ``track`` makes one. After
            a resume, rows since the state that it goes on from come again.

    Raises:
        BadInput: nothing to learn, tasks that are not of the learner's kind, a folder that cannot be written or
            resumed from, or a full disk, which leaves the last state whole.
        KeyboardInterrupt: on Ctrl-C, with the best parameters so far in ``learner`` and in ``out``.
    """
    if not any(p.requires_grad for p in learner.parameters()):
        raise BadInput(f"learner {type(learner).__name__} has no meta-parameters to train: evaluate it as it is")
    if recipe is not None and not hasattr(learner, "recipe"):
        raise BadInput(f"learner {type(learner).__name__} is not of the catalogue: train it without recipe=")
    for drawn in (tasks,) if validation is None else (tasks, validation):
        check_tasks(learner, drawn)
    if not isinstance(augment, Sequence) or not all(map(callable, augment)):
        raise BadInput(f"augment {augment!r}: needs a list of changes, such as [MetaMix()] (metafit.training.augment)")
    check_augments(augment, learner)
    if learner.gaussian and (uncertainty or (isinstance(tasks, Families) and tasks.by == "loss")):
        raise BadInput(
            f"learner {type(learner).__name__}: its loss, a log-density, goes below 0, and families cannot be weighed "
            "by it; choose 'uniform', weights, or leave uncertainty out"
        )
    for name, count in (("steps", steps), ("save_every", save_every)):
        if count is not None and count < 1:
            raise BadInput(f"{name} {count}: needs at least 1")
    check_outer(precision, accumulate, ema, schedule)
    fabric, precision = _fabric(fabric, precision)
    fabric.launch()
    first_rank = fabric.is_global_zero
    if tasks.batch % fabric.world_size:
        raise BadInput(
            f"batch {tasks.batch}: {fabric.world_size} processes share it; make it a multiple of their number"
        )
    folder = None if out is None else Path(out)
    if folder is not None and first_rank:
        acts = "env" in getattr(learner, "recipe", {})
        free_for(folder, "agent" if acts else "learner")
        check_kind(folder, "agent" if acts else STATE_KIND, STATE)
        if not resume:
            (folder / TASKS).unlink(missing_ok=True)  # of the model that was there
        tidy(folder, (INDEX, TASKS, STATE))
    set_up(learner, fabric)
    balance = _balance(tasks).to(fabric.device) if uncertainty else None
    kept = {} if balance is None else {"log_variance": balance.log_variance.data}
    if isinstance(tasks, Families):
        tasks.losses.fill_(torch.nan)  # those of another training
        kept["family_losses"] = tasks.losses
    outer = OuterStep(learner, fabric, weight_decay, clip, balance)
    run = Run(learner, outer, None if ema is None else Average(learner, ema), kept)
    how = {"precision": precision, "accumulate": accumulate, "ema": ema}
    if resume and folder is not None:
        load_state(folder, run, recipe, how, fabric)
    training = run.training
    backend = "loop" if outer.sharded else backend  # a module that FSDP gathers as it runs is not for vmap
    every = validate_every or max(1, steps // 20)
    started = clock() - run.seconds

    def late() -> bool:
        return seconds is not None and clock() - started > seconds

    def batches() -> Iterator[tuple[Task, int]]:
        """This rank's share of each batch of the step, and the batch's family."""
        for index in range(run.step * accumulate, (run.step + 1) * accumulate):
            family = tasks.family(index) if isinstance(tasks, Families) else 0
            yield _share(tasks, index, augment, fabric), family

    def look() -> bool:
        """Validates, and keeps the best; true where patience has run out."""
        with run.averaged():
            value = None if validation is None else _validate(learner, validation, validation_tasks, backend, fabric)
            row = {"step": run.step, "validation": value, "seconds": round(clock() - started, 3)}
            row |= run.since.row(scaled=outer.scaler is not None)
            if balance is not None and isinstance(tasks, Families):
                counted = zip(tasks.names, balance.counts(), strict=True)
                row |= {f"weight of {name}": round(count, 6) for name, count in counted}
            if run.note(row) and folder is not None and recipe is not None:
                weights = whole(learner.state_dict(), fabric)
                if first_rank:
                    save_model(folder, learner, recipe, training.history, weights)
        return run.out_of_patience(patience)

    def tell() -> None:
        """After the state is written, so that no log is ahead of it but for ``save_every``."""
        for told in watch if first_rank else ():
            told(training.history[-1])

    def save() -> None:
        run.seconds = clock() - started
        if folder is not None:
            save_state(folder, run, recipe, how, fabric)

    learner.train()
    try:
        with progress("meta-train", steps, "steps", show_progress and first_rank) as advance:
            advance(run.step)
            if run.step < steps:
                learner.advance(run.step / steps)
                sure = steps if patience is None else min(steps, run.step + patience * every)  # it may stop then
                sure = sure if seconds is None else run.step + 1
                plan = _plan(training.plan, learner, batches(), backend, (sure - run.step) * accumulate, fabric)
                training.plan = plan
            stop, time_is_up = run.out_of_patience(patience), fabric.broadcast(late())
            if not training.history:
                stop = look()
                save()
                tell()
            while run.step < steps and not stop and not time_is_up:
                now = rate * share_of_rate(schedule, run.step, steps, warmup)
                outcome = outer(batches(), plan, now, late())
                if isinstance(tasks, Families):
                    tasks.tell(outcome.families, outcome.losses)
                run.since.add(outcome, now)
                run.step += 1
                if run.average is not None:
                    run.average.update(run.step)
                time_is_up = outcome.late
                last, shown = run.step == steps or time_is_up, {}
                if looked := run.step % every == 0 or last:
                    stop = look()
                    shown = {name: training.history[-1][name] for name in ("loss", "validation")}
                if last or stop or (looked if save_every is None else run.step % save_every == 0):
                    save()
                if looked:
                    tell()
                if run.step < steps:
                    learner.advance(run.step / steps)
                advance(1, **shown)
            training.stopped = "patience" if stop else "steps" if run.step == steps else "seconds"
    finally:
        run.restore_best()
    return training


def check_outer(precision: str | None, accumulate: int, ema: float | None, schedule: str) -> None:
    """Checks these options of ``meta_train``, before any work.

    Raises:
        BadInput: an unknown name, or a number out of range.
    """
    if precision is not None and precision not in FABRICS_NAMES:
        raise unknown("precision", precision, FABRICS_NAMES)
    if accumulate < 1:
        raise BadInput(f"accumulate {accumulate}: needs at least 1")
    if ema is not None and not 0 < ema < 1:
        raise BadInput(f"ema {ema}: needs to be between 0 and 1, such as 0.99")
    if schedule not in get_args(Schedule):
        raise unknown("schedule", schedule, get_args(Schedule))


def of_torchrun(precision: Precision | None = None) -> Fabric | None:
    """The Fabric of the processes that ``torchrun`` has started; ``None`` where it has started no other.

    >>> of_torchrun()
    """
    here, machines = processes.together()
    if (here, machines) == (1, 1):
        return None
    from lightning_fabric import Fabric

    named: Any = FABRICS_NAMES[precision or "fp32"]
    return Fabric(accelerator="auto", devices=here, num_nodes=machines, precision=named)


def _fabric(fabric: Fabric | None, precision: Precision | None) -> tuple[Fabric, Precision]:
    """One that computes in that precision, and which it is."""
    from lightning_fabric import Fabric  # it takes seconds to import, which predicting need not pay

    if fabric is None:
        fabric = Fabric(accelerator="auto", devices=1)
        if precision == "fp16" and fabric.device.type == "cpu":
            raise BadInput("precision 'fp16': it is for GPUs, and there is none; choose 'bf16'")
        if precision not in (None, "fp32"):
            fabric = Fabric(accelerator="auto", devices=1, precision=FABRICS_NAMES[precision])  # type: ignore[arg-type]
    own = fabric.strategy.precision.precision
    found = next((name for name, theirs in FABRICS_NAMES.items() if theirs == own), None)
    if found is None:
        raise BadInput(f"precision {own!r} of the Fabric: choose {', '.join(map(repr, FABRICS_NAMES.values()))}")
    if precision not in (None, found):
        raise BadInput(f"precision {precision!r}: that of the Fabric is {own!r}; leave precision out")
    return fabric, found  # type: ignore[return-value]


def _plan(
    plan: Plan | None,
    learner: Learner,
    batches: Iterator[tuple[Task, int]],
    backend: Backend,
    steps: int,
    fabric: Fabric,
) -> Plan:
    """How to run the batches: the given plan, or what the first rank measures; the same on all ranks."""
    if plan is not None and (plan.backend != "compile" or compiles(fabric.device)):
        return plan
    if plan is not None:
        say(
            "the training was compiled, and this machine has no compiler: it goes on by another plan, and so with "
            "other rounding"
        )
    batch, _ = next(batches)
    if fabric.is_global_zero:
        with fabric.autocast():
            plan = plan_for(learner, batch, backend, steps=steps)
    return fabric.broadcast(plan)  # type: ignore[return-value]


def _share(tasks: Tasks, index: int, augment: Sequence[Augment], fabric: Fabric) -> Task:
    """This rank's tasks of a batch. What changes a batch may mix its tasks, so that each rank then draws all of it."""
    size = tasks.batch // fabric.world_size
    first, mine = index * tasks.batch, fabric.global_rank * size
    if not augment:
        return fabric.to_device(tasks.tasks(first + mine, first + mine + size))
    batch, generator = fabric.to_device(tasks.tasks(first, first + tasks.batch)), _generator(tasks.seed, first)
    for change in augment:
        batch = change(batch, generator)
    return take(batch, slice(mine, mine + size))


@torch.no_grad()
def _validate(learner: Learner, tasks: Tasks, count: int, backend: Backend, fabric: Fabric) -> float:
    """The mean metric of the tasks, of which each rank takes as many: the last, perhaps, some that do not count."""
    size = math.ceil(count / fabric.world_size)
    first = start = fabric.global_rank * size
    learner.eval()
    values = []
    while start < first + size:
        stop = min((start // tasks.batch + 1) * tasks.batch, first + size)
        with fabric.autocast():
            batch = fabric.to_device(tasks.tasks(start, stop))
            _, metrics = over_tasks(learner.loss, batch, "auto" if backend == "compile" else backend)
        values.append(metrics[learner.measured_by])
        start = stop
    learner.train()
    total = torch.cat(values)[: max(0, count - first)].double().sum()
    if fabric.world_size > 1:
        total = fabric.all_reduce(total, reduce_op="sum")  # type: ignore[assignment]
    mean = float(total) / count
    if not math.isfinite(mean):
        raise Diverged("meta-training diverged: the validation error is not finite; lower the rate or the inner rate")
    return round(mean, 6)


def _balance(tasks: Tasks) -> UncertaintyWeights:
    if not isinstance(tasks, Families):
        raise BadInput("uncertainty: it weighs families, and these tasks are of one; give Families, or leave it out")
    return UncertaintyWeights(len(tasks.names))


def _generator(seed: int, first: int) -> torch.Generator:
    """Of a batch, whoever draws it."""
    key = derive(keys(seed, np.array([first])), 6)
    return torch.Generator().manual_seed(int(key[0]))
