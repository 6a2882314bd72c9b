"""Mamba-2 (models/mamba2/modeling_mamba2.py, Mamba2Mixer), with mamba2_chunk_scan as it stands there: the scan in fp32, over chunks,
begun ones filled up.

Axes: M heads, P what a head has, N the state, g groups of heads that share B and C; n chunks and l tokens of a chunk are y or z and a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...spec.model import Mamba2
from ..mixer_packages import packages_of
from ..selection import WeightKind
from ..tape import MIXER_CHUNKS, ForGradients, Tensor, Weight
from .causal_conv import causal_conv
from .fused_mamba2 import FusedMamba2

if TYPE_CHECKING:
    from ..layers import Writer

_WIDE = "float32"
_CHUNKS = {MIXER_CHUNKS["y"]: ("y", "u"), MIXER_CHUNKS["z"]: ("z", "v")}
"""Axes that count chunks, and chunks and one more, by the tokens of a chunk."""


def mamba2(w: Writer, x: Tensor, sizes: Mamba2) -> Tensor:
    """x (t, d) -> (t, d)."""
    return _Mamba2(w, sizes).lay_out(x)


class _Mamba2:
    def __init__(self, w: Writer, sizes: Mamba2):
        self.w, self.tape, self.sizes, self.module = w, w.tape, sizes, w.names.get("mamba", "mamba")
        w.tape.dims.update({"M": sizes.heads, "P": sizes.head_dim, "N": sizes.state, "g": sizes.groups})
        self.chunks, self.states = _CHUNKS[sizes.chunk]

    def new(self, name: str, shape: str, dtype: str = _WIDE) -> Tensor:
        return self.tape.new(name, f"{self.w.t} {shape}", dtype)

    def in_chunks(self, name: str, width: str = "") -> Tensor:
        return self.tape.new(name, f"b {self.chunks} {self.sizes.chunk} M {width}".rstrip(), _WIDE)

    def between(self, name: str) -> Tensor:
        """Of every two tokens of a chunk."""
        return self.in_chunks(name, str(self.sizes.chunk))

    def weight(self, name: str) -> Weight:
        kinds = (WeightKind.ATTENTION,)
        return self.w.weight(f"{self.module}.{name}", self.sizes.heads, kinds=kinds, name="")

    # ---- the layer --------------------------------------------------------------------------------------------------

    def lay_out(self, x: Tensor) -> Tensor:
        w, tape, s, t, kind = self.w, self.tape, self.sizes, self.w.t, WeightKind.ATTENTION
        inner, shared = s.heads * s.head_dim, s.groups * s.state
        width = inner + 2 * shared
        name = f"{self.module}.in_proj"
        whole = w.new("gate, x, B, C and dt", str(s.projected))
        given = w.scaled(x) if s.scaled else x
        projected = w.linear(given, whole, name, kind=kind, bias=s.bias)
        if s.scaled:
            projected = w.scaled(projected)
        dtype, decay = projected.dtype, self._decay()
        if "mamba-ssm" in packages_of(w.numerics.kernels):
            out = FusedMamba2(w, s, self.module, self.chunks).lay_out(projected, decay)
            w.hold(x, given, projected, decay)
            return out
        parts = (("gate", f"{t} M P"), ("x, B and C", f"{t} {width}"), ("dt", f"{t} M"))
        gate, joined, dt = w._split(projected, *parts)
        active = tape.new("x, B and C, convolved", f"{t} {width}", dtype)
        causal_conv(w, joined, f"{self.module}.conv1d", s.kernel, s.conv_bias, active)
        outside = (x, projected, decay, active)
        values, b, c = w._split(active, ("x", f"{t} M P"), ("B", f"{t} g N"), ("C", f"{t} g N"))
        scanned = self._scan(values, dt, decay, b, c, outside)
        gated = {"after the gate": self._gated_norm, "before the gate": self._normed_first, "none": self._gated}
        normed = gated[s.norm](scanned, gate, outside)
        y = w.cast(normed, dtype, "scanned values, gated")
        out = w.linear(y, w.new("attention output", "d"), f"{self.module}.out_proj", kind=kind, bias=s.out_bias)
        w.hold(*outside, normed)
        return out

    def _decay(self) -> Tensor:
        """-exp(A_log), in fp32."""
        logs, heads = self.weight("A_log"), str(self.sizes.heads)
        exponential, y = (self.tape.new(f"{sign}exp(A_log)", heads, _WIDE) for sign in ("", "-"))
        return self.tape.op("-exp(A_log)", [], y, exponential, keeps=(exponential,), weights=(logs,))

    def _gated(self, x: Tensor, gate: Tensor, outside: tuple[Tensor, ...]) -> Tensor:
        """x * silu(gate), of which the gate alone has the weights' dtype (FalconH1Mixer without a norm)."""
        w, tape = self.w, self.tape
        active = w.pointwise("silu of the gate", gate, self.new("silu of the gate", "M P", gate.dtype), gate)
        y, wide = self.new("x * gate", "M P"), self.new("gradient x x", "M P")
        grads = ((x, tape.grad(x)), (active, tape.grad(active)))
        tape.op("x * gate", [x, active], y, keeps=(x, active), grads=grads, back_temps=(wide,))
        w.hold(*outside, x)
        return y

    def _normed_first(self, x: Tensor, gate: Tensor, outside: tuple[Tensor, ...]) -> Tensor:
        """weight * norm(x) * silu(gate), by groups, in fp32 (FalconH1RMSNormGated)."""
        w, s, t = self.w, self.sizes, self.w.t
        groups = self.tape.view(x, x.name, f"{t} g {s.heads * s.head_dim // s.groups}")
        self.tape.op("by groups", [x], groups, grads=((x, None),))
        normed, mean = w._root_mean_square(groups, f"{self.module}.norm")
        y = self._weighted(normed)
        wide = w.cast(gate, _WIDE)
        active = w.pointwise("silu of the gate", wide, self.new("silu of the gate", "M P"), wide)
        gated = w.multiply("x * gate", y, active, self.new("x * gate", "M P"))
        w.hold(*outside, x, y, mean)
        return gated

    def _weighted(self, normed: Tensor) -> Tensor:
        """The norm's weight, times what it normed, by groups or all side by side."""
        whole = self.tape.view(normed, normed.name, f"{self.w.t} {self.sizes.heads * self.sizes.head_dim}")
        self.tape.op("groups side by side", [normed], whole, grads=((normed, None),))
        return self.w._weighted(whole, f"{self.module}.norm")

    def _gated_norm(self, x: Tensor, gate: Tensor, outside: tuple[Tensor, ...]) -> Tensor:
        """weight * norm(x * silu(gate)), by groups, in fp32 (MambaRMSNormGated)."""
        w, s, name = self.w, self.sizes, f"{self.module}.norm"
        held = (*outside, x)
        wide = w.cast(gate, _WIDE)
        w.hold(*held)
        active = w.pointwise("silu of the gate", wide, self.new("silu of the gate", "M P"), wide)
        w.hold(*held)
        gated = self.new("x * gate", f"g {s.heads * s.head_dim // s.groups}")
        w.multiply("x * gate", x, active, gated)
        w.hold(*held)
        normed, mean = w._root_mean_square(gated, name)
        w.hold(*held, gated, mean)
        y = self._weighted(normed)
        w.hold(*held, normed, mean)
        return y

    # ---- the scan -----------------------------------------------------------------------------------------------------

    def _scan(self, x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, outside: tuple[Tensor, ...]) -> Tensor:
        """mamba2_chunk_scan; outside: what its caller's variables hold."""
        w, tape = self.w, self.tape
        dt = self._step_size(dt)
        x = w.cast(x, _WIDE, "x in fp32")
        b, c = self._of_heads(b), self._of_heads(c)
        beside = self._beside(x)
        stretched = self._stretched(x, dt)
        decays = self._decays(decay, dt)
        plain = (stretched, decays, b, c)
        x, a, b, c = (self._chunked(each) for each in plain)
        w.hold(*outside, *plain, dt)
        total = self.in_chunks("decay within a chunk, log")
        tape.op("sum decays", [a], total, grads=((a, tape.grad(a)),))
        held = [*outside, dt, beside, x, a, b, c, total]
        inside = self._segments(a, self.between, held)
        scores = self._product("C B'", (c, b), (), self.between("C B'"), self.sizes.state, copies=(c, b))
        weights = w.multiply("C B' * decays", scores, inside, self.between("C B' * decays"))
        held += [inside, scores, weights]
        diagonal = self.in_chunks("outputs within chunks", "P")
        self._product(
            "outputs within chunks", (weights, x), (weights,), diagonal, self.sizes.chunk, copies=(x,), turns=True
        )
        to_end = self._exponential(total, "decay to a chunk's end", differs=True)
        late = self._by_token(b, to_end, "B * decay", "N")
        held += [diagonal, to_end, late]
        off = self._from_other_chunks(c, late, x, total, held)
        output = self.in_chunks("outputs", "P")
        tape.op("add outputs", [diagonal, off], output, grads=((diagonal, None), (off, None)))
        ordered = self.in_chunks("outputs in order", "P")
        tape.op("outputs in order", [output], ordered, grads=((output, None),))
        held += [off]
        w.hold(*held, output)
        y = self.in_chunks("outputs and D x", "P")
        tape.op("add D x", [ordered, beside], y, grads=((ordered, None), (beside, None)))
        w.hold(*held)
        out = tape.view(y, "scanned values", f"{w.t} M P")
        return tape.op("leave out what was filled up", [y], out, grads=((y, None),))

    def _from_other_chunks(self, c: Tensor, late: Tensor, x: Tensor, total: Tensor, held: list[Tensor]) -> Tensor:
        """What the states before each chunk give to its tokens."""
        w, tape, s = self.w, self.tape, self.sizes
        own = tape.new("states of chunks", f"b {self.chunks} M P N", _WIDE)
        self._product("states of chunks", (late, x), (), own, s.chunk, copies=(late, x), turns=True)
        first = tape.new("first state", "b M P N", _WIDE)
        tape.op("first state", [], first)
        states = tape.new("states", f"b {self.states} M P N", _WIDE)
        tape.op("join states", [first, own], states, grads=((own, None),))
        ends = tape.new("decays of chunks, log", f"b {self.states} M", _WIDE)
        tape.op("decays of chunks", [total], ends, grads=((total, tape.grad(total)),))
        held += [first]

        def between_chunks(name: str) -> Tensor:
            return tape.new(name, f"b {self.states} {self.states} M", _WIDE)

        decays = self._segments(ends, between_chunks, held)
        before = tape.new("states before chunks", states.shape, _WIDE)
        flops = ((before.basis, 2 * s.heads * s.head_dim * s.state),)  # and as often as there are chunks
        grads = ((decays, tape.grad(decays)), (states, tape.grad(states)))
        tape.op("states before chunks", [decays, states], before, keeps=(decays, states), grads=grads, flops=flops)
        given = tape.view(before, "states given to chunks", own.shape)
        tape.op("states given to chunks", [before], given, grads=((before, tape.grad(before)),))
        out_decay = self._exponential(total, "decay from a chunk's start")
        read = self.in_chunks("C * states", "P")
        self._product("C * states", (c, given), (), read, s.state, copies=(c, given), turns=True)
        held += [decays, before, out_decay, read]
        w.hold(*held)
        off = self._by_token(read, out_decay, "outputs of other chunks", "P")
        w.hold(*held)
        return off

    def _step_size(self, dt: Tensor) -> Tensor:
        """clamp(softplus(dt + dt_bias))."""
        w, tape, bias = self.w, self.tape, self.weight("dt_bias")
        shifted, soft, y = (self.new(name, "M", dt.dtype) for name in ("dt + dt_bias", "softplus of dt", "dt, clamped"))
        sums = (w.sum_over_tokens(bias, dt),)
        tape.op("dt + dt_bias", [dt], shifted, grads=((dt, None),), weights=(bias,), workspaces=sums)
        w.pointwise("softplus", shifted, soft, shifted)
        masks = (self.new("within bounds", "M", "bool"),) * 2
        return tape.op("clamp dt", [soft], y, keeps=(soft,), grads=((soft, tape.grad(soft)),), back_temps=masks)

    def _of_heads(self, x: Tensor) -> Tensor:
        """B or C of each head, in fp32."""
        wide = self.w.cast(x, _WIDE, f"{x.name} in fp32")
        y = self.new(f"{x.name} of heads", "M N")
        return self.tape.op(y.name, [wide], y, grads=((wide, self.tape.grad(wide)),))

    def _beside(self, x: Tensor) -> Tensor:
        """D x, with x filled up."""
        tape, d = self.tape, self.weight("D")
        padded = self._padded(x)
        y, product = self.in_chunks("D x", "P"), self.in_chunks("gradient x x", "P")
        keeps = ForGradients(((padded, d),), ((product, d),))
        return tape.op("D x", [padded], y, for_gradients=keeps, grads=((padded, tape.grad(padded)),), weights=(d,))

    def _stretched(self, x: Tensor, dt: Tensor) -> Tensor:
        """x dt."""
        tape, wide = self.tape, self.w.cast(dt, _WIDE)
        y, product = self.new("x dt", "M P"), self.new("gradient x x", "M P")
        grads = ((x, tape.grad(x)), (wide, tape.grad(wide)))
        return tape.op("x dt", [x, wide], y, keeps=(x, wide), grads=grads, back_temps=(product,))

    def _decays(self, decay: Tensor, dt: Tensor) -> Tensor:
        """A dt, a number for each token and head."""
        tape, wide, y = self.tape, self.w.cast(dt, _WIDE), self.new("A dt", "M")
        product, kept = self.new("gradient x dt", "M"), (decay, wide)
        grads = ((decay, tape.grad(decay)), (wide, tape.grad(wide)))
        return tape.op("A dt", [decay, wide], y, keeps=kept, grads=grads, back_temps=(product,))

    def _padded(self, x: Tensor) -> Tensor:
        y = self.in_chunks(f"{x.name}, whole chunks", " ".join(x.shape.split()[3:]))
        return self.tape.op("pad " + x.name, [x], y, grads=((x, self.tape.grad(x)),))

    def _chunked(self, x: Tensor) -> Tensor:
        """Filled up to whole chunks; its gradient is put in order."""
        padded = self._padded(x)
        y = self.tape.view(padded, padded.name, padded.shape)
        in_order = self.tape.grad(padded) if len(x.shape.split()) > 3 else None
        return self.tape.op("chunks of " + x.name, [padded], y, grads=((padded, in_order),))

    def _exponential(self, x: Tensor, name: str, differs: bool = False) -> Tensor:
        """exp(x); differs: of the last token's less x, which is made first."""
        if differs:
            difference = self.tape.new(f"{name}, log", x.shape, _WIDE)
            negative = self.tape.new("negative gradient", x.shape, _WIDE)
            gradient = ((x, self.tape.grad(x)),)
            x = self.tape.op(f"{name}, log", [x], difference, grads=gradient, back_temps=(negative,))
        y = self.tape.new(name, x.shape, _WIDE)
        return self.w.pointwise("exp", x, y, y)

    def _by_token(self, x: Tensor, factor: Tensor, name: str, width: str) -> Tensor:
        """x times a number for each token and head."""
        tape, y, product = self.tape, self.in_chunks(name, width), self.in_chunks("gradient x " + x.name, width)
        grads = ((x, tape.grad(x)), (factor, tape.grad(factor)))
        return tape.op(name, [x, factor], y, keeps=(x, factor), grads=grads, back_temps=(product,))

    def _segments(self, x: Tensor, square: Callable[[str], Tensor], held: list[Tensor]) -> Tensor:
        """exp(segment_sum(x)): sums of x from each place to each other; square: makes a tensor with a number for every two places."""
        w, tape = self.w, self.tape
        masked, summed, again = (square(f"decays, {what}") for what in ("masked", "summed", "masked again"))
        gradient = square("masked gradient")
        tape.op("mask decays", [x], masked, grads=((x, tape.grad(x)),), back_temps=(gradient,))
        grads = ((masked, tape.grad(masked)),)
        tape.op("sum segments", [masked], summed, grads=grads, back_temps=(gradient, gradient))
        tape.op("mask sums", [summed], again, grads=((summed, tape.grad(summed)),))
        w.hold(*held, masked, summed)
        return self._exponential(again, "decays between places")

    def _product(
        self,
        name: str,
        inputs: tuple[Tensor, Tensor],
        kept: tuple[Tensor, ...],
        y: Tensor,
        inner: int,
        copies: tuple[Tensor, ...],
        turns: bool = False,
    ) -> Tensor:
        """torch.einsum: a batched product of copies of its inputs in order, which are kept; `kept`: inputs that lie in order. turns: so is a
        gradient of y copied."""
        tape = self.tape
        ordered = tuple(tape.new(f"{each.name}, in order for {name}", each.shape, _WIDE) for each in copies)
        turned = (tape.new(f"gradient of {y.name}, in order", y.shape, _WIDE),) if turns else ()
        grads = tuple((each, tape.grad(each)) for each in inputs)
        keeps = (*kept, *ordered)
        flops = ((y.basis, 2 * y.bytes // 4 * inner),)
        return tape.op(name, inputs, y, *ordered, keeps=keeps, grads=grads, back_temps=turned, flops=flops)
