"""sdpa's math kernel: the score matrix is written out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..tape import ForGradients
from .base import AttentionCall, Kernel, copied_by_head, for_every_head, mask_as_bias, mix, repeated, scores_of

if TYPE_CHECKING:
    from ...spec.model import LayerKind
    from ..layers import Writer
    from ..tape import Tensor


class Math(Kernel):
    name = "math"
    label = "the math kernel"
    by_name = False
    gradients_by_head = True
    one_operation = False

    def serves(self, asked: AttentionCall) -> bool:
        return True

    def lay_out(self, w: Writer, q: Tensor, k: Tensor, v: Tensor, kind: LayerKind, masked: bool) -> Tensor:
        """In fp32 (aten transformers/attention.cpp, _scaled_dot_product_attention_math and _safe_softmax): 16 bits are widened, queries and
        keys are scaled, causality is added as a bias, in place; of the attention matrix there is a copy in 16 bits, which nobody reads.
        Its variables hold all of it until the output is there. Uncounted, but where products broadcast keys: of several sequences the
        product copies the queries, heads first."""
        tape, a = w.tape, w.model.attention
        narrow, given = q.dtype, (q, k, v)
        q, k, v = (w.cast(each, "float32", f"{each.name} in fp32") for each in given)
        variables = (q, k, v)
        scaled = queries = w.pointwise("scale queries", q, tape.new("Q, scaled", f"{w.t} H e", q.dtype))
        bias = mask_as_bias(w, narrow) if masked else _causal_bias(w, q.dtype)
        broadcast = a.keys == "broadcast"
        if not broadcast:
            asked = AttentionCall.from_attention(a, narrow, masked, w.numerics.platform)
            k, v = (repeated(w, x, by_kernel=asked.grouped) for x in (k, v))
        keys = w.pointwise("scale keys", k, tape.new("K, scaled", f"{w.t} {'G' if broadcast else 'H'} e", q.dtype))
        if broadcast:
            queries, keys = copied_by_head(w, scaled), for_every_head(w, keys)
        scores = scores_of(w, "scores", q.dtype)
        tape.op(
            "scores",
            [queries, keys, bias],
            scores,
            for_gradients=ForGradients(((queries, keys), (keys, queries))),
            grads=tuple((x, tape.grad(x)) for x in (queries, keys)),
            flops=((4, a.heads * a.head_dim * 2),),
        )
        weights = scores_of(w, "attention matrix", q.dtype)
        w.softmax("softmax", scores, weights, scores_of(w, "scores at -inf", "bool"))
        w.hold(k, v, scaled, bias, *variables)
        if broadcast:
            v = for_every_head(w, v)
        return mix(w, w.dropout(weights, a.dropout), v, holds=(k, scaled, bias, *variables), dtype=narrow)


def _causal_bias(w: Writer, dtype: str) -> Tensor:
    """A lower triangle of ones as a bias."""
    allowed, ones = (w.tape.new(name, "s s", "bool") for name in ("causal mask", "ones"))
    w.tape.op("causal mask", [], allowed, temps=(ones,))
    return w.tape.op("mask to bias", [allowed], w.tape.new("attention bias", "s s", dtype))
