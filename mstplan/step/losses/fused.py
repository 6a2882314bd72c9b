"""What LM heads and losses in one, which make no logits of all tokens, have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import RecipeError
from .base import Loss

if TYPE_CHECKING:
    from ..layers import Writer
    from ..tape import Tensor, Weight


class FusedLoss(Loss):
    is_fused = True
    gradient_is_view = False

    def lay_out(self, w: Writer, hidden: Tensor, head: Weight, labels: tuple[Tensor, ...], defers: bool) -> None:
        if w.model.head_bias:
            raise RecipeError(
                f"the LM head of {w.model.name} has a bias, which the loss {self.name!r} does not count.\nSet loss='chunked' (--loss chunked)."
            )
        w.tape.op("shift labels", [], *labels)
        self.lay_out_fused(w, hidden, head, labels, defers)
        w.hold(hidden)  # a variable of the model's forward

    def lay_out_fused(self, w: Writer, hidden: Tensor, head: Weight, labels: tuple[Tensor, ...], defers: bool) -> None:
        """Write the loss of shifted labels on the tape of `w`."""
        raise NotImplementedError


def flops_of(head: Weight) -> tuple[tuple[int, int], ...]:
    """Of the product with all tokens: (basis "bs", operations)."""
    return ((1, 2 * head.numel),)
