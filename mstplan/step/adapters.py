"""LoRA adapters as peft makes them, beside linear layers whose own weights are frozen.

from source: peft tuners/lora/layer.py, Linear.forward; tuners/lora/bnb.py, Linear4bit.forward and Linear8bitLt.forward:

    result = base_layer(x)                      # of quantised weights: result.clone()
    x = x.to(lora_A.weight.dtype)               # of quantised weights not under autocast
    result = result + lora_B(lora_A(dropout(x))) * scaling
    result = result.to(dtype of the base's result)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .selection import WeightKind

if TYPE_CHECKING:
    from .layers import Writer
    from .tape import Tensor, Weight

ALL_LINEAR, ATTENTION = "all-linear", "attention"
WORDS = (ALL_LINEAR, ATTENTION)
"""What stands for modules, in place of their names."""
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
SIZE = ".lora_magnitude_vector.default.weight"
MATRICES, MAGNITUDE = ("lora_A", "lora_B"), "lora_magnitude_vector"
"""Patterns of adapters' weights; of DoRA's magnitude."""


class Adapters(NamedTuple):
    """Adapters of a step. dtype: of their weights. parameters: of a mixture's experts and router that get one, each with its rank;
    as_parameters: names of linear layers that peft takes for those (expert_adapters.py). inputs: dtype to which peft casts their inputs, where that
    is another than theirs, to which autocast casts them then; quantised_inputs: does peft cast those of 4-bit layers?"""

    rank: int
    targets: tuple[str, ...]
    dropout: float
    dora: bool
    dtype: str
    parameters: tuple[tuple[str, int], ...] = ()
    as_parameters: tuple[str, ...] = ()
    inputs: str = ""
    quantised_inputs: bool = True

    def targets_module(self, module: str, kind: WeightKind | None) -> bool:
        """Whether a linear layer gets one. module: its path in a layer, as transformers calls it; kind: None where no word means it."""
        if (
            kind is WeightKind.HEAD
        ):  # peft leaves the output layer out of all-linear, mstplan of a name, too (see Recipe)
            return False
        if module.rsplit(".", 1)[-1] in self.as_parameters:
            return False
        return any(
            target == ALL_LINEAR
            or (target == ATTENTION and kind is WeightKind.ATTENTION)
            or module == target
            or module.endswith(f".{target}")
            for target in self.targets
        )


def is_read_outside(weight: Weight) -> bool:
    """Whether peft's layer asks a weight of a module in it for its dtype (tuners/lora/layer.py, Linear.forward: _cast_input_dtype)."""
    return weight.is_adapter and weight.name.endswith(DOWN)


def _kinds(kind: WeightKind | None) -> tuple[WeightKind, ...]:
    return () if kind is None else (kind,)


def add_adapter(
    w: Writer, x: Tensor, base: Tensor, y: Tensor, module: str, kind: WeightKind | None, quantised: bool
) -> Tensor:
    """y = base + B A x, scaled. x: the linear layer's input; base: what the layer itself made of it."""
    adapters, tape = w.numerics.adapters, w.tape
    assert adapters is not None
    if quantised:
        copy = tape.new(base.name, base.shape, base.dtype)
        base = tape.op("clone " + base.name, [base], copy, grads=((base, None),))
    casts = not quantised or (adapters.quantised_inputs and not w.numerics.autocast)
    wide = w.cast(x, adapters.inputs or adapters.dtype, f"{x.name} for {module}") if casts else x
    out = w.numerics.compute if w.numerics.autocast else adapters.dtype if adapters.inputs else wide.dtype
    made = _with_magnitude if adapters.dora else _scaled
    with tape.call():
        dropped = _dropped(w, wide, adapters.dropout)
    scaled = made(w, dropped, base, y, module, kind, out)
    held: tuple[Tensor, ...] = (x, wide)  # x by the frames that call the module
    if quantised and casts:
        scaled = w.cast(scaled, base.dtype, scaled.name)
        held = (*held, scaled)
    wider = y.dtype != "float32" and "float32" in (scaled.dtype, base.dtype)
    both = tape.new(y.name, y.shape, "float32") if wider else y
    if quantised:
        both = y
    w.add(base, scaled, both, f"{module}: add the adapter")
    if both is not y:
        tape.op("cast " + y.name, [both], y, grads=((both, tape.grad(both)),))
        held = (*held, both)
    w.hold(*held)
    return y


def _dropped(w: Writer, x: Tensor, p: float) -> Tensor:
    """What dropout makes of an adapter's input: without any the same, by a module all the same, which ZeRO-3's hooks meet."""
    if p or not w.numerics.in_deepspeeds_linear:
        return w.dropout(x, p)
    return w.tape.op(f"no dropout of {x.name}", [x], w.tape.view(x, x.name, x.shape), grads=((x, None),))


