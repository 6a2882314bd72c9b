"""Apple's cut cross-entropy: no logits at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import RecipeError
from ..tape import ForGradients
from .fused import FusedLoss, flops_of

if TYPE_CHECKING:
    from ..layers import Writer
    from ..recipe import Recipe
    from ..tape import Tensor, Weight

BLOCK_TOKENS, BLOCK_WIDTH = 128, 64
"""Tokens, or entries of the vocabulary, and columns that share a lock (cce_backward_kernel)."""


class Cce(FusedLoss):
    """A kernel keeps one log-sum-exp a token, and another makes the gradients of it, block by block.

    from source: apple/ml-cross-entropy d42911f, cut_cross_entropy/cce.py, cce_lse_forward.py, cce_backward.py. measured.
    """

    name = "cce"

    def check(self, recipe: Recipe, model_type: str, head_alone: bool = False) -> None:
        if recipe.precision == "fp32" and not recipe.runs_autocast:
            raise RecipeError(
                "cut cross-entropy skips what 16 bits would round away, so it computes in bf16.\nUse precision bf16 or mixed, or another --loss."
            )

    def lay_out_fused(self, w: Writer, hidden: Tensor, head: Weight, labels: tuple[Tensor, ...], defers: bool) -> None:
        tape, model = w.tape, w.model
        x, weight = self._cast(w, hidden) if w.numerics.autocast else (hidden, ())
        valid, lse = w.new("numbers of valid tokens", "", "int64"), w.new("log-sum-exp of logits", "", "float32")
        means = tape.new("mean logits", "V", "float32")
        columns = -(-model.hidden // BLOCK_WIDTH)
        rows = -(-model.vocab // BLOCK_TOKENS)
        order = tape.new("order of the vocabulary", "V", "int32")
        token_locks = w.new("locks of tokens", str(-(-4 * columns // BLOCK_TOKENS)), "uint8")
        head_locks = tape.new("locks of the head", f"{rows} {columns}", "int32")
        cast: list[tuple[Tensor, Tensor | Weight]] = []
        if w.numerics.autocast:  # gradients in bf16 before they are cast
            cast = [(tape.new("gradient of the head in bf16", "V d", "bfloat16"), head)]
        tape.op(
            "cut cross-entropy",
            [x, *weight, *labels],
            tape.new("loss", "", "float32"),
            valid,
            lse,
            means,
            keeps=(x, valid, lse, means, *weight, *labels),
            temps=(w.new("negative logits of labels", "", "float32"),),
            for_gradients=ForGradients(back_temps=((token_locks, x), (head_locks, head), *cast)),
            back_temps=(order,),
            grads=((x, tape.grad(x)),),
            weights=(head,),
            flops=flops_of(head),
            defers=defers,
        )

    @staticmethod
    def _cast(w: Writer, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states and head in bf16, which are there until the gradient of hidden states is cast back."""
        copies = (
            w.new("hidden states in bf16", "d", "bfloat16"),
            w.tape.new("lm_head.weight, bf16 copy", "V d", "bfloat16"),
        )
        w.tape.op("cast for cut cross-entropy", [hidden], *copies, keeps=copies, grads=((hidden, w.tape.grad(hidden)),))
        return copies[0], copies[1:]
