"""transformers' eager attention, and sdpa's math kernel: the score matrix is written out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..selection import WeightKind
from ..tape import ForGradients
from .base import AttentionCall, Kernel, repeated

if TYPE_CHECKING:
    from ...spec.model import Attention, LayerKind
    from ..layers import Writer
    from ..tape import Tensor


class Eager(Kernel):
    name = "eager"
    makes_causal_mask = True

    def serves(self, asked: AttentionCall) -> bool:
        return True

    def lay_out(self, w: Writer, q: Tensor, k: Tensor, v: Tensor, kind: LayerKind, masked: bool) -> Tensor:
        """transformers' eager_attention_forward: the score matrix is written out several times."""
        tape, a = w.tape, w.model.attention
        k, v = repeated(w, k), repeated(w, v)
        scores = _scores(w, "scores", q.dtype)
        tape.op(
            "scores",
            [q, k],
            scores,
            for_gradients=ForGradients(((q, k), (k, q))),
            grads=tuple((x, tape.grad(x)) for x in (q, k)),
            flops=((4, a.heads * a.head_dim * 2),),
        )
        scores = w.pointwise("scale scores", scores, _scores(w, "scaled scores", q.dtype))
        if a.softcap:
            scores = w.pointwise("divide scores", scores, _scores(w, "scores / cap", q.dtype))
            capped = _scores(w, "tanh of scores", q.dtype)
            scores = w.pointwise("tanh", scores, capped, capped)
            scores = w.pointwise("multiply scores", scores, _scores(w, "capped scores", q.dtype))
        causal = _scores(w, "masked scores", q.dtype)
        tape.op("mask scores", [scores], causal, grads=((scores, None),))
        if a.sinks:
            return _with_sinks(w, causal, k, v, a)
        # GPT-2's own softmax stays in the scores' dtype; the others run it in fp32, holding the masked scores meanwhile.
        keeps_dtype = w.code.softmax_as_scores and not w.numerics.autocast  # autocast runs any softmax in fp32
        wide = causal.dtype if keeps_dtype else "float32"
        scores = w.cast(causal, wide, "scores, fp32")
        weights = _scores(w, "softmax of scores", wide)
        w.pointwise("softmax", scores, weights, weights)
        w.hold(causal)
        weights = w.cast(weights, q.dtype, "attention matrix")
        w.hold(causal)
        return _mix(w, w.dropout(weights, a.dropout), k, v, a)


def _with_sinks(w: Writer, masked: Tensor, k: Tensor, v: Tensor, a: Attention) -> Tensor:
    """gpt-oss: a sink column is joined to the scores, the row maximum is taken off, softmax runs in bf16; values are mixed by a view
    without the column. Of all tensors with that column, (b, H, s) numbers more, it is counted where it is kept."""
    sink = w.weight("sinks", a.heads, kinds=(WeightKind.ATTENTION,), name="")
    joined = _scores(w, "scores and sinks", masked.dtype)
    w.tape.op("join sinks", [masked], joined, grads=((masked, None),), weights=(sink,))
    shifted = _scores(w, "shifted scores", masked.dtype)
    beside = w.tape.new("places of row maxima", "b H s", "int64"), w.tape.new("softmax of sinks", "b H s", masked.dtype)
    w.tape.op(
        "shift scores",
        [joined],
        shifted,
        *beside,
        keeps=beside,
        grads=((joined, None),),
        back_temps=(_scores(w, "negated", masked.dtype),),
    )
    weights = _scores(w, "softmax of scores", masked.dtype)
    w.pointwise("softmax", shifted, weights, weights)
    w.hold(masked)
    mixed = _mix(w, w.slice(weights, "attention matrix", "b H s s"), k, v, a)
    w.hold(shifted)
    return mixed


def _scores(w: Writer, name: str, dtype: str) -> Tensor:
    return w.tape.new(name, "b H s s", dtype)


def _mix(w: Writer, weights: Tensor, k: Tensor, v: Tensor, a: Attention) -> Tensor:
    e = "e" if a.v_head_dim == a.head_dim else "ev"
    mixed = w.tape.new("attention mixed, by head", f"{w.t} H {e}", v.dtype)
    w.tape.op(
        "mix values",
        [weights, v],
        mixed,
        for_gradients=ForGradients(((weights, v), (v, weights))),
        grads=((weights, w.tape.grad(weights)), (v, w.tape.grad(v))),
        flops=((4, a.heads * a.v_head_dim * 2),),
    )
    out = w.tape.new("attention mixed", mixed.shape, v.dtype)
    joined = w.tape.op("join heads", [mixed], out, grads=((mixed, None),))
    w.hold(k, v)
    return joined
