"""TRL's fused LM head and loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..tape import ITEMSIZE, Buffer, ForGradients
from ..workspaces import Size, Span, Workspace
from .fused import FusedLoss, flops_of

if TYPE_CHECKING:
    from ..layers import Writer
    from ..tape import Tensor, Weight

TILE_TOKENS, TILE_ENTRIES = 4096, 32768
"""Of the tile of logits that is worked on (trl/kernels/chunked_logprob.py, trl/trainer/utils.py)."""


class Trl(FusedLoss):
    """Logits in tiles, made again in backward, where the gradients of hidden states and head are added up in fp32.

    from source: trl 1.16.0, trl/trainer/utils.py, add_fused_lm_head; trl/kernels/chunked_logprob.py, ChunkedLogProbFunction; with the
    outputs that SFTTrainer asks for. The same since trl 1.15. measured.
    """

    name = "trl"

    def lay_out_fused(self, w: Writer, hidden: Tensor, head: Weight, labels: tuple[Tensor, ...], defers: bool) -> None:
        tape, wide = w.tape, hidden.dtype
        mask, target = w.new("mask of labels", "", "bool"), w.new("labels of valid tokens", "", "int64")
        picked = w.new("hidden states of valid tokens", "d", wide)
        sliced, numbers = (
            w.new("gradient of all tokens but the last", "d", wide),
            w.new("numbers of tokens", "8", "int64"),
        )
        tape.op(
            "pick valid tokens",
            [hidden, *labels],
            picked,
            mask,
            target,
            keeps=(mask,),
            temps=(w.new("places of valid tokens", "2", "int64"),),
            grads=((hidden, tape.grad(hidden)),),
            back_temps=(sliced, numbers),
        )
        self._lay_out_loss(w, picked, target, mask, head, defers)

    def _lay_out_loss(
        self, w: Writer, picked: Tensor, target: Tensor, mask: Tensor, head: Weight, defers: bool
    ) -> None:
        tape, weights, compute = w.tape, w.numerics.weights, w.numerics.compute
        log_z, entropy = (w.new(name, "", "float32") for name in ("log-sum-exp of logits", "entropy"))
        back_temps: list[tuple[Tensor, Tensor | Weight]] = []
        if picked.dtype != "float32":
            back_temps.append((w.new("gradient of hidden states in fp32", "d", "float32"), picked))
        if weights != "float32":
            back_temps.append((tape.new("gradient of the head in fp32", "V d", "float32"), head))
        casts = (Buffer(TrlCasts(w.model.vocab, w.model.hidden), "bs", backward=True),) if w.numerics.autocast else ()
        tape.op(
            "TRL's loss",
            [picked, target, mask],
            tape.new("loss", "", "float32"),
            log_z,
            entropy,
            keeps=(picked, target, log_z, entropy),
            temps=(w.new("sums over the vocabulary", "7", "float32"),),
            buffers=(Buffer(TrlTile(compute), "bs", backward=True), *casts),
            for_gradients=ForGradients(back_temps=tuple(back_temps)),
            grads=((picked, tape.grad(picked)),),
            weights=(head,),
            flops=flops_of(head),
            defers=defers,
        )


@dataclass(frozen=True)
class TrlTile(Workspace):
    """The tile of logits."""

    dtype: str

    def starts(self) -> tuple[int, ...]:
        return (TILE_TOKENS,)

    def sizes(self, span: Span) -> tuple[Size, ...]:
        each = TILE_ENTRIES * ITEMSIZE[self.dtype]
        if span.first < TILE_TOKENS:
            return (Size("tile of logits", f"t {TILE_ENTRIES}", self.dtype, each, "t"),)
        return (Size("tile of logits", f"{TILE_TOKENS} {TILE_ENTRIES}", self.dtype, TILE_TOKENS * each),)


@dataclass(frozen=True)
class TrlCasts(Workspace):
    """The copies in bf16 of hidden states and head that autocast's products would make: those of a tile."""

    vocab: int
    width: int

    def starts(self) -> tuple[int, ...]:
        return (TILE_TOKENS,)

    def sizes(self, span: Span) -> tuple[Size, ...]:
        entries, row = min(self.vocab, TILE_ENTRIES), 2 * self.width
        head = Size("a tile's part of the head, bf16 copy", f"{entries} {self.width}", "bfloat16", entries * row)
        name = "a tile's hidden states, bf16 copy"
        if span.first < TILE_TOKENS:
            return head, Size(name, f"t {self.width}", "bfloat16", row, "t")
        return head, Size(name, f"{TILE_TOKENS} {self.width}", "bfloat16", TILE_TOKENS * row)
