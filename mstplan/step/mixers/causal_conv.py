"""A convolution over the last few tokens, each channel by itself: transformers' causal_conv1d_fn in plain torch.

Padded with k - 1 tokens on both sides, of whose results the first s are taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..selection import WeightKind
from ..tape import Tensor

if TYPE_CHECKING:
    from ..layers import Writer


def causal_conv(w: Writer, x: Tensor, module: str, kernel: int, bias: bool) -> tuple[Tensor, Tensor]:
    """Of x (t, channels) the convolution's results, a view of its first tokens, and the rest, which lives as long: (b, k - 1, channels)."""
    tape, width = w.tape, w.width(x)
    axes = " ".join(x.shape.split()[2:])
    given = w.cast(x, w.numerics.weights, f"{x.name} in the weight's dtype")
    given = w.autocast(given)
    weights = [w.weight(module, width, 1, kernel, kinds=(WeightKind.ATTENTION,))]
    copy = w.cast_weight(weights[0])
    if bias:
        weights.append(w.weight(module, width, kinds=(WeightKind.ATTENTION,), name=".bias"))
    whole = tape.new("convolution", f"{w.t} {axes}", given.dtype)
    rest = tape.new("convolution, beyond the last token", f"b {kernel - 1} {axes}", given.dtype)
    tape.op(
        "convolution",
        [given, *copy],
        whole,
        rest,
        keeps=(given, *copy),  # whichever gradient is wanted (tools/autograd/derivatives.yaml, convolution)
        grads=((given, tape.grad(given)),),
        weights=tuple(weights),
        flops=((whole.basis, 2 * width * kernel),),
        cast=bool(copy),
    )
    y = tape.view(whole, "convolution of the tokens", whole.shape)
    tape.op("slice tokens", [whole, rest], y, grads=((whole, tape.grad(whole)), (rest, tape.grad(rest))))
    return y, rest
