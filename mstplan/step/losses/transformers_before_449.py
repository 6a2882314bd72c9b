"""The loss of transformers 4.46 to 4.48, which shifts the logits: one more fp32 copy of them in the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Loss, cross_entropy, logits_of

if TYPE_CHECKING:
    from ..layers import Writer
    from ..tape import Tensor, Weight


class TransformersBefore449(Loss):
    """from source: transformers 4.48.3, loss/loss_utils.py, ForCausalLMLoss; 4.49 shifts the labels."""

    name = "transformers<4.49"
    not_run = "the step that is run has the loss of the transformers at hand, not that of releases before 4.49"

    def lay_out(self, w: Writer, hidden: Tensor, head: Weight, labels: tuple[Tensor, ...], defers: bool) -> None:
        logits = logits_of(w, hidden, head, defers)
        wide = w.cast(logits, "float32", "logits, fp32")
        w.hold(hidden)
        if labels:
            w.tape.op("shift labels", [], *labels)
        shifted = w.new("shifted logits, fp32", "V", "float32")
        w.tape.op("shift logits", [wide], shifted, grads=((wide, w.tape.grad(wide)),))
        cross_entropy(w, shifted, labels, variables=(logits, wide, hidden))
