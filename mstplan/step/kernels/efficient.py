"""The memory-efficient kernel, with an explicit mask or without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cuda import efficient_accumulates, efficient_workspace
from ..tape import ITEMSIZE, ForGradients
from .base import AttentionCall, Kernel, mask_as_bias, repeated

if TYPE_CHECKING:
    from ...spec.model import LayerKind
    from ..layers import Writer
    from ..tape import Tensor


class Efficient(Kernel):
    name = "efficient"
    label = "the memory-efficient kernel"
    within_sdpa = True
    pads_masks = True

    def serves(self, asked: AttentionCall) -> bool:
        return not asked.grouped

    def lay_out(self, w: Writer, q: Tensor, k: Tensor, v: Tensor, kind: LayerKind, masked: bool) -> Tensor:
        k, v = repeated(w, k), repeated(w, v)
        return _efficient(w, q, k, v, *([_bias(w, q.dtype)] if masked else []))


def _bias(w: Writer, dtype: str) -> Tensor:
    """An explicit sliding-window mask as a bias, its rows padded (aten transformers/attention.cpp, preprocess_mask)."""
    bias = mask_as_bias(w, dtype)
    if not w.numerics.padded:
        return bias
    padded = w.tape.new("attention bias, rows padded", "b s s", dtype)  # by 7 columns at most, not counted
    return w.tape.op("pad the bias", [bias], padded)


def _efficient(w: Writer, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
    """The memory-efficient kernel (aten transformers/cuda/attention.cu, attention_backward.cu).

    Keeps q, k, v, the output, one fp32 log-sum-exp a row, and a bias. Forward sums the output of large heads in fp32;
    backward makes dq, dk, dv, an fp32 row sum, and a workspace of sums of dq, for large heads of some dk and dv as well.
    """
    tape, a = w.tape, w.model.attention
    sizes = (a.head_dim, a.v_head_dim, ITEMSIZE[q.dtype])
    out = tape.new("attention mixed", f"{w.t} H {'e' if a.v_head_dim == a.head_dim else 'ev'}", q.dtype)
    rows = tape.new("log-sum-exp", f"{w.t} H", "float32")
    space, heads = efficient_workspace(*sizes), w.heads_here
    back = (
        tape.new("row sums of dO * O", f"{w.t} H", "float32"),
        tape.new("dQ accumulator in tiles", f"{w.rounded_rows} {heads * space.of_row}", "uint8"),
        tape.new("dK and dV of the blocks at work", str(heads * space.blocks_at_work(heads) * space.of_keys), "uint8"),
    )
    return tape.op(
        "masked attention" if bias else "memory-efficient attention",
        [q, k, v, *bias],
        out,
        rows,
        keeps=(q, k, v, out, rows, *bias),
        temps=(tape.new("output accumulator", out.shape, "float32"),) if efficient_accumulates(*sizes) else (),
        grads=tuple((x, tape.grad(x)) for x in (q, k, v)),
        for_gradients=ForGradients(all=True),
        back_temps=tuple(t for t in back if t.bytes),
        flops=w.attention_flops(is_masked=bool(bias)),
    )
