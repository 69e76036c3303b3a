"""The gradient-based learner: five independent choices, each published method one of their combinations."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from operator import index
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from metafit.context import Context
from metafit.errors import BadInput, some
from metafit.learners.base import Adapted, Learner, mask_absent, present
from metafit.learners.film import Film
from metafit.learners.implicit import at_optimum
from metafit.losses import CrossEntropy, Loss, SquaredError
from metafit.optim import SGD, MetaOptimizer, Params, Proximal, State
from metafit.optim.base import by_name
from metafit.over_tasks.inner import inner_gradient
from metafit.task import Examples, Task, count, weights

Outer = Literal["unrolled", "first_order", "implicit", "reptile"]
MultiStep = Literal["last", "annealed", "learned"]
Precision = Literal["full", "bf16"]
Unlabelled = tuple[Any, Tensor]  # inputs of a query set, and their weights (Q,)
SHARPNESS = 10.0  # of the softmax over steps: it turns on units, and Adam moves a logit by about the rate a step
ANNEALED_UNTIL = 0.15  # the share of the training after which the last step's query loss alone counts


class GradientLearner(Learner):
    """Adapts some parameters of a model by a few steps of an update rule on the support loss.

    MAML (Finn et al., 2017, arXiv:1703.03400) is all × SGD × criterion × unrolled × linear; ANIL (Raghu et al., 2020,
    arXiv:1909.09157) changes ``scope`` to head. With random or pretrained parameters that are not meta-trained it is
    the from-scratch or the fine-tuning baseline.

    Args:
        body: the embedding, from inputs to ``(N, dim)``.
        head: from ``(N, dim)`` to ``(N, way)`` or ``(N, D)``; one with a method ``start`` (``PrototypeHead``) gives the
            parameters that it starts a task from.
        way: outputs of a classifier, ``None`` for regression.
        scope: which parameters adapt: ``"all"``, ``"head"``, ``"body"``, ``"norm"``, ``"lora"`` (the adapters that
            ``low_rank`` put into the body, and the head), ``"film"`` (those of ``Film``, and the head), or a pattern
            that their names match (``"body.layer4.*"``).
        optimizer: the update rule, or a function that makes it from the parameters that adapt.
        inner_loss: of the support set, or a function that makes it from the parameters that adapt; the criterion where
            ``None``.
        outer: ``"unrolled"`` differentiates through the inner steps, ``"first_order"`` takes the gradient at the
            adapted parameters (section 5.2 of Finn et al.), which reaches the update rule and not the inner loss,
            ``"implicit"`` that of an inner optimum which ``pull`` keeps near the start (iMAML, see ``at_optimum``): its
            memory does not depend on the number of steps, and the support loss must be the same at each.
            ``"reptile"`` moves the start towards the adapted parameters (Nichol et al., 2018, arXiv:1803.02999): they
            alone are learned, and the query set is only measured.
        steps, test_steps: inner steps in training and in evaluation mode.
        precision: ``"bf16"`` runs the model in half precision (autocast): faster on processors that have it, and
            less exact; parameters, updates and losses stay as they are.
        pull: λ of the implicit gradient; ``iterations``: of its conjugate gradients.
        multi_step: which steps' query losses are trained on: ``"last"``; ``"annealed"``, all of them with weights that
            move to the last over the first 15 % of the training (MAML++, Antoniou et al., 2019, arXiv:1810.09502,
            section 4, MSL; the share is that of the authors' runs on miniImageNet); ``"learned"``, with weights that
            are learned, of which the largest says how many steps are taken in evaluation mode.
        first_order_until: the share of the training, below 1, that takes first-order gradients (MAML++, DA; 0 in the
            authors' runs).
        per_step_norm: normalisation layers, where the network has any that adapts, have a learned shift of their scale
            and bias at each step (MAML++, BNWB); their statistics are those of the batch at that step.
        noise: what the features of the support set, and of it alone, go through in the inner steps (``MetaDropout``).

    Raises:
        BadInput: an unknown choice, a number out of range, a scope that matches nothing, or a part with parameters
            that the outer gradient would never train.
    """

    step_weights: Tensor

    def __init__(
        self,
        body: nn.Module,
        head: nn.Module,
        way: int | None,
        scope: str = "all",
        optimizer: MetaOptimizer | Callable[[Params], MetaOptimizer] | None = None,
        inner_loss: Loss | Callable[[Params], Loss] | None = None,
        outer: Outer = "unrolled",
        steps: int = 1,
        test_steps: int | None = None,
        precision: Precision = "full",
        pull: float = 2.0,
        iterations: int = 5,
        multi_step: MultiStep = "last",
        first_order_until: float = 0.0,
        per_step_norm: bool = False,
        noise: nn.Module | None = None,
    ):
        super().__init__(way)
        for name, number in (("steps", steps), ("test_steps", test_steps)):
            if number is not None and index(number) < 1:
                raise BadInput(f"{name} {number}: needs at least 1 inner step")
        if multi_step == "learned" and (test_steps or steps) > steps:
            raise BadInput(
                f"test_steps {test_steps}: multi_step 'learned' chooses among the {steps} steps of the training; leave "
                "test_steps out, or raise steps"
            )
        for name, value, choices in (
            ("outer gradient", outer, Outer),
            ("precision", precision, Precision),
            ("multi_step", multi_step, MultiStep),
        ):
            if value not in get_args(choices):
                raise BadInput(f"{name} {value!r}: choose {', '.join(map(repr, get_args(choices)))}")
        if not pull > 0 or index(iterations) < 1:
            raise BadInput(f"pull {pull}, iterations {iterations}: both need to be above 0")
        if multi_step != "last" and outer in ("implicit", "reptile"):
            raise BadInput(f"multi_step {multi_step!r}: the {outer} gradient has the last step only; choose unrolled")
        if not 0 <= first_order_until < 1 or (first_order_until and outer != "unrolled"):
            raise BadInput(f"first_order_until {first_order_until}: needs 0 or more, less than 1, and outer 'unrolled'")
        _refuse_tied(body, head)
        parts = OrderedDict(body=body, head=head) if noise is None else OrderedDict(body=body, noise=noise, head=head)
        self.model = nn.Sequential(parts)
        self.adapting = tuple(_select(self.model, scope))
        if hasattr(head, "start") and not set(_select(self.model, "head")) <= set(self.adapting):
            raise BadInput(f"scope {scope!r}: leaves out a head that starts from prototypes; choose all, head or film")
        rule = optimizer if optimizer is not None else SGD()
        self.optimizer = rule if isinstance(rule, MetaOptimizer) else rule(self.initial())
        loss = inner_loss or (SquaredError() if way is None else CrossEntropy())
        self.inner_loss: Loss = loss if isinstance(loss, Loss) else loss(self.initial())
        self.outer, self.steps, self.test_steps = outer, steps, test_steps or steps
        self.precision, self.pull, self.iterations = precision, pull, iterations
        self.multi_step, self.every_step = multi_step, multi_step != "last"
        self.first_order_until, self.first_order_now = first_order_until, False
        self.body_adapts = any(name.startswith("body.") for name in self.adapting)
        if not self.body_adapts and self.inner_loss.moves_features:
            raise BadInput(
                f"inner loss {type(self.inner_loss).__name__} moves features, which scope {scope!r} leaves as they "
                "are: choose another of either"
            )
        parameters = dict(self.model.named_parameters())
        norms = _within_norms(self.model) if per_step_norm and self.body_adapts else []
        self.shifts = by_name({n: parameters[n].new_zeros(self.steps + 1, *parameters[n].shape) for n in norms})
        _refuse_untrained(self)
        _refuse_without_optimum(self)
        if multi_step == "learned":
            self.step_logits = nn.Parameter(torch.zeros(steps))
        self.register_buffer("step_weights", torch.full((steps,), 1 / steps), persistent=False)
        self.advance(0.0)

    @property
    def second_order(self) -> bool:  # type: ignore[override]
        return self.outer in ("unrolled", "implicit")

    @property
    def trains_on_queries(self) -> bool:  # type: ignore[override]
        return self.outer != "reptile"

    @property
    def transductive(self) -> str:
        return "the inner loss sees the query inputs" if self.inner_loss.transductive else super().transductive

    def initial(self) -> Params:
        """The meta-learned parameters that each task starts from, by name."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.adapting}

    def advance(self, done: float) -> None:
        super().advance(done)
        self.inner_loss.advance(done)
        self.first_order_now = done < self.first_order_until
        if self.multi_step == "annealed":
            self.every_step = done < ANNEALED_UNTIL
            others = max(0.0, 1 - done / ANNEALED_UNTIL) / self.steps
            self.step_weights.fill_(others)[-1] = 1 - others * (self.steps - 1)

    def adapt(self, support: Examples) -> Adapted:
        if self.inner_loss.transductive:  # it adapts as soon as there are queries
            return {"support": {"x": support.x, "y": support.y, "weight": weights(support)}}
        return self._end(support)

    def loss(self, task: Task) -> tuple[Tensor, dict[str, Tensor]]:
        if self.training and self.every_step:
            path = self.path(task)
            scored = [self.score(self.predict(adapted, task.query.x), task.query) for adapted in path[1:]]
            learned = self.multi_step == "learned"
            weights = (SHARPNESS * self.step_logits).softmax(0) if learned else self.step_weights
            return (weights * torch.stack([loss for loss, _ in scored])).sum(), scored[-1][1]
        adapted = self._end(task.support, self._unlabelled(task))
        loss, metrics = self.score(self.predict(adapted, task.query.x), task.query)
        if self.training and self.outer == "reptile":
            return towards(loss, self._moved(), adapted["parameters"]), metrics
        return loss, metrics

    def trajectory(self, support: Examples, unlabelled: Unlabelled | None = None) -> list[Adapted]:
        return list(islice(self._states(support, unlabelled), self._chosen() + 1))

    def path(self, task: Task) -> list[Adapted]:
        return self.trajectory(task.support, self._unlabelled(task))

    def _unlabelled(self, task: Task) -> Unlabelled | None:
        return (task.query.x, weights(task.query)) if self.inner_loss.transductive else None

    def _end(self, support: Examples, unlabelled: Unlabelled | None = None) -> Adapted:
        """The state that answers; those before it are not kept."""
        return next(islice(self._states(support, unlabelled), self._chosen(), None))

    def _states(self, support: Examples, unlabelled: Unlabelled | None = None) -> Iterator[Adapted]:
        """The start, and what it is after each step."""
        steps = self._taken()
        if self.training and self.body_adapts:
            _refuse_running_statistics(self.model)
        if self.training and self.outer == "implicit":
            _refuse_dropout(self.model if self.body_adapts else self.model.get_submodule("head"))
        if self.inner_loss.transductive and unlabelled is None:
            raise BadInput(
                "the inner loss is transductive: the steps depend on the queries; take path(task), or adapt and predict"
            )
        here = None if self.way is None else present(support, self.way)
        # what does not adapt is computed once, not at every step
        x = support.x if self.body_adapts else self._embedded(support.x)
        if unlabelled is not None and not self.body_adapts:
            unlabelled = self._embedded(unlabelled[0]), unlabelled[1]
        start = self._start(support, x)
        given = (x, unlabelled, support.y, weights(support), here)
        params, state = start, self.optimizer.init(start)
        for step in range(steps + 1):
            if step > 0:
                params, state = self._step(params, state, start, Context(step - 1, steps), given)
            if step == steps and self.outer == "implicit" and torch.is_grad_enabled():
                loss = partial(self._support_loss, Context(steps, steps))
                found = {name: p.detach() for name, p in params.items()}
                params = at_optimum(loss, start, found, self.pull, self.iterations, self._others(steps), *given)
            shifted = {**params, **self._shifted(params, self._shifts(step))}
            # a mask is no floating-point tensor: it stays out of the parameters that a rule updates
            yield {"parameters": shifted} if here is None else {"parameters": shifted, "present": here}

    def _step(
        self, params: Params, state: State, start: Params, context: Context, given: tuple[Any, ...]
    ) -> tuple[Params, State]:
        """One inner step from ``params``, of an adaptation that began at ``start``."""
        through_steps = self.outer == "unrolled" and not self.first_order_now
        with torch.set_grad_enabled(torch.is_grad_enabled() and through_steps):
            loss = partial(self._support_loss, context)
            grads = inner_gradient(loss, params, self._others(context.step), *given)
            if self.outer == "implicit":
                grads = {name: g + self.pull * (params[name] - start[name]) for name, g in grads.items()}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.outer in ("unrolled", "first_order")):
            return self.optimizer.update(params, grads, state, context)

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        if "support" in adapted:
            counted = adapted["support"]["weight"].new_ones(count(x))
            adapted = self._end(Examples(**adapted["support"]), (x, counted))
        z = x if self.body_adapts else self._embedded(x)
        return _masked(self._outputs(adapted["parameters"], z)[0], adapted.get("present"))

    def _start(self, support: Examples, x: Any) -> Params:
        head = self.model.get_submodule("head")
        if not hasattr(head, "start"):
            return self.initial()
        features = self._embedded(x) if self.body_adapts else x
        own: Params = head.start(features, support.y, weights(support))  # type: ignore[operator]
        return {**self.initial(), **{f"head.{n}": v for n, v in own.items() if f"head.{n}" in self.adapting}}

    def _moved(self) -> Params:
        """What Reptile moves: what tasks start from, but for a head that each of them makes for itself."""
        anew = "head." if hasattr(self.model.get_submodule("head"), "start") else ()
        return {name: p for name, p in self.initial().items() if not name.startswith(anew)}

    def _taken(self) -> int:
        return self.steps if self.training else self.test_steps

    def _chosen(self) -> int:
        """The number of steps after which it answers."""
        if self.multi_step != "learned" or self.training:
            return self._taken()
        largest = self.steps - int(self.step_logits.flip(0).argmax())  # the last of several
        return min(largest, self._taken())

    def _shifts(self, step: int) -> Params:
        """What is added to the parameters of normalisation layers at a step, by their names."""
        return {name.replace("/", "."): shift[min(step, self.steps)] for name, shift in self.shifts.items()}

    def _shifted(self, params: Params, shifts: Params, others: Params | None = None) -> Params:
        """The parameters of normalisation layers as they are at a step."""
        if not shifts:
            return {}
        values = {**(dict(self.model.named_parameters()) if others is None else others), **params}
        return {name: values[name] + shift for name, shift in shifts.items()}

    def _others(self, step: int) -> dict[str, Params]:
        """The parameters that the support loss of a step is differentiated in and that do not adapt, by name, of each
        part. What other steps have for their own is left out: so all steps are the same computation, for which code is
        generated once."""
        used = "" if self.body_adapts else ("head.", "noise.")
        fixed: Params = {
            n: p for n, p in self.model.named_parameters() if n.startswith(used) and n not in self.adapting
        }
        parts: dict[str, Params] = {"model": fixed, "inner_loss": self.inner_loss.parameters_at(step)}
        trained = {part: {n: p for n, p in named.items() if p.requires_grad} for part, named in parts.items()}
        return {**trained, "shifts": self._shifts(step)}

    def _support_loss(
        self,
        context: Context,
        params: Params,
        others: dict[str, Params],
        x: Any,
        unlabelled: Unlabelled | None,
        y: Tensor,
        weight: Tensor,
        here: Tensor | None,
    ) -> Tensor:
        fixed = {**dict(self.model.named_parameters()), **others["model"]}
        values = {**others["model"], **params, **self._shifted(params, others["shifts"], fixed)}
        outputs, features = self._outputs(values, x, noisy=True)
        outputs = _masked(outputs, here)
        context = context._replace(outputs=outputs, features=features)
        if self.inner_loss.reads_means:
            context = context._replace(means=torch.stack([params[name].mean() for name in self.adapting]))
        if unlabelled is not None:
            seen = _masked(self._outputs(values, unlabelled[0])[0], here)
            context = context._replace(unlabelled=seen, unlabelled_weight=unlabelled[1])
        return functional_call(self.inner_loss, others["inner_loss"], (outputs, y, weight, context))

    def _outputs(self, params: Params, x: Any, noisy: bool = False) -> tuple[Tensor, Tensor]:
        """The head's outputs and what it saw; from inputs, or from features where the body does not adapt."""
        first = next(iter(params.values()))
        with self._cast(first):
            features = self._part("body", params, x) if self.body_adapts else x
            if noisy and hasattr(self.model, "noise"):
                features = self._part("noise", params, features)
            return self._part("head", params, features).to(first.dtype), features

    def _embedded(self, x: Any) -> Tensor:
        """Features by the body as it is meta-learned, in the precision of what adapts."""
        first = next(iter(self.initial().values()))
        with self._cast(first):
            return self.model.get_submodule("body")(x).to(first.dtype)

    def _cast(self, like: Tensor) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "full":
            return contextlib.nullcontext()
        return torch.autocast(like.device.type, torch.bfloat16, cache_enabled=False)

    def _part(self, name: str, params: Params, x: Any) -> Any:
        own = {n.removeprefix(f"{name}."): p for n, p in params.items() if n.startswith(f"{name}.")}
        return functional_call(self.model.get_submodule(name), own, (x,))


def towards(value: Tensor, start: Params, found: Params) -> Tensor:
    """A scalar of that value whose gradient in the start is start − found: Reptile's, as a loss."""
    ways = [(p * (p - found[name]).detach()).sum() for name, p in start.items()]
    surrogate = torch.stack(ways).sum()
    return value.detach() + surrogate - surrogate.detach()


def _masked(outputs: Tensor, here: Tensor | None) -> Tensor:
    return outputs if here is None else mask_absent(outputs, here)


def _refuse_untrained(learner: GradientLearner) -> None:
    """What an outer gradient does not reach: the first-order one no inner gradient, that of an optimum not the rule
    that found it, and Reptile's nothing but the start of what adapts."""
    rule: dict[str, nn.Module] = {f"update rule ({type(learner.optimizer).__name__})": learner.optimizer}
    within = _differentiated(learner)
    unreached = {"first_order": within, "implicit": rule, "reptile": {**rule, **within}}
    for name, part in unreached.get(learner.outer, {}).items():
        if any(p.requires_grad for p in part.parameters()):
            raise BadInput(
                f"outer {learner.outer!r}: the parameters of the {name} would never be trained; choose outer "
                "'unrolled', or leave them out"
            )
    left = [n for n, p in learner.model.named_parameters() if p.requires_grad and n not in learner.adapting]
    if learner.outer == "reptile" and (left or not learner._moved()):
        raise BadInput(
            f"outer 'reptile' moves the start of what adapts, and {some(left, 3) or 'a head from prototypes'} would "
            "never be trained: choose scope 'all', or another outer gradient"
        )


def _refuse_without_optimum(learner: GradientLearner) -> None:
    """The implicit gradient is that of a minimum of one support loss and its own pull."""
    if learner.outer != "implicit":
        return
    loss = learner.inner_loss
    alike = len(loss.parameters_at(0)) == len(list(loss.parameters()))
    changing = [name for name, part in _differentiated(learner).items() if not (part is loss and alike)]
    if any(isinstance(rule, Proximal) for rule in learner.optimizer.modules()):
        changing.append("proximal (raise pull instead)")
    if changing:
        raise BadInput(
            "outer 'implicit' is the gradient at an optimum of one loss, the same at every step, and its pull: leave "
            f"out the {changing[0]}, or choose outer 'unrolled'"
        )


def _differentiated(learner: GradientLearner) -> dict[str, nn.Module]:
    """What the support loss has beside the model, by what users call it."""
    parts: dict[str, nn.Module] = {f"inner loss ({type(learner.inner_loss).__name__})": learner.inner_loss}
    if hasattr(learner.model, "noise"):
        parts["noise (meta_dropout)"] = learner.model.get_submodule("noise")
    if len(learner.shifts):
        parts["shifts (per_step_norm)"] = learner.shifts
    return parts


def _refuse_tied(body: nn.Module, head: nn.Module) -> None:
    names = {id(p): name for name, p in body.named_parameters()}
    for name, p in head.named_parameters():
        if id(p) in names:
            raise BadInput(
                f"head.{name} is body.{names[id(p)]}, one parameter, and the two adapt apart: give the head a copy"
            )


def _refuse_running_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None:
            raise BadInput(
                f"batch normalisation {name!r} updates running statistics, which adaptation cannot differentiate: "
                "make it with track_running_stats=False, use GroupNorm, take a backbone without (--backbone conv4), or "
                "adapt the head alone (anil)"
            )


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise BadInput(
                f"dropout {name!r} draws anew at each step, and outer 'implicit' is the gradient at an optimum of one "
                "loss: set its p to 0, or choose outer 'unrolled'"
            )


def _within_norms(model: nn.Module) -> list[str]:
    """The parameters of PyTorch's normalisation layers, and of those that a package calls its own (LlamaRMSNorm)."""
    norms = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    named = dict(model.named_modules())
    within = {prefix for prefix, m in named.items() if isinstance(m, norms) or type(m).__name__.endswith("Norm")}
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in within]


def _select(model: nn.Module, scope: str) -> list[str]:
    fixed = tuple(f"{prefix}." for prefix, module in model.named_modules() if getattr(module, "meta_only", False))
    names = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith(fixed)]
    if scope == "norm":
        norms = set(_within_norms(model))
        chosen = [name for name in names if name in norms]
    elif scope == "film":
        film = {f"{prefix}." for prefix, module in model.named_modules() if isinstance(module, Film)}
        own = {f"{prefix}{part}" for prefix in film for part in ("gamma", "beta")}
        chosen = [n for n in names if n in own or n.startswith("head.")] if own else []
    elif scope == "lora" and any(".lora_" in name for name in names):
        chosen = [name for name in names if ".lora_" in name or name.startswith("head.")]
    else:
        pattern = {"all": "*", "head": "head.*", "body": "body.*"}.get(scope, scope)
        chosen = [name for name in names if fnmatchcase(name, pattern)]
    if not chosen:
        raise BadInput(
            f"scope {scope!r} matches no trainable parameter; choose all, head, body, norm, lora, film or a pattern "
            f"over: {some(names, 6)}"
        )
    return chosen
