"""The interface of losses."""

from __future__ import annotations

from torch import Tensor, nn

from metafit.context import Context

Params = dict[str, Tensor]


class Loss(nn.Module):
    """A loss over one set of examples; a dynamic loss has parameters of its own and looks at the context.

    Attributes:
        transductive: whether it looks at the outputs on unlabelled query inputs.
        reads_means: whether it looks at the means of the adapting parameters.
        moves_features: whether it has a term over the features alone, which only a body that adapts can follow.
    """

    transductive = False
    reads_means = False
    moves_features = False

    def advance(self, done: float) -> None:
        """Told by training which share of the outer steps is behind it, 0 to 1, for what changes on the way."""

    def parameters_at(self, step: int) -> Params:
        """Its parameters that an inner step depends on, by name: all of them, but where steps have their own."""
        return dict(self.named_parameters())

    def forward(self, outputs: Tensor, y: Tensor, weight: Tensor, context: Context) -> Tensor:
        """The scalar loss.

        Args:
            outputs: logits ``(N, way)`` (minus infinity for absent classes) or values ``(N, D)``.
            y: class indices ``(N,)`` or targets ``(N, D)``.
            weight: ``(N,)``, 0 for padding.
            context: what else a dynamic loss may look at.
        """
        raise NotImplementedError
