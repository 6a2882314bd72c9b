"""The loss of transformers before 4.45, which shifts the logits: one more fp32 copy of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Loss, cross_entropy, logits_of

if TYPE_CHECKING:
    from ..layers import Writer
    from ..tape import Tensor, Weight


class TransformersBefore445(Loss):
    name = "transformers<4.45"
    not_run = "the step that is run has the loss of the transformers at hand, not that of releases before 4.45"

    def lay_out(self, w: Writer, hidden: Tensor, head: Weight, labels: tuple[Tensor, ...], defers: bool) -> None:
        wide = w.cast(logits_of(w, hidden, head, defers), "float32", "logits, fp32")
        w.hold(hidden)
        if labels:
            w.tape.op("shift labels", [], *labels)
        shifted = w.new("shifted logits, fp32", "V", "float32")
        w.tape.op("shift logits", [wide], shifted, keeps=(wide,), grads=((wide, w.tape.grad(wide)),))
        cross_entropy(w, shifted, labels, variables=(wide, hidden))
