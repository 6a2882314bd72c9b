"""LFM2's short convolution (models/lfm2/modeling_lfm2.py, Lfm2ShortConv): C * conv(B * x), with B, C and x of one product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...spec.model import ShortConv
from ..selection import WeightKind
from ..tape import ForGradients, Tensor
from .causal_conv import causal_conv

if TYPE_CHECKING:
    from ..layers import Writer


def short_conv(w: Writer, x: Tensor, sizes: ShortConv) -> Tensor:
    """x (t, d) -> (t, d)."""
    tape, t, kind = w.tape, w.t, WeightKind.ATTENTION
    both = w.linear(x, w.new("B, C and x", str(3 * w.model.hidden)), "conv.in_proj", kind=kind, bias=sizes.bias)
    b, c, inner = w._split(both, *((name, f"{t} d") for name in ("B", "C", "x")))
    product = w.multiply("B * x", b, inner, w.new("B * x", "d", both.dtype))
    mixed, beside = causal_conv(w, product, "conv.conv", sizes.kernel, sizes.bias)
    mixed = w.cast(mixed, product.dtype)
    y = tape.new("C * convolution", f"{t} d", product.dtype)
    tape.op(
        "C * convolution",
        [c, mixed, *beside],
        y,
        for_gradients=ForGradients(((c, mixed), (mixed, c), *((each, c) for each in beside))),
        grads=((c, tape.grad(c)), (mixed, tape.grad(mixed))),
    )
    w.hold(x, both, mixed)
    out = w.linear(y, w.new("attention output", "d"), "conv.out_proj", kind=kind, bias=sizes.bias)
    w.hold(x, both, mixed, *beside)
    return out
