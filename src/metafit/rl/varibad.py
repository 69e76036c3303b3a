"""VariBAD: the agent acts on a belief about the environment, which an autoencoder of its rewards learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafit.rl.actions import Actions
from metafit.rl.in_context import InContextAgent
from metafit.rl.recurrent import GRU
from metafit.task import Task


class VariBADAgent(InContextAgent):
    """A GRU encodes a trial so far as a Gaussian belief about the environment; the policy reads the observation and
    the belief's mean and log-variance (Zintgraf et al., 2020, arXiv:1910.08348).

    The encoder learns from the evidence lower bound alone: a decoder tells every reward of the trial, past and future,
    from what was seen and done and a draw of the belief, which is held near the belief of one step before. The policy's
    gradient does not reach the encoder.

    Args:
        width: of the encoder and the policy.
        latent: dimensions of the belief.
        bounds: moments of the trial at which the bound is taken, drawn anew for each loss.
        belief: weight of the bound; ``divergence``: of its divergence from the belief before.
    """

    def __init__(
        self,
        observations: int,
        actions: Actions,
        width: int = 64,
        latent: int = 5,
        bounds: int = 4,
        belief: float = 1.0,
        divergence: float = 0.1,
        **training: Any,
    ):
        super().__init__(observations, actions, width, **training)
        self.latent, self.bounds, self.belief_weight, self.divergence = latent, bounds, belief, divergence
        self.encoder, self.to_belief = GRU(self.percepts, width), nn.Linear(width, 2 * latent)
        self.policy = nn.Sequential(nn.Linear(observations + 2 * latent, width), nn.Tanh())
        told = 2 * observations + actions.size + latent  # before, after, action, belief
        self.decoder = nn.Sequential(nn.Linear(told, width), nn.ReLU(), nn.Linear(width, 1))

    def begin(self, n: int) -> Tensor:
        return self.to_belief.weight.new_zeros(n, self.width)

    def unroll(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        states = self.encoder.over(x, memory)
        return self._mind(states, x), states[-1] if len(states) else memory

    def remember(self, memory: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        state = self.encoder(x, memory)
        return self._mind(state, x), state

    def loss(self, task: Task) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().loss(task)
        bound = self.bound(task.query.x)
        return loss - self.belief_weight * bound, {**metrics, "evidence": bound.detach()}

    def bound(self, x: Tensor) -> Tensor:
        """The evidence lower bound of a trial's rewards, for each reward, at moments that are drawn.

        Percept t + 1 tells the action taken at percept t, its reward, and what was seen after it.
        """
        o, a = self.observations, self.actions.size
        mean, log_variance = self.to_belief(self.encoder.over(x, self.begin(1)[0])).chunk(2, -1)
        moments = torch.randint(len(x), (self.bounds,))
        spread = (0.5 * log_variance[moments]).exp()
        latent = mean[moments] + spread * torch.randn_like(spread)
        seen = torch.cat([x[:-1, :o], x[1:, :o], x[1:, o : o + a]], -1)
        steps, drawn = len(seen), len(moments)
        told = torch.cat([seen.expand(drawn, steps, -1), latent[:, None].expand(drawn, steps, -1)], -1)
        missed = (self.decoder(told)[..., 0] - x[1:, o + a]).square().mean()
        return -0.5 * missed - self.divergence * self._divergence(mean, log_variance)[moments].mean() / steps

    @staticmethod
    def _divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
        """Of each belief ``(T,)`` from the one before, the first from a standard normal: KL of diagonal Gaussians."""
        before, spread = (torch.cat([torch.zeros_like(part[:1]), part[:-1]]) for part in (mean, log_variance))
        ratio = (log_variance - spread).exp() + (mean - before).square() * (-spread).exp()
        return 0.5 * (ratio - 1 - log_variance + spread).sum(-1)

    def _mind(self, state: Tensor, x: Tensor) -> Tensor:
        belief = self.to_belief(state).detach()
        return self.policy(torch.cat([x[..., : self.observations], belief], -1))
