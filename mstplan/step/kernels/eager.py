"""transformers' eager attention: the score matrix is written out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..selection import WeightKind
from ..tape import ForGradients
from .base import AttentionCall, Kernel, copied_by_head, for_every_head, mix, repeated, scores_of

if TYPE_CHECKING:
    from ...spec.model import Attention, LayerKind
    from ..layers import Writer
    from ..tape import Tensor


class Eager(Kernel):
    name = "eager"
    label = "eager"
    by_sdpa = False
    makes_causal_mask = True
    gradients_by_head = True
    one_operation = False

    def serves(self, asked: AttentionCall) -> bool:
        return True

    def lay_out(self, w: Writer, q: Tensor, k: Tensor, v: Tensor, kind: LayerKind, masked: bool) -> Tensor:
        """transformers' eager_attention_forward: the score matrix is written out several times."""
        a = w.model.attention
        q, k, v, variables = _factors(w, q, k, v)
        scores = _scores(w, q, k)
        if a.softcap:
            scores = w.pointwise("divide scores", scores, scores_of(w, "scores / cap", q.dtype))
            capped = scores_of(w, "tanh of scores", q.dtype)
            scores = w.pointwise("tanh", scores, capped, capped)
            scores = w.pointwise("multiply scores", scores, scores_of(w, "capped scores", q.dtype))
        unmasked = (scores,) if w.code.scales_in_place or w.code.adds_within else ()  # a variable of its own
        causal = scores_of(w, "masked scores", "float32" if w.code.fp32_scores else q.dtype)
        w.tape.op("mask scores", [scores], causal, grads=((scores, None),))
        if a.sinks:
            return _with_sinks(w, causal, k, v, a)
        # GPT-2's own softmax stays in the scores' dtype; the others run it in fp32, holding the masked scores meanwhile.
        keeps_dtype = w.code.softmax_as_scores and not w.numerics.autocast  # autocast runs any softmax in fp32
        wide = causal.dtype if keeps_dtype else "float32"
        scores = w.cast(causal, wide, "scores, fp32")
        weights = scores_of(w, "softmax of scores", wide)
        w.softmax("softmax", scores, weights)
        w.hold(causal, *unmasked)
        weights = w.cast(weights, v.dtype, "attention matrix")
        if not w.code.fp32_scores:
            w.hold(causal)
        v = for_every_head(w, v) if a.keys == "broadcast" else v
        if w.code.adds_within:
            w.inside = (*unmasked, causal)
            w.hold(*w.inside)
        return _mix(w, w.dropout(weights, a.dropout), v, *variables)


def _factors(w: Writer, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Queries, keys and values as the products take them, and what the code's variables hold of them."""
    if w.model.attention.keys == "broadcast":
        return copied_by_head(w, q), for_every_head(w, k), v, (k, v)
    if w.model.alibi:
        q, k, v = (copied_by_head(w, each) for each in (q, k, v))
        return q, k, v, (q, k, v)
    if w.code.fp32_scores:
        q, k = w.cast(q, "float32", "Q in fp32"), w.cast(k, "float32", "K in fp32")
        return w.autocast(q), w.autocast(k), v, (q, k, v)
    k, v = repeated(w, k), repeated(w, v)
    return q, k, v, (k, v)


def _scores(w: Writer, q: Tensor, k: Tensor) -> Tensor:
    tape, a = w.tape, w.model.attention
    scores = scores_of(w, "scores", q.dtype)
    alibi = w.model.alibi  # torch.baddbmm to it, of which backward scales each gradient
    tape.op(
        "scores",
        [q, k],
        scores,
        for_gradients=ForGradients(((q, k), (k, q))),
        grads=tuple((x, tape.grad(x)) for x in (q, k)),
        back_temps=(tape.new("gradient, not scaled", q.shape, q.dtype),) if alibi else (),
        flops=((4, a.heads * a.head_dim * 2),),
    )
    if alibi:
        return scores
    name = "scaled scores"
    scaled = tape.view(scores, name, scores.shape) if w.code.scales_in_place else scores_of(w, name, q.dtype)
    return w.pointwise("scale scores", scores, scaled)


def _with_sinks(w: Writer, masked: Tensor, k: Tensor, v: Tensor, a: Attention) -> Tensor:
    """gpt-oss: a sink column is joined to the scores, the row maximum is taken off, softmax runs in bf16; values are mixed by a view
    without the column. Of all tensors with that column, (b, H, s) numbers more, it is counted where it is kept."""
    sink = w.weight("sinks", a.heads, kinds=(WeightKind.ATTENTION,), name="")
    joined = scores_of(w, "scores and sinks", masked.dtype)
    w.tape.op("join sinks", [masked], joined, grads=((masked, None),), weights=(sink,))
    shifted = scores_of(w, "shifted scores", masked.dtype)
    beside = w.tape.new("places of row maxima", "b H s", "int64"), w.tape.new("softmax of sinks", "b H s", masked.dtype)
    w.tape.op(
        "shift scores",
        [joined],
        shifted,
        *beside,
        keeps=beside,
        grads=((joined, None),),
        back_temps=(scores_of(w, "negated", masked.dtype),),
    )
    weights = scores_of(w, "softmax of scores", masked.dtype)
    w.softmax("softmax", shifted, weights)
    w.hold(masked)
    mixed = _mix(w, w.slice(weights, "attention matrix", "b H s s"), v, k, v, shifted, weights)
    w.hold(shifted)
    return mixed


def _mix(w: Writer, weights: Tensor, v: Tensor, *variables: Tensor) -> Tensor:
    mixed = mix(w, weights, v, holds=variables)
    w.hold(*variables)
    w.beside = (weights,)
    return mixed
