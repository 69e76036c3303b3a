"""Update rules: each is differentiable and batched, starts as gradient descent, and is what its paper says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from metafit.context import Context
from metafit.errors import BadInput
from metafit.learners.choices import RULES
from metafit.optim import ALFA, SGD, Adam, LSTMOptimizer, MetaCurvature, MetaOptimizer, MLPOptimizer, PerStepSGD, TNet
from metafit.optim.base import of
from metafit.optim.lstm import logarithmic

RATE, STEPS = 0.3, 3
SHAPES = {"conv.weight": (3, 2, 2, 2), "conv.bias": (3,), "head.weight": (2, 3), "scale": ()}
START_AS_SGD = sorted(set(RULES) - {"momentum", "adam"})
THROUGH_STATE: dict[str, Callable[[Any], MetaOptimizer]] = {
    "alfa": lambda params: ALFA(params, STEPS, RATE, through_state=True),
    "lstm": lambda params: LSTMOptimizer(4, RATE, through_state=True),
    "mlp": lambda params: MLPOptimizer(4, RATE, through_state=True),
}


def draw(seed: int, *batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn((*batch, *s), generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}


def rule_of(name: str, learned: bool = True, **kinds: Any) -> MetaOptimizer:
    torch.manual_seed(0)
    rule = {**{n: lambda p, r=r: r(p, RATE, STEPS) for n, r in RULES.items()}, **kinds}[name](draw(0)).double()
    if learned:
        for parameter in rule.parameters():  # as after some training: nothing is at its neutral start
            parameter.data += 0.1 * torch.randn_like(parameter)
    return rule


def run(rule: MetaOptimizer, params: dict[str, Tensor], grads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    state = rule.init(params)
    for step, given in enumerate(grads):
        params, state = rule.update(params, given, state, Context(step, len(grads)))
    return params


@pytest.mark.parametrize("name", RULES)
def test_a_batch_of_tasks_is_one_task_after_another(name: str) -> None:
    rule = rule_of(name)
    params, grads = draw(1, 4), [draw(seed, 4) for seed in (2, 3, 4, 5)]  # one step more than it has rates for
    before = {n: value.clone() for n, value in params.items()}
    together = vmap(lambda p, *g: run(rule, p, list(g)))(params, *grads)
    for t in range(4):
        alone = run(rule, {n: v[t] for n, v in params.items()}, [{n: v[t] for n, v in g.items()} for g in grads])
        torch.testing.assert_close({n: v[t] for n, v in together.items()}, alone, rtol=1e-11, atol=1e-12)
    assert all(torch.equal(params[n], before[n]) for n in params), "changed in place"
    assert {n: tuple(v.shape[1:]) for n, v in together.items()} == SHAPES


@pytest.mark.parametrize("name", RULES)
def test_the_update_is_differentiable_in_all_that_it_is_given(name: str) -> None:
    """Twice as well: against finite differences."""
    rule = rule_of(name, **THROUGH_STATE)
    for parameter in rule.parameters():
        parameter.requires_grad_()
    own = dict(rule.named_parameters())
    leaves = [v.requires_grad_() for part in (draw(1), draw(2), draw(3)) for v in part.values()]

    def moved(*values: Tensor) -> tuple[Tensor, ...]:
        parts = [dict(zip(SHAPES, values[i * len(SHAPES) :], strict=False)) for i in range(3)]
        learned = dict(zip(own, values[3 * len(SHAPES) :], strict=True))
        holder = _Holder(rule)
        named = {f"rule.{n}": v for n, v in learned.items()}
        return tuple(functional_call(holder, named, (parts[0], parts[1:])).values())

    assert torch.autograd.gradcheck(moved, (*leaves, *own.values()), eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)
    assert torch.autograd.gradgradcheck(moved, (*leaves, *own.values()), atol=1e-5, rtol=1e-4, fast_mode=True)


class _Holder(nn.Module):
    def __init__(self, rule: MetaOptimizer):
        super().__init__()
        self.rule = rule

    def forward(self, params: dict[str, Tensor], grads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return run(self.rule, params, grads)


@pytest.mark.parametrize("name", START_AS_SGD)
def test_it_starts_as_gradient_descent(name: str) -> None:
    rule, params, grads = rule_of(name, learned=False), draw(1), [draw(2), draw(3)]
    expected = {n: params[n] - RATE * (grads[0][n] + grads[1][n]) for n in params}
    torch.testing.assert_close(run(rule, params, grads), expected, rtol=1e-6, atol=1e-7)  # the rate is a float32's


@pytest.mark.parametrize(
    ("rule", "peer"),
    [
        (SGD(RATE, momentum=0.9), lambda p: torch.optim.SGD(p, RATE, momentum=0.9)),
        (Adam(RATE, inside=0.0), lambda p: torch.optim.Adam(p, RATE)),
    ],
)
def test_the_known_rules_are_those_of_torch(rule: MetaOptimizer, peer: Any) -> None:
    rule, params, grads = rule.double(), draw(1), [draw(seed) for seed in range(2, 7)]
    rule.rate.data.fill_(RATE)
    leaves = {n: v.clone().requires_grad_() for n, v in params.items()}
    optimizer = peer(list(leaves.values()))
    for given in grads:
        for n, leaf in leaves.items():
            leaf.grad = given[n]
        optimizer.step()
    torch.testing.assert_close(run(rule, params, grads), {n: v.detach() for n, v in leaves.items()}, rtol=1e-9, atol=0)


def test_adam_is_differentiable_where_a_gradient_is_zero() -> None:
    rule, zero = Adam(RATE).double(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    params, _ = rule.update({"x": zero}, {"x": 2 * zero}, rule.init({"x": zero}), Context())
    (derivative,) = torch.autograd.grad(params["x"], zero)
    assert torch.isfinite(derivative)


def test_rates_are_per_layer_and_step_and_the_last_step_s_go_on() -> None:
    rule, params, ones = rule_of("per-step"), draw(1), {n: torch.ones_like(v) for n, v in draw(1).items()}
    assert isinstance(rule, PerStepSGD)
    after = run(rule, params, [ones] * 5)
    total = rule.rates.sum(0) + 2 * rule.rates[-1]
    for i, n in enumerate(SHAPES):
        torch.testing.assert_close(params[n] - after[n], total[i].expand(SHAPES[n]).detach() * ones[n])


def test_alfa_generates_rates_and_decay_from_the_means() -> None:
    """Eq. 4 to 6 written out; and no derivative goes through the gradients in its state."""
    rule, params, grads = rule_of("alfa"), draw(1), draw(2)
    assert isinstance(rule, ALFA)
    state = torch.stack([v.mean() for v in params.values()] + [v.mean() for v in grads.values()])
    w1, b1, w2, b2 = (p.detach() for p in rule.generator.parameters())
    a, b = (F.relu(state @ w1.T + b1) @ w2.T + b2).split(len(SHAPES))
    leaves = {n: g.clone().requires_grad_() for n, g in grads.items()}
    after, _ = rule.update(params, leaves, (), Context(1, STEPS))
    for i, n in enumerate(SHAPES):
        rate = rule.rates[1, i].detach() * (1 + a[i])
        torch.testing.assert_close(after[n], (1 - b[i]) * params[n] - rate * grads[n])
        (through,) = torch.autograd.grad(after[n].sum(), leaves[n], retain_graph=True)
        torch.testing.assert_close(through, -rate * torch.ones_like(through))


def test_meta_curvature_is_a_product_along_each_mode() -> None:
    """Eq. 8 by explicit sums over the modes of the tensor."""
    rule, g = rule_of("meta-curvature"), draw(2)["conv.weight"]
    assert isinstance(rule, MetaCurvature)
    m_o, m_i, m_f = (of(part, "conv.weight").detach() for part in (rule.outputs, rule.inputs, rule.places))
    expected = torch.einsum("ao,bi,cf,oif->abc", m_o, m_i, m_f, g.flatten(2)).view_as(g)
    torch.testing.assert_close(rule.transformed("conv.weight", g), expected)


def test_t_net_is_the_step_of_a_network_with_layers_that_do_not_adapt() -> None:
    """Lee and Choi's network, T after W: a step on W alone moves T·W as the rule moves one layer."""
    torch.manual_seed(0)
    w, b, t = (torch.randn(*s, dtype=torch.float64) for s in ((3, 4), (3,), (3, 3)))
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)

    def loss(w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return (torch.tanh((x @ w.T + b) @ t.T) - y).square().mean()

    gw, gb = grad(loss, argnums=(0, 1))(w, b, t)
    expected = {"l.weight": t @ (w - RATE * gw), "l.bias": t @ (b - RATE * gb)}
    params = {"l.weight": t @ w, "l.bias": t @ b}
    rule = TNet(params, RATE).double()
    rule.rate.data.fill_(RATE)
    of(rule.warps, "l.3").data.copy_(t)
    identity = torch.eye(3, dtype=torch.float64)
    grads = dict(zip(params, grad(loss, argnums=(0, 1))(*params.values(), identity), strict=True))
    torch.testing.assert_close(rule.update(params, grads, (), Context())[0], expected)


def test_the_lstm_is_that_of_torch_with_gates_that_remember() -> None:
    rule = rule_of("lstm")
    assert isinstance(rule, LSTMOptimizer)
    grads, params = [draw(2), draw(3)], draw(1)
    peers = []
    for cell in rule.cells:
        weight, bias = cell.gates.weight.detach(), cell.gates.bias.detach()
        hidden = rule.hidden
        inputs = weight.shape[1] - hidden
        i, f, o, g = range(4)  # torch's order is i, f, g, o
        order = torch.cat([torch.arange(hidden) + k * hidden for k in (i, f, g, o)])
        peer = nn.LSTMCell(inputs, hidden).double()
        peer.weight_ih.data.copy_(weight[order, :inputs])
        peer.weight_hh.data.copy_(weight[order, inputs:])
        peer.bias_ih.data.copy_((bias + F.one_hot(torch.tensor(1), 4).repeat_interleave(hidden))[order])
        peer.bias_hh.data.zero_()
        peers.append(peer)
    value, states = params["head.weight"].flatten(), [None, None]
    for given in grads:
        z = logarithmic(given["head.weight"].flatten())
        for k, peer in enumerate(peers):
            states[k] = peer(z, states[k])
            z = states[k][0]
        value = value - rule.rate * given["head.weight"].flatten() + rule.scale * rule.out(z)[:, 0]
    torch.testing.assert_close(run(rule, params, grads)["head.weight"].flatten(), value)


def test_t_net_warps_the_outputs_of_a_layer_and_no_single_number() -> None:
    """A cosine head has a matrix of weights and a scale."""
    params = {"head.weight": torch.randn(3, 4), "head.scale": torch.tensor(10.0)}
    rule = TNet(params, RATE)
    assert {name: tuple(warp.shape) for name, warp in rule.warps.items()} == {"head/3": (3, 3)}
    grads = {name: torch.ones_like(value) for name, value in params.items()}
    assert float(rule.update(params, grads, (), Context())[0]["head.scale"]) == pytest.approx(10 - RATE)


def test_the_features_of_a_single_number_are_normalised_each_for_itself() -> None:
    """A scalar is a tensor of one element: what it says does not depend on how it is shaped."""
    rule = rule_of("mlp")
    grads = [torch.tensor(g, dtype=torch.float64) for g in (3.0, -0.002, 0.5)]
    one = run(rule, {"s": torch.tensor(2.0).double()}, [{"s": g} for g in grads])["s"]
    row = run(rule, {"s": torch.tensor([2.0]).double()}, [{"s": g[None]} for g in grads])["s"]
    torch.testing.assert_close(one, row[0])


@pytest.mark.parametrize("name", ["lstm", "mlp"])
def test_a_learned_rule_serves_other_networks_and_longer_horizons(name: str) -> None:
    rule = rule_of(name)
    other = {"a": torch.randn(7, 5, dtype=torch.float64), "b": torch.randn(2, 2, 3, 3, dtype=torch.float64)}
    after = run(rule, other, [{n: torch.randn_like(v) for n, v in other.items()} for _ in range(50)])
    assert all(v.shape == other[n].shape and v.isfinite().all() for n, v in after.items())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: SGD(momentum=1.0), "momentum 1.0: needs 0 or more, and less than 1"),
        (lambda: Adam(betas=(0.9, 1.0)), r"betas \(0.9, 1.0\): each needs"),
        (lambda: LSTMOptimizer(hidden=0), "hidden 0: needs at least 1"),
        (lambda: MLPOptimizer(hidden=0), "hidden 0: needs at least 1"),
    ],
)
def test_settings_out_of_range(bad: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        bad()
