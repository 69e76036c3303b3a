"""The five choices of the gradient-based learner, by name: any combination of them is a learner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from metafit.errors import BadInput, unknown
from metafit.learners.base import Learner
from metafit.learners.film import Film
from metafit.learners.gradient import GradientLearner, MultiStep, Outer, Precision
from metafit.learners.heads import CosineHead, CosinePrototypeHead, PrototypeHead
from metafit.learners.inputs import Inputs, Unit
from metafit.learners.lora import low_rank
from metafit.learners.meta_dropout import MetaDropout
from metafit.losses import Contrastive, CrossEntropy, Focal, Huber, LearnedLoss, Loss, MeTAL, SquaredError
from metafit.optim import (
    ALFA,
    SGD,
    Adam,
    DropGrad,
    EarlyStop,
    LSTMOptimizer,
    MetaCurvature,
    MetaOptimizer,
    MetaSGD,
    MLPOptimizer,
    Params,
    PerStepSGD,
    Proximal,
    TNet,
)

Choice = TypeVar("Choice")
Rule = Callable[[Params, Any, int], MetaOptimizer]  # from what adapts, the first rate (or their range) and the steps

RULES: dict[str, Rule] = {
    "sgd": lambda params, rate, steps: SGD(rate),
    "learned-sgd": lambda params, rate, steps: SGD(rate, learned=True),
    "momentum": lambda params, rate, steps: SGD(rate, momentum=0.9),
    "adam": lambda params, rate, steps: Adam(rate),
    "per-step": lambda params, rate, steps: PerStepSGD(params, steps, rate),
    "meta-sgd": lambda params, rate, steps: MetaSGD(params, rate),
    "meta-curvature": lambda params, rate, steps: MetaCurvature(params, rate),
    "t-net": lambda params, rate, steps: TNet(params, rate),
    "alfa": lambda params, rate, steps: ALFA(params, steps, rate),
    "lstm": lambda params, rate, steps: LSTMOptimizer(rate=rate),
    "mlp": lambda params, rate, steps: MLPOptimizer(rate=rate),
}

LOSSES: dict[str, Callable[[Inputs, Params, int], Loss]] = {
    "plain": lambda inputs, params, steps: SquaredError() if inputs.way is None else CrossEntropy(),
    "smoothed": lambda inputs, params, steps: CrossEntropy(smoothing=0.1),
    "focal": lambda inputs, params, steps: Focal(),
    "huber": lambda inputs, params, steps: Huber(),
    "contrastive": lambda inputs, params, steps: Contrastive(),
    "metal": lambda inputs, params, steps: MeTAL(params, inputs.way, steps, outputs=inputs.outputs),
    "metal-transductive": lambda inputs, params, steps: MeTAL(params, inputs.way, steps, transductive=True),
    "learned": lambda inputs, params, steps: LearnedLoss(inputs.way, outputs=inputs.outputs),
}
FOR_CLASSES = {"smoothed", "focal", "contrastive", "metal-transductive"}

HEADS: dict[str, Callable[[Inputs], nn.Module]] = {
    "linear": lambda inputs: inputs.head(),
    "cosine": lambda inputs: CosineHead(inputs.dim, inputs.way or 0),
    "prototype": lambda inputs: PrototypeHead(inputs.dim, inputs.way or 0),
    "cosine-prototype": lambda inputs: CosinePrototypeHead(inputs.dim, inputs.way or 0),
}

NAMES: dict[str, Sequence[str]] = {
    "rule": tuple(RULES),
    "loss": tuple(LOSSES),
    "head": tuple(HEADS),
    "scope": ("all", "head", "body", "norm", "film", "lora", "a pattern of names"),
}


def gradient(
    inputs: Inputs,
    rate: float | tuple[float, float] | None = None,
    steps: int | None = None,
    test_steps: int | None = None,
    scope: str = "all",
    rule: str = "sgd",
    loss: str = "plain",
    outer: Outer = "unrolled",
    head: str = "linear",
    rank: int | None = None,
    multi_step: MultiStep = "last",
    first_order_until: float = 0.0,
    per_step_norm: bool = False,
    drop_grad: float = 0.0,
    proximal: float = 0.0,
    early_stop: float = 0.0,
    meta_dropout: bool = False,
    precision: Precision = "full",
    pull: float | None = None,
    iterations: int | None = None,
) -> Learner:
    """MAML, and with other choices every method of its family.

    Args:
        inputs: what it is built over.
        rate: of the inner steps, at the start where it is learned (for Meta-SGD also a range, see there); ``None`` is a
            value that suits inputs, scope, rule and pull.
        steps: ``None`` is 5, or 1 for regression.
        scope: see ``GradientLearner``, or ``"film"``: a scale and shift of the features, and the head.
        rule: a name of ``RULES``; ``loss`` of ``LOSSES``, ``head`` of ``HEADS``.
        rank: of the adapters of scope ``"lora"``.
        drop_grad, proximal, early_stop: what ``DropGrad``, ``Proximal`` and ``EarlyStop`` take; 0 is without.
        meta_dropout: whether the features of a support set go through ``MetaDropout``.
        pull, iterations: see ``GradientLearner``; ``None`` is a value that suits inputs, and 5.
        test_steps, outer, multi_step, first_order_until, per_step_norm, precision: see ``GradientLearner``.

    Raises:
        BadInput: an unknown name, a number out of range, or options that exclude each other.
    """
    if outer != "implicit" and (pull is not None or iterations is not None):
        raise BadInput(f"pull {pull}, iterations {iterations}: only outer 'implicit' has them; leave them out")
    if rate is not None and not all(0 < end < float("inf") for end in np.atleast_1d(rate)):
        raise BadInput(f"rate {rate}: needs to be above 0, and finite")
    if isinstance(rate, (tuple, list)) and rule != "meta-sgd":
        raise BadInput(f"rate {rate}: rule {rule!r} begins with one rate, Meta-SGD alone draws from a range; give one")
    steps = (1 if inputs.way is None else 5) if steps is None else steps
    if pull is None:  # the paper's; towards frozen features of unit norm, whose losses are flat, it would hold all back
        pull = 0.1 if inputs.body is None else 2.0
    start = (
        inner_rate(inputs, scope, rule, pull if outer == "implicit" else max(0.0, proximal)) if rate is None else rate
    )
    make_rule, make_loss = _named("rule", rule, RULES), _named("loss", loss, LOSSES)
    make_head = _named("head", head, HEADS)
    if inputs.way is None and (head != "linear" or loss in FOR_CLASSES):
        raise BadInput(f"head {head!r}, loss {loss!r}: a regression takes the linear head, and a loss of numbers")
    if inputs.way is not None and loss == "huber":
        raise BadInput("loss 'huber' is for regression: choose plain, smoothed or focal for classes")

    def defended(params: Params) -> MetaOptimizer:
        made = make_rule(params, start, steps)
        made = DropGrad(made, drop_grad) if drop_grad else made
        made = EarlyStop(made, early_stop) if early_stop else made
        return Proximal(made, proximal) if proximal else made  # outermost: what stops is the pulled rule

    return GradientLearner(
        _body(inputs, scope, rank),
        make_head(inputs),
        inputs.way,
        scope,
        defended,
        lambda params: make_loss(inputs, params, steps),
        outer,
        steps,
        test_steps,
        precision,
        pull,
        5 if iterations is None else iterations,
        multi_step,
        first_order_until,
        per_step_norm,
        MetaDropout(inputs.dim) if meta_dropout else None,
    )


def finetune(inputs: Inputs, rate: float | None = None, steps: int = 50) -> Learner:
    head = inputs.head()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    rate = rate if rate is not None else _plain_rate(inputs)
    body = Unit() if inputs.of_one_length() else inputs.frozen()
    return GradientLearner(body, head, inputs.way, "all", SGD(rate), outer="first_order", steps=steps)


def scratch(inputs: Inputs, rate: float | None = None, steps: int = 50) -> Learner:
    if inputs.body is None:
        first = Unit() if inputs.of_one_length() else nn.Identity()
        body: nn.Module = nn.Sequential(first, nn.Linear(inputs.dim, inputs.dim), nn.ReLU())
    else:
        body = _anew(inputs.body)
    rate = rate if rate is not None else _plain_rate(inputs)
    return GradientLearner(body, inputs.head(), inputs.way, "all", SGD(rate), outer="first_order", steps=steps)


def _named(kind: str, name: str, choices: Mapping[str, Choice]) -> Choice:
    if name not in choices:
        raise unknown(kind, name, choices)
    return choices[name]


def _body(inputs: Inputs, scope: str, rank: int | None) -> nn.Module:
    if scope != "lora" and rank is not None:
        raise BadInput(f"rank {rank}: only scope 'lora' has a rank; say scope=lora too, or leave rank out")
    if scope != "lora":
        body = inputs.trainable(normalise=inputs.of_one_length())
        return Film(body, inputs.dim) if scope == "film" else body
    if inputs.body is None:
        raise BadInput(
            "scope 'lora' adapts a network, and these inputs are frozen features: train the backbone "
            "(--train-backbone, or body=a network)"
        )
    return low_rank(inputs.body, 4 if rank is None else rank)


def inner_rate(inputs: Inputs, scope: str, rule: str = "sgd", pull: float = 0.0) -> float:
    """Where none is named. A pull towards the start is as steep as a loss: scaled by it, a step never overshoots."""
    rate = _alone(inputs, scope, rule)
    return rate / (1 + rate * pull)


def _alone(inputs: Inputs, scope: str, rule: str) -> float:
    """Finn et al.: 0.01 for sinusoids, 0.4 for Omniglot. Frozen features, of length 1, have small gradients."""
    if inputs.way is None or rule == "adam":  # whose steps are as long as the rate, whatever the gradient
        return 0.01
    if scope == "lora":  # MiniLM's features are of unit norm, too
        return 3.0
    if inputs.body is None:  # 2 is 3 points above 0.4 on the validation intents of CLINC150; 10 diverges
        return 5.0 if scope == "head" else 2.0
    return 0.4


def _plain_rate(inputs: Inputs) -> float:
    if inputs.way is None:
        return 0.01
    return 5.0 if inputs.body is None else 0.05


def _anew(body: nn.Module) -> nn.Module:
    """A copy of the network with new random parameters; what no layer draws for itself (positions, the projections of
    ``nn.MultiheadAttention``) is drawn from a normal distribution of its own mean and deviation."""
    fresh = copy.deepcopy(body)
    for module in fresh.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    with torch.no_grad():
        for before, after in zip(body.parameters(), fresh.parameters(), strict=True):
            if torch.equal(before, after):
                after.copy_(after.mean() + after.std(correction=0) * torch.randn_like(after))
    return fresh.requires_grad_(True)
