"""The gradient-based learner: five independent choices, each published method one of their combinations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from operator import index
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from metafit.context import Context
from metafit.errors import BadInput
from metafit.learners.base import Adapted, Learner, mask_absent, present
from metafit.learners.implicit import at_optimum
from metafit.losses import CrossEntropy, Loss, SquaredError
from metafit.optim import SGD, MetaOptimizer, Params
from metafit.over_tasks.inner import inner_gradient
from metafit.task import Examples, weights

Outer = Literal["unrolled", "first_order", "implicit"]
Precision = Literal["full", "bf16"]


class GradientLearner(Learner):
    """Adapts some parameters of a model by a few steps of an update rule on the support loss.

    MAML (Finn et al., 2017, arXiv:1703.03400) is all × SGD × criterion × unrolled × linear; ANIL (Raghu et al., 2020,
    arXiv:1909.09157) changes ``scope`` to head. With random or pretrained parameters that are not meta-trained it is
    the from-scratch or the fine-tuning baseline.

    Args:
        body: the embedding, from inputs to ``(N, dim)``.
        head: from ``(N, dim)`` to ``(N, way)`` or ``(N, D)``.
        way: outputs of a classifier, ``None`` for regression.
        scope: which parameters adapt: ``"all"``, ``"head"``, ``"body"``, ``"norm"``, ``"lora"`` (the adapters that
            ``low_rank`` put into the body, and the head), or a pattern that their names match (``"body.layer4.*"``).
        optimizer: the update rule, or a function that makes it from the parameters that adapt.
        inner_loss: of the support set; the criterion where ``None``.
        outer: ``"unrolled"`` differentiates through the inner steps, ``"first_order"`` takes the gradient at the
            adapted parameters (section 5.2 of Finn et al.), ``"implicit"`` that of an inner optimum which ``pull``
            keeps near the start (iMAML, see ``at_optimum``): its memory does not depend on the number of steps.
        steps, test_steps: inner steps in training and in evaluation mode.
        precision: ``"bf16"`` runs the model in half precision (autocast): faster on processors that have it, and
            less exact; parameters, updates and losses stay as they are.
        pull: λ of the implicit gradient; ``iterations``: of its conjugate gradients.
    """

    def __init__(
        self,
        body: nn.Module,
        head: nn.Module,
        way: int | None,
        scope: str = "all",
        optimizer: MetaOptimizer | Callable[[Params], MetaOptimizer] | None = None,
        inner_loss: Loss | None = None,
        outer: Outer = "unrolled",
        steps: int = 1,
        test_steps: int | None = None,
        precision: Precision = "full",
        pull: float = 2.0,
        iterations: int = 5,
    ):
        super().__init__(way)
        if index(steps) < 1 or (test_steps is not None and index(test_steps) < 1):
            raise BadInput(f"inner steps {steps}, {test_steps}: needs at least 1")
        if outer not in get_args(Outer):
            raise BadInput(f"outer gradient {outer!r}: choose {', '.join(map(repr, get_args(Outer)))}")
        if precision not in get_args(Precision):
            raise BadInput(f"precision {precision!r}: choose {', '.join(map(repr, get_args(Precision)))}")
        if not pull > 0 or index(iterations) < 1:
            raise BadInput(f"pull {pull}, iterations {iterations}: both need to be above 0")
        self.model = nn.Sequential(OrderedDict(body=body, head=head))
        self.adapting = tuple(_select(self.model, scope))
        rule = optimizer if optimizer is not None else SGD()
        self.optimizer = rule if isinstance(rule, MetaOptimizer) else rule(self.initial())
        self.inner_loss: Loss = inner_loss or (SquaredError() if way is None else CrossEntropy())
        self.outer, self.steps, self.test_steps = outer, steps, test_steps or steps
        self.precision, self.pull, self.iterations = precision, pull, iterations
        self.body_adapts = any(name.startswith("body.") for name in self.adapting)

    @property
    def second_order(self) -> bool:  # type: ignore[override]
        return self.outer != "first_order"

    def initial(self) -> Params:
        """The meta-learned parameters that each task starts from, by name."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.adapting}

    def trajectory(self, support: Examples) -> list[Adapted]:
        steps = self.steps if self.training else self.test_steps
        if self.training and self.body_adapts:
            _refuse_running_statistics(self.model)
        here = None if self.way is None else present(support, self.way)
        # what does not adapt is computed once, not at every step
        x = support.x if self.body_adapts else self.model.get_submodule("body")(support.x)
        start = self.initial()
        given = (self._others(), x, support.y, weights(support), here)
        path, state, unrolled = [start], self.optimizer.init(start), self.outer == "unrolled"
        for step in range(steps):
            context = Context(step, steps)
            with torch.set_grad_enabled(torch.is_grad_enabled() and unrolled):
                grads = inner_gradient(partial(self._support_loss, context), path[-1], *given)
                if self.outer == "implicit":
                    grads = {name: g + self.pull * (path[-1][name] - start[name]) for name, g in grads.items()}
            params, state = self.optimizer.update(path[-1], grads, state, context)
            path.append(params)
        if self.outer == "implicit" and torch.is_grad_enabled():
            loss, found = partial(self._support_loss, Context(steps, steps)), {n: p.detach() for n, p in params.items()}
            path[-1] = at_optimum(loss, start, found, self.pull, self.iterations, *given)
        # a mask is no floating-point tensor: it stays out of the parameters that a rule updates
        return [{"parameters": p} if here is None else {"parameters": p, "present": here} for p in path]

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        z = x if self.body_adapts else self.model.get_submodule("body")(x)
        return _masked(self._outputs(adapted["parameters"], z), adapted.get("present"))

    def _others(self) -> dict[str, Params]:
        """The parameters that the support loss is differentiated in and that do not adapt, by name, of each part."""
        used = "" if self.body_adapts else "head."
        fixed = {n: p for n, p in self.model.named_parameters() if n.startswith(used) and n not in self.adapting}
        parts = {"model": fixed, "inner_loss": dict(self.inner_loss.named_parameters())}
        return {part: {n: p for n, p in named.items() if p.requires_grad} for part, named in parts.items()}

    def _support_loss(
        self,
        context: Context,
        params: Params,
        others: dict[str, Params],
        x: Any,
        y: Tensor,
        weight: Tensor,
        here: Tensor | None,
    ) -> Tensor:
        outputs = _masked(self._outputs({**others["model"], **params}, x), here)
        return functional_call(
            self.inner_loss, others["inner_loss"], (outputs, y, weight, context._replace(outputs=outputs))
        )

    def _outputs(self, params: Params, x: Any) -> Tensor:
        """From inputs, or from the body's features where the body does not adapt."""
        model: nn.Module = self.model
        values = params
        if not self.body_adapts:
            model, values = model.get_submodule("head"), {n.removeprefix("head."): p for n, p in params.items()}
        if self.precision == "full":
            return functional_call(model, values, (x,))
        first = next(iter(params.values()))
        with torch.autocast(first.device.type, torch.bfloat16, cache_enabled=False):
            return functional_call(model, values, (x,)).to(first.dtype)


def _masked(outputs: Tensor, here: Tensor | None) -> Tensor:
    return outputs if here is None else mask_absent(outputs, here)


def _refuse_running_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None:
            raise BadInput(
                f"batch normalisation {name!r} updates running statistics, which adaptation cannot differentiate: "
                "make it with track_running_stats=False, use GroupNorm, or adapt the head alone (anil)"
            )


def _select(model: nn.Module, scope: str) -> list[str]:
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if scope == "norm":
        norms = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
        within = {f"{prefix}." for prefix, module in model.named_modules() if isinstance(module, norms)}
        chosen = [name for name in names if name.rpartition(".")[0] + "." in within]
    elif scope == "lora" and any(".lora_" in name for name in names):
        chosen = [name for name in names if ".lora_" in name or name.startswith("head.")]
    else:
        pattern = {"all": "*", "head": "head.*", "body": "body.*"}.get(scope, scope)
        chosen = [name for name in names if fnmatchcase(name, pattern)]
    if not chosen:
        raise BadInput(
            f"scope {scope!r} matches no trainable parameter; choose all, head, body, norm, lora or a pattern over: "
            f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
        )
    return chosen
