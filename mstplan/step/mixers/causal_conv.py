"""A convolution over the last few tokens, each channel by itself: transformers' causal_conv1d_fn in plain torch, or causal-conv1d's.

In torch it is padded with k - 1 tokens on both sides, of whose results the first s are taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..mixer_packages import packages_of
from ..selection import WeightKind
from ..tape import ForGradients, Tensor, Weight

if TYPE_CHECKING:
    from ..layers import Writer


def causal_conv(
    w: Writer, x: Tensor, module: str, kernel: int, bias: bool, active: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Of x (t, channels) the convolution's results, and what else lives as long as these. active: silu of them, where it is taken."""
    names = (".weight", ".bias") if bias else (".weight",)
    width = w.width(x)
    shapes = ((width, 1, kernel), (width,))
    weights = tuple(
        w.weight(module, *shape, kinds=(WeightKind.ATTENTION,), name=name)
        for name, shape in zip(names, shapes, strict=False)
    )
    if "causal-conv1d" in packages_of(w.numerics.kernels):
        return _fused(w, x, kernel, weights, active), ()
    y, rest = _in_torch(w, x, kernel, weights)
    if active is None:
        return y, (rest,)
    w.tape.op("silu", [y, rest], active, keeps=(y, rest), grads=((y, w.tape.grad(y)),))
    return active, ()


def _in_torch(w: Writer, x: Tensor, kernel: int, weights: tuple[Weight, ...]) -> tuple[Tensor, Tensor]:
    """A view of the results' first tokens, and the rest, which lives as long: (b, k - 1, channels)."""
    tape, width = w.tape, w.width(x)
    axes = " ".join(x.shape.split()[2:])
    given = w.cast(x, w.numerics.weights, f"{x.name} in the weight's dtype")
    given = w.autocast(given)
    copy = w.cast_weight(weights[0])
    whole = tape.new("convolution", f"{w.t} {axes}", given.dtype)
    rest = tape.new("convolution, beyond the last token", f"b {kernel - 1} {axes}", given.dtype)
    tape.op(
        "convolution",
        [given, *copy],
        whole,
        rest,
        keeps=(given, *copy),  # whichever gradient is wanted (tools/autograd/derivatives.yaml, convolution)
        grads=((given, tape.grad(given)),),
        weights=weights,
        flops=((whole.basis, 2 * width * kernel),),
        cast=bool(copy),
    )
    y = tape.view(whole, "convolution of the tokens", whole.shape)
    tape.op("slice tokens", [whole, rest], y, grads=((whole, tape.grad(whole)), (rest, tape.grad(rest))))
    return y, rest


def _fused(w: Writer, x: Tensor, kernel: int, weights: tuple[Weight, ...], active: Tensor | None) -> Tensor:
    """With silu in one kernel, which keeps its input; gradients of weights are summed in fp32.

    from source: causal_conv1d 1.7.0, causal_conv1d_interface.py, CausalConv1dFn; cpp_functions.py, causal_conv1d_bwd_function."""
    tape = w.tape
    y = active or tape.new("convolution", x.shape, x.dtype)
    sums = tuple(tape.new(f"gradient of {each.name} in fp32", str(each.numel), "float32") for each in weights)
    return tape.op(
        "convolution",
        [x],
        y,
        keeps=(x,),
        for_gradients=ForGradients(all=True),
        grads=((x, tape.grad(x)),),
        back_temps=sums if w.numerics.weights != "float32" else (),
        weights=weights,
        flops=((y.basis, 2 * w.width(x) * kernel),),
    )
