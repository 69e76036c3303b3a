"""Batch normalisation by the statistics of the batch, whose gradient is cheap to differentiate again.

With x̂ = (x − μ) r, means m(·) over the M entries of a channel, and the symmetric map P(v) = v − m(v) − x̂ m(v x̂), the
derivative of w x̂ + b in a direction (u, s, t) of (x, w, b) is w r P(u) + s x̂ + t, and the gradient of dy · (w x̂ + b) is
w r P(dy), M m(dy x̂), M m(dy). The derivative of r is −r² m(u x̂), that of x̂ is r P(u).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def batch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``(N, C, ...)``, of which each channel is normalised over all else, times weight, plus bias, both ``(C,)``.

    PyTorch 2.13 differentiates the gradient of its own in some sixty passes over the input; these are a dozen.
    """
    output: Tensor = _BatchNorm.apply(input, weight, bias, eps)[0]
    return output


class _BatchNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_batch_norm(input, weight, bias, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, weight, _, ctx.eps = inputs
        _, mean, scale = output
        ctx.mark_non_differentiable(mean, scale)
        ctx.save_for_backward(input, weight, mean, scale)
        ctx.save_for_forward(input, weight, mean, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _Gradient.apply(dy, *ctx.saved_tensors, ctx.eps)
        return *(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False)), None

    @staticmethod
    def jvp(ctx: Any, u: Tensor | None, s: Tensor | None, t: Tensor | None, _: None) -> tuple[Tensor, None, None]:
        x, weight, mean, scale = ctx.saved_tensors
        return _Direction(u, s, t, x, weight, mean, scale, ctx.eps).derivative(), None, None


class _Gradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        dy: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.native_batch_norm_backward(
            dy, input, weight, None, None, mean, scale, True, eps, [True, True, True]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, s: Tensor | None, t: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, x, weight, mean, scale = ctx.saved_tensors
        direction = _Direction(u, s, t, x, weight, mean, scale, ctx.eps)
        in_x, in_w = direction.of_gradient(dy)
        return direction.derivative(), in_x, in_w if ctx.needs_input_grad[2] else None, None, None, None

    @staticmethod
    def jvp(ctx: Any, ddy: Tensor | None, u: Tensor | None, s: Tensor | None, *_: None) -> tuple[Tensor, ...]:
        dy, x, weight, mean, scale = ctx.saved_tensors
        in_x, in_w = _Direction(u, s, None, x, weight, mean, scale, ctx.eps).of_gradient(dy)
        if ddy is None:
            return in_x, in_w, torch.zeros_like(in_w)
        dx, dw, db = _Gradient.apply(ddy, x, weight, mean, scale, ctx.eps)
        return dx + in_x, dw + in_w, db


class _Direction:
    """What is differentiated along (u, s, t), of which ``None`` is zero; ``scale`` is r.

    Where it may itself be differentiated, the statistics are computed anew, as functions of x.
    """

    def __init__(
        self,
        u: Tensor | None,
        s: Tensor | None,
        t: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        eps: float,
    ):
        self.over, self.shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        again = torch.is_grad_enabled()
        self.u, self.centred = u, x - (x.mean(self.over) if again else mean).view(self.shape)
        self.scale = torch.rsqrt(self._mean(self.centred, self.centred) + eps) if again else scale
        self.wr = self.scale if weight is None else weight * self.scale
        nothing = torch.zeros_like(mean)
        self.s, self.t = nothing if s is None else s, nothing if t is None else t
        self.m_u = nothing if u is None else u.mean(self.over)
        self.m_ux = nothing if u is None else self._mean(u, self.centred) * self.scale

    def derivative(self) -> Tensor:
        of_x = (self.s - self.wr * self.m_ux) * self.scale
        return self._sum(self.t - self.wr * self.m_u, (self.centred, of_x), (self.u, self.wr))

    def of_gradient(self, dy: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative, in x and w, of the gradient's product with the direction, the same as that of the gradient
        along it: w r u·P(dy) + s dy·x̂ + t dy·1, with x in x̂ and in r."""
        r, m_dy, m_dyx = self.scale, dy.mean(self.over), self._mean(dy, self.centred) * self.scale
        m_udy = 0.0 if self.u is None else self._mean(self.u, dy)
        along = m_udy - self.m_u * m_dy - self.m_ux * m_dyx  # m(u P(dy))
        of_u, of_dy = -self.wr * m_dyx, self.s - self.wr * self.m_ux  # of the derivative in x̂
        constant = of_u * self.m_u + of_dy * m_dy
        of_x = of_u * self.m_ux + of_dy * m_dyx + self.wr * along
        in_x = self._sum(-r * constant, (dy, r * of_dy), (self.u, r * of_u), (self.centred, -r * r * of_x))
        return in_x, r * along * (dy.numel() // len(r))

    def _mean(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).mean(self.over)

    def _sum(self, constant: Tensor, *terms: tuple[Tensor | None, Tensor]) -> Tensor:
        products = [value * by.view(self.shape) for value, by in terms if value is not None]
        return sum(products[1:], products[0] + constant.view(self.shape))
