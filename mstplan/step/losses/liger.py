"""Liger's fused LM head and loss, LigerFusedLinearCrossEntropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import RecipeError
from ...units import LONGEST
from ..liger import check_loss
from ..tape import ITEMSIZE, Buffer, ForGradients
from ..workspaces import Size, Span, Workspace
from .fused import FusedLoss, flops_of

if TYPE_CHECKING:
    from ..layers import Writer
    from ..recipe import Recipe
    from ..tape import Tensor, Weight


class Liger(FusedLoss):
    """Logits of one chunk of tokens at a time, with the gradients of hidden states and head made in the forward pass, and added up in the
    weights' dtype.

    from source: liger_kernel 0.8.5, ops/fused_linear_cross_entropy.py, fused_linear_cross_entropy_forward. measured.
    """

    name = "liger"

    def check(self, recipe: Recipe, model_type: str, head_alone: bool = False) -> None:
        check_loss(model_type)
        if head_alone:
            raise RecipeError(
                "Liger's loss gives the head no gradient where nothing below it is trained.\nUse another --loss: trl, cce, chunked."
            )

    def lay_out_fused(self, w: Writer, hidden: Tensor, head: Weight, labels: tuple[Tensor, ...], defers: bool) -> None:
        tape, autocast = w.tape, w.numerics.autocast
        d_hidden = w.new("gradient of hidden states", "d", hidden.dtype)
        made: dict[Tensor | Weight, Tensor] = {hidden: d_hidden}
        if head.trained:
            made[head] = tape.new("gradient of the head", "V d", w.numerics.weights)
        temps = [w.new("losses of tokens", "", "float32"), w.new("mask of labels", "", "bool")]
        if autocast:  # of each chunk's product
            temps.append(tape.new("lm_head.weight, bf16 copy", "V d", "bfloat16"))
        elif w.numerics.weights == "float32" and head.trained:  # no product adds fp32 to it
            temps.append(tape.new("a chunk's gradient of the head", "V d", "float32"))
        chunk = LigerChunk(w.model.vocab, w.model.hidden, w.numerics.compute)
        tape.op(
            "Liger's loss",
            [hidden, *labels],
            tape.new("loss", "", "float32"),
            *made.values(),
            temps=tuple(temps),
            buffers=(Buffer(chunk, "bs"),),
            for_gradients=ForGradients(tuple((gradient, receiver) for receiver, gradient in made.items())),
            grads=((hidden, tape.grad(hidden)),),
            reuses=tuple(made.items()),
            weights=(head,),
            flops=flops_of(head),
            defers=defers,
        )


@dataclass(frozen=True)
class LigerChunk(Workspace):
    """Logits of a chunk: of a power of two of tokens, so that they take one to two times what the hidden states take."""

    vocab: int
    width: int
    dtype: str

    @property
    def _chunks(self) -> int:
        """The most chunks that there are."""
        return -(-self.vocab // self.width)

    def tokens(self, tokens: int) -> int:
        """Tokens of a chunk, of so many in all."""
        return min(tokens, 1 << (-(-tokens // self._chunks) - 1).bit_length())

    def starts(self) -> tuple[int, ...]:
        if self._chunks == 1:
            return ()
        return tuple(self._chunks * (1 << n) + 1 for n in range(LONGEST.bit_length()))

    def sizes(self, span: Span) -> tuple[Size, ...]:
        each = self.vocab * ITEMSIZE[self.dtype]
        if self._chunks == 1:
            return (Size("logits", f"t {self.vocab}", self.dtype, each, "t"),)
        tokens = self.tokens(max(1, span.first))
        return (Size("logits of a chunk", f"{tokens} {self.vocab}", self.dtype, tokens * each),)
