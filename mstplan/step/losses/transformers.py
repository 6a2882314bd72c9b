"""The loss of current transformers: ForCausalLMLoss (transformers loss/loss_utils.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Loss, cross_entropy, logits_of

if TYPE_CHECKING:
    from ..layers import Writer
    from ..tape import Tensor, Weight


class Transformers(Loss):
    name = "transformers"

    def lay_out(self, w: Writer, hidden: Tensor, head: Weight, labels: tuple[Tensor, ...], defers: bool) -> None:
        logits = logits_of(w, hidden, head, defers)
        wide = w.cast(logits, "float32", "logits, fp32")
        w.hold(hidden)
        if labels:
            w.tape.op("shift labels", [], *labels)
        variables = (logits, hidden) if labels else (hidden,)  # of the model's forward; a piece's logits have none
        cross_entropy(w, wide, labels, variables)