def _scaled(w: Writer, x: Tensor, _base: Tensor, y: Tensor, module: str, kind: WeightKind | None, out: str) -> Tensor:
    """B A x, times the scaling."""
    high = _low_rank(w, x, y, module, kind, out)
    return w.pointwise(f"{module}: scale", high, w.tape.new(f"{y.name} of the adapter, scaled", y.shape, out))


def _low_rank(w: Writer, x: Tensor, y: Tensor, module: str, kind: WeightKind | None, out: str) -> Tensor:
    adapters, tape = w.numerics.adapters, w.tape
    assert adapters is not None
    down = w.weight(
        module, adapters.rank, w.width(x), kinds=_kinds(kind), name=DOWN, dtype=adapters.dtype, is_adapter=True
    )
    up = w.weight(module, w.width(y), adapters.rank, kinds=_kinds(kind), name=UP, dtype=adapters.dtype, is_adapter=True)
    low = tape.new(f"{y.name}, rank {adapters.rank}", f"{w.t} {adapters.rank}", out)
    with tape.call():
        taken = w.cast(x, adapters.dtype) if adapters.inputs else x
        w.product(taken, low, module + ".lora_A", down)
        w.hold(x)
    with tape.call():
        return w.product(low, tape.new(f"{y.name} of the adapter", y.shape, out), module + ".lora_B", up)


def _with_magnitude(
    w: Writer, x: Tensor, base: Tensor, y: Tensor, module: str, kind: WeightKind | None, out: str
) -> Tensor:
    """DoRA's (m / n - 1) base + m / n B A x, where m is trained and n the norm of each row of W + B A (peft tuners/lora/dora.py,
    DoraLinearLayer.forward). B A is made of a whole identity, in the adapter's dtype, and W is cast to it."""
    tape, adapters = w.tape, w.numerics.adapters
    assert adapters is not None
    outer, inner = w.width(y), w.width(x)
    held, identity = _norm_of_rows(w, module, outer, inner)
    if adapters.dropout:  # the base's product once more, of what dropout left
        again = tape.new(f"{y.name} of the base, again", y.shape, x.dtype)
        base = tape.op(f"{module}: base again", [x], again, keeps=held[-1:], grads=((x, tape.grad(x)),))
    high = _low_rank(w, x, y, module, kind, out)
    magnitude = w.weight(module, outer, kinds=_kinds(kind), name=SIZE, dtype=adapters.dtype, is_adapter=True)
    wide = "float32" if "float32" in (adapters.dtype, base.dtype) else base.dtype

    def like(name: str) -> Tensor:
        return tape.new(name, y.shape, wide)

    product = like("gradient x base")
    own = like(f"{y.name} of the base, by its magnitude")
    tape.op(
        f"{module}: magnitude of the base",
        [base],
        own,
        keeps=(base,),
        grads=((base, tape.grad(base)),),
        back_temps=(product,),
        weights=(magnitude,),
    )
    sized = like(f"{y.name} of the adapter, by its magnitude")
    tape.op(f"{module}: magnitude of the adapter", [high], sized, keeps=(high,), grads=((high, tape.grad(high)),))
    scaled = w.pointwise(f"{module}: scale", sized, like(f"{y.name} of the adapter, scaled"))
    result = w.add(own, scaled, like(f"{y.name} of DoRA"), f"{module}: add both")
    w.hold(*held, high)
    tape.hold_graph(identity)
    return result


def _norm_of_rows(w: Writer, module: str, outer: int, inner: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Variables that DoRA's forward holds: B A, and the layer's weight in the adapter's dtype where it has another; and the identity that
    B A was made of."""
    tape, numerics = w.tape, w.numerics
    assert numerics.adapters is not None
    dtype, shape = numerics.adapters.dtype, f"{outer} {inner}"
    identity = tape.new("identity", f"{inner} {inner}", dtype)
    tape.op(f"{module}: identity", [], identity)
    whole = tape.new(f"{module}: B A", shape, dtype)
    tape.op(f"{module}: B A", [identity], whole)
    held: tuple[Tensor, ...] = (whole,)
    if numerics.quantised or numerics.weights != dtype:
        cast = tape.new(f"{module} in {dtype}", shape, dtype)
        dequantised = tape.new(f"{module}, dequantised", shape, "bfloat16")
        tape.op(f"{module}: cast the weight", [], cast, temps=(dequantised,) if numerics.quantised else ())
        held = (*held, cast)
    summed = tape.new(f"{module}: W + B A", shape, dtype)
    norm = tape.new(f"{module}: norm of rows", str(outer), dtype)
    tape.op(f"{module}: norm of rows", [whole], norm, temps=(summed, summed))
    return held, identity
