"""Products with frozen weights that bitsandbytes keeps in 4 or 8 bits.

from source: bitsandbytes nn/modules.py, Linear4bit.forward; autograd/_functions.py, MatMul4Bit and MatMul8bitLt; backends/default/ops.py,
_dequant_linear_fallback. measured: the event files qlora-8bL4* and int8-8bL4. Their backward wants nothing of the input.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .storage import BLOCK
from .tape import Weight

if TYPE_CHECKING:
    from .layers import Writer
    from .tape import Tensor


def product(w: Writer, x: Tensor, y: Tensor, name: str, weight: Weight, biases: tuple[Weight, ...]) -> Tensor:
    """y = x W^T (+ bias); y comes out in x's dtype."""
    numerics = w.numerics
    frozen = replace(
        weight,
        trained=False,
        quantised=numerics.quantised,
        double_quantised=numerics.double_quantised,
        packed_in=numerics.packed_in,
    )
    multiply = _by_eight_bits if numerics.quantised == "int8" else _by_four_bits
    return multiply(w, x, y, name, frozen, biases)


def _by_four_bits(w: Writer, x: Tensor, y: Tensor, name: str, weight: Weight, biases: tuple[Weight, ...]) -> Tensor:
    """In bf16, by weights that are dequantised for this product: at first their scales are, where those are quantised, too."""
    tape, outer, inner = w.tape, *weight.shape
    x16 = w.cast(x, "bfloat16", f"{x.name} in bf16")
    y16 = y if y.dtype == "bfloat16" else tape.new(f"{y.name} in bf16", y.shape, "bfloat16")
    whole = tape.new(f"{weight.name}, dequantised", f"{outer} {inner}", "bfloat16")
    scales = tape.new(f"scales of {weight.name}", str(-(-weight.numel // BLOCK)), "float32")
    temps = (scales, scales, whole) if weight.double_quantised else (whole,)
    grads = ((x16, tape.grad(x16)),)
    flops = ((y.basis, 2 * inner * outer),)
    tape.op(
        name,
        [x16],
        y16,
        temps=temps,
        grads=grads,
        back_temps=(whole,),
        weights=(weight, *biases),
        flops=flops,
        adds_bias=bool(biases),
    )
    if y16 is y:
        return y
    tape.op(f"cast {y.name}", [y16], y, grads=((y16, tape.grad(y16)),))
    w.hold(x16)
    return y


def _by_eight_bits(w: Writer, x: Tensor, y: Tensor, name: str, weight: Weight, biases: tuple[Weight, ...]) -> Tensor:
    """LLM.int8: rows of the input in 8 bits, from a copy in fp16; the product in int32, scaled into fp16. Backward dequantises the weights."""
    tape, outer, inner = w.tape, *weight.shape
    half = tape.new(f"{x.name} in fp16", x.shape, "float16")
    rows = tape.new(f"{x.name} in 8 bits", x.shape, "int8")
    scales = tape.new(f"scales of {x.name}", x.shape.rsplit(" ", 1)[0], "float32")
    absolute, outliers = (
        tape.new(f"{x.name}, absolute", x.shape, "float16"),
        tape.new(f"{x.name}, large?", x.shape, "bool"),
    )
    tape.op(f"quantise {x.name}", [x], rows, scales, temps=(half, absolute, outliers))
    counted = tape.new(f"{y.name} in int32", y.shape, "int32")
    scaled = tape.new(f"{y.name} in fp16", y.shape, "float16")
    whole = tape.new(f"{weight.name}, dequantised", f"{outer} {inner}", x.dtype)
    return tape.op(
        name,
        [rows, scales, x],
        y,
        temps=(counted, scaled),
        grads=((x, tape.grad(x)),),
        keeps=() if w.numerics.checkpointed else (x,),
        back_temps=(whole,),
        escapes=(x,) if w.numerics.checkpointed else (),
        weights=(weight, *biases),
        flops=((y.basis, 2 * inner * outer),),
    )
