"""Linear attention by the gated delta rule (models/qwen3_next/modeling_qwen3_next.py, Qwen3NextGatedDeltaNet), with
torch_chunk_gated_delta_rule as it stands there: all of it in fp32, over chunks of 64 tokens, begun ones filled up.

Axes: C value heads, K key heads, i and o what a head has of keys and of values, x chunks, 64 tokens of a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...spec.model import GatedDelta
from ..mixer_packages import packages_of
from ..selection import WeightKind
from ..tape import MIXER_CHUNKS, ForGradients, Tensor, Weight
from .causal_conv import causal_conv

if TYPE_CHECKING:
    from ..layers import Writer

CHUNK = MIXER_CHUNKS["x"]
_WIDE = "float32"


def gated_delta(w: Writer, x: Tensor, sizes: GatedDelta) -> Tensor:
    """x (t, d) -> (t, d)."""
    return _GatedDelta(w, sizes).lay_out(x)


class _GatedDelta:
    def __init__(self, w: Writer, sizes: GatedDelta):
        self.w, self.tape, self.sizes = w, w.tape, sizes
        w.tape.dims.update({"C": sizes.value_heads, "K": sizes.key_heads, "i": sizes.key_dim, "o": sizes.value_dim})

    def new(self, name: str, shape: str, dtype: str) -> Tensor:
        return self.tape.new(name, f"{self.w.t} {shape}", dtype)

    def in_chunks(self, name: str, width: str = "") -> Tensor:
        """(b, C, x, 64, width), which is laid out as (b, x, C, 64, width) here."""
        return self.tape.new(name, f"b x C {CHUNK} {width}".rstrip(), _WIDE)

    # ---- the layer --------------------------------------------------------------------------------------------------

    def lay_out(self, x: Tensor) -> Tensor:
        w, tape, s, t, kind = self.w, self.tape, self.sizes, self.w.t, WeightKind.ATTENTION
        given, z, beta, alpha, beside = self._apart(x) if s.apart else self._together(x)
        joined = given[0]
        width = joined.shape.split()[-1]
        active = tape.new("Q, K and V, convolved", f"{t} {width}", joined.dtype)
        causal_conv(w, joined, "linear_attn.conv1d", s.kernel, bias=False, active=active)
        w.hold(*given)
        rate, decay = self._rate(beta), self._decay(alpha)
        outside = (x, *beside, z, beta, alpha, active, rate, decay)
        w.hold(*outside)
        q, k, v = w._split(active, ("Q", f"{t} K i"), ("K", f"{t} K i"), ("V", f"{t} C o"))
        if "fla" in packages_of(w.numerics.kernels):
            mixed = self._fused_rule(q, k, v, rate, decay)
            w.hold(*outside)
        else:
            mixed = self._rule(q, k, v, rate, decay, outside)
        normed = self._gated_norm(mixed, z, outside)
        y = w.linear(normed, w.new("attention output", "d"), "linear_attn.out_proj", kind=kind)
        w.hold(*outside, normed)
        return y

    def _together(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Of two products, whose parts are put in order (Qwen3-Next): Q, K and V joined, and what they are joined of; Z, beta and alpha; the
        products, which variables hold."""
        w, tape, s, t, kind = self.w, self.tape, self.sizes, self.w.t, WeightKind.ATTENTION
        width = 2 * s.key_heads * s.key_dim + s.value_heads * s.value_dim
        whole = w.new("Q, K, V and Z", str(width + s.value_heads * s.value_dim))
        projected = w.linear(x, whole, "linear_attn.in_proj_qkvz", kind=kind)
        rates = w.linear(x, w.new("beta and alpha", str(2 * s.value_heads)), "linear_attn.in_proj_ba", kind=kind)
        parts = w._split(projected, ("Q", f"{t} K i"), ("K", f"{t} K i"), ("V", f"{t} C o"), ("Z", f"{t} C o"))
        of_rates = w._split(rates, ("beta", f"{t} C"), ("alpha", f"{t} C"))
        v, z, beta, alpha = (self._in_order(part) for part in (*parts[2:], *of_rates))
        q, k = (self._in_order(part) for part in parts[:2])
        joined = tape.new("Q, K and V", f"{t} {width}", projected.dtype)
        tape.op("join Q, K and V", [q, k, v], joined, grads=((q, None), (k, None), (v, None)))
        return (joined, q, k, v), z, beta, alpha, (projected, rates)

    def _apart(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """The same of four products (Qwen3.5), which are used as they are."""
        w, s = self.w, self.sizes
        width = 2 * s.key_heads * s.key_dim + s.value_heads * s.value_dim

        def product(name: str, shape: str, part: str) -> Tensor:
            return w.linear(x, w.new(name, shape), f"linear_attn.in_proj_{part}", kind=WeightKind.ATTENTION)

        joined, z = product("Q, K and V", str(width), "qkv"), product("Z", "C o", "z")
        return (joined,), z, product("beta", "C", "b"), product("alpha", "C", "a"), ()

    def _in_order(self, part: Tensor) -> Tensor:
        y = self.tape.new(f"{part.name}, in order", part.shape, part.dtype)
        return self.tape.op(y.name, [part], y, grads=((part, None),))

    def _rate(self, beta: Tensor) -> Tensor:
        y = self.tape.new("rate", beta.shape, beta.dtype)
        return self.w.pointwise("sigmoid", beta, y, y)

    def _decay(self, alpha: Tensor) -> Tensor:
        """-exp(A_log) * softplus(alpha + dt_bias), in fp32."""
        w, tape, heads = self.w, self.tape, self.sizes.value_heads

        def weight(name: str) -> Weight:
            return w.weight(f"linear_attn.{name}", heads, kinds=(WeightKind.ATTENTION,), name="")

        shifted = tape.new("alpha + dt_bias", alpha.shape, _WIDE)
        wide = w.cast(alpha, _WIDE)
        bias = weight("dt_bias")
        sums = (w.sum_over_tokens(bias, wide),)
        tape.op("alpha + dt_bias", [wide], shifted, grads=((wide, None),), weights=(bias,), workspaces=sums)
        soft = w.pointwise("softplus", shifted, tape.new("softplus", alpha.shape, _WIDE), shifted)
        logs = weight("A_log")
        factor = tape.new("-exp(A_log)", str(heads), _WIDE)
        tape.op("-exp(A_log)", [], factor)
        decay = tape.new("decay", alpha.shape, _WIDE)
        product = tape.new("gradient x softplus", alpha.shape, _WIDE)
        tape.op(
            "decay",
            [soft, factor],
            decay,
            for_gradients=ForGradients(((soft, logs), (factor, soft)), ((product, logs),)),
            grads=((soft, tape.grad(soft)),),
            weights=(logs,),
            workspaces=(w.sum_over_tokens(logs, soft),),
        )
        return decay

    def _gated_norm(self, mixed: Tensor, gate: Tensor, outside: tuple[Tensor, ...]) -> Tensor:
        """weight * normed, times silu of the gate in fp32 (Qwen3NextRMSNormGated)."""
        w, tape, name = self.w, self.tape, "linear_attn.norm"
        held = (*outside, mixed)
        wide = w.cast(mixed, _WIDE, f"{name} input in fp32")
        w.hold(*held)
        normed, mean = w._root_mean_square(wide, name)
        w.hold(*held, mean)
        normed = w.cast(normed, mixed.dtype, f"{name}, normed, {mixed.dtype}")
        product = w._weighted(normed, name)
        w.hold(*held, mean)
        wide_gate = w.cast(gate, _WIDE)
        w.hold(*held, mean)
        active = w.pointwise("silu", wide_gate, tape.new("silu of the gate", gate.shape, _WIDE), wide_gate)
        w.hold(*held, mean)
        gated = tape.new(f"{name}, gated", mixed.shape, _WIDE)
        read = tape.new(
            product.name, product.shape, _WIDE, product
        )  # its gradient is cast when that of the gate is there
        tape.op("read in fp32", [product], read, grads=((product, tape.grad(product)),))
        grads = ((read, tape.grad(read)), (active, tape.grad(active)))
        tape.op("norm * gate", [read, active], gated, keeps=(product, active), grads=grads)
        w.hold(*held, mean)
        y = w.cast(gated, mixed.dtype, "mixed values, gated")
        w.hold(*held, mean)
        return y

    # ---- the rule, fused ---------------------------------------------------------------------------------------------

    def _fused_rule(self, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, decay: Tensor) -> Tensor:
        """flash-linear-attention's, each pass at its largest: in forward when the outputs are there, in backward while gradients come of what the
        rule was written as (W and U, from which values and states are made again).

        from source: fla-core 0.6.0, fla/ops/gated_delta_rule/chunk.py, ChunkGatedDeltaRuleFunction, chunk_gated_delta_rule_fwd and
        chunk_gated_delta_rule_bwd; what is not in order is copied (fla/utils/decorators.py, input_guard).
        """
        tape, s, dtype = self.tape, self.sizes, q.dtype
        y, (copy_q, copy_k, copy_v) = (
            self.new("mixed values", "C o", dtype),
            (self._in_rows(each) for each in (q, k, v)),
        )
        normed = tuple(self.new(f"{each.name}, normed", "K i", dtype) for each in (q, k))
        norms = tuple(self.new(f"{each.name}, 1/norm", "K", _WIDE) for each in (q, k))
        total = self.new("decay within a chunk", "C", _WIDE)
        inverse = self.new("inverse of the system", f"C {CHUNK}", dtype)
        kept = (*normed, *norms, copy_v, total, inverse)
        made_again = (
            self.new("W: keys that read the state", "C i", dtype),
            self.new("U: new values", "C o", dtype),
            tape.new("states", "b x C i o", dtype),
            self.new("values less what the state has", "C o", dtype),
        )
        of_chunk = 2 * s.value_heads * CHUNK * (2 * CHUNK * s.key_dim + s.value_dim * (3 * s.key_dim + CHUNK))
        grads = tuple((each, tape.grad(each)) for each in (q, k, v, rate, decay))
        return tape.op(
            "gated delta rule",
            [q, k, v, rate, decay],
            y,
            *kept,
            keeps=(*kept, rate),
            temps=(copy_q, copy_k, *made_again),
            for_gradients=ForGradients(all=True),
            grads=grads,
            back_temps=(*made_again, *self._of_gradients(y, made_again, total)),
            flops=((made_again[2].basis, of_chunk),),
        )

    def _in_rows(self, x: Tensor) -> Tensor:
        return self.tape.new(f"{x.name} in order", x.shape, x.dtype)

    def _of_gradients(self, y: Tensor, made_again: tuple[Tensor, ...], total: Tensor) -> tuple[Tensor, ...]:
        """What the fused backward makes beside the gradients that it returns and what it made again, when it makes those of W and U
        (prepare_wy_repr_bwd). A moment before it is less (chunk_bwd_dqkwg, see `mixer_packages`), in how many tiles of keys a card ever makes
        the decays' gradient."""
        of_w, _, states, values = (self.tape.grad(each) for each in made_again)
        keys = self.new("gradient of K, of value heads", "C i", y.dtype)
        own_heads = self.sizes.key_heads == self.sizes.value_heads
        summed = () if own_heads else (self.new("gradient of K, summed", "K i", y.dtype),)
        return (of_w, states, values, keys, *summed, self.tape.grad(total))

    # ---- the rule ---------------------------------------------------------------------------------------------------

    def _rule(
        self, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, decay: Tensor, outside: tuple[Tensor, ...]
    ) -> Tensor:
        """torch_chunk_gated_delta_rule; outside: what its caller's variables hold."""
        w, tape, dtype = self.w, self.tape, q.dtype
        if self.sizes.key_heads != self.sizes.value_heads:
            q, k = self._of_value_heads(q), self._of_value_heads(k)
        narrow = (q, k)
        q, k, v, rate = (w.cast(each, _WIDE, f"{each.name} in fp32") for each in (q, k, v, rate))
        w.hold(*outside, *narrow)
        q, k = self._unit(q), self._unit(k)
        scaled = tape.new("Q, scaled", q.shape, _WIDE)
        q = tape.op("scale Q", [q], scaled, grads=((q, tape.grad(q)),), holds=(k, v))
        before = (q, k, v)
        q, k, v = (self._padded(each, f"b x C {CHUNK} {each.shape.split()[-1]}") for each in before)
        w.hold(*outside, *before)
        rate, decay = (self._padded(each, f"b x C {CHUNK}") for each in (rate, decay))
        held = [*outside, v, rate, decay]
        v_rated, k_rated = self._by_token(v, rate, "V * rate", "o"), self._by_token(k, rate, "K * rate", "i")
        total = self.in_chunks("decay within a chunk")
        tape.op("sum decays", [decay], total, grads=((decay, tape.grad(decay)),))
        pairs = self._pairwise(total)
        held += [v_rated, k_rated, total, pairs]
        system = self._weighed_products(k_rated, k, pairs, "K K'")
        inside = self._weighed_products(q, k, pairs, "Q K'")
        k_decayed = self._by_token(k_rated, self._exponential(total, "decay of a token"), "K * rate * decay", "i")
        held += [system, inside, k_decayed]
        values = self._solved(system, v_rated, "new values", "o")
        keys = self._solved(system, k_decayed, "keys that read the state", "i")
        state, out = tape.new("first state", "b C i o", _WIDE), self.in_chunks("mixed values of chunks", "o")
        tape.op("first state", [], state, out)
        held += [values, keys]
        w.hold(*held)
        factor = self._exponential(total, "decay of a query")
        w.hold(*held, k, out)
        q = self._by_token(q, factor, "Q * decay", "i")
        w.hold(*held, k, out)
        to_end = self.in_chunks("decay to a chunk's end, log")
        tape.op("decay to a chunk's end, log", [total], to_end, grads=((total, None),))
        k = self._by_token(k, self._exponential(to_end, "decay to a chunk's end"), "K * decay", "i")
        w.hold(*held, q, out)
        held += [q, k]
        mixed, *last = self._scan(q, k, keys, values, inside, state, out)
        w.hold(*held)
        rows = self.in_chunks("mixed values in order", "o")
        rows = tape.op("mixed values in order", [mixed], rows, grads=((mixed, None),))
        w.hold(*held, *last)
        y = self.new("mixed values", "C o", dtype)
        wide = self.new("gradient of mixed values", "C o", _WIDE)
        tape.op("cast mixed values", [rows], y, grads=((rows, wide),))
        w.hold(*held, *last)
        return y

    def _of_value_heads(self, x: Tensor) -> Tensor:
        """Each head of keys as often as value heads are its."""
        y = self.new(f"{x.name} of value heads", "C i", x.dtype)
        return self.tape.op(y.name, [x], y, grads=((x, self.tape.grad(x)),))

    def _unit(self, x: Tensor) -> Tensor:
        """x / |x|: its square is made and summed; keeps x and one number a row."""
        tape, rows = self.tape, x.shape.rsplit(" ", 1)[0]
        square, total, scale = (
            tape.new(f"{x.name}, {what}", shape, _WIDE)
            for what, shape in (("square", x.shape), ("sum of squares", rows), ("1/norm", rows))
        )
        tape.op(f"{x.name}: square", [x], square, keeps=(x,), grads=((x, tape.grad(x)),), back_temps=(square,))
        tape.op(f"{x.name}: sum of squares", [square], total, grads=((square, None),))
        tape.op(f"{x.name}: 1/norm", [total], scale, keeps=(scale,), grads=((total, tape.grad(total)),))
        y = tape.new(f"{x.name}, normed", x.shape, _WIDE)
        grads = ((x, tape.grad(x)), (scale, tape.grad(scale)))
        return tape.op(
            f"{x.name}: scale", [x, scale], y, keeps=(x, scale), grads=grads, back_temps=(square,), holds=(x,)
        )

    def _padded(self, x: Tensor, shape: str) -> Tensor:
        y = self.tape.new(f"{x.name}, whole chunks", shape, x.dtype)
        return self.tape.op("pad " + x.name, [x], y, grads=((x, self.tape.grad(x)),))

    def _by_token(self, x: Tensor, factor: Tensor, name: str, width: str) -> Tensor:
        """x times a number for each token and head."""
        tape, y = self.tape, self.in_chunks(name, width)
        product = self.in_chunks("gradient x " + x.name, width)
        grads = ((x, tape.grad(x)), (factor, tape.grad(factor)))
        return tape.op(name, [x, factor], y, keeps=(x, factor), grads=grads, back_temps=(product,))

    def _exponential(self, x: Tensor, name: str) -> Tensor:
        y = self.tape.new(name, x.shape, _WIDE)
        return self.w.pointwise("exp", x, y, y)

    def _pairwise(self, total: Tensor) -> Tensor:
        """exp(total_i - total_j) of the tokens of a chunk, 0 above the diagonal."""
        tape, width = self.tape, str(CHUNK)
        difference, masked = (self.in_chunks(f"decays between tokens, {what}", width) for what in ("log", "masked"))
        negative = self.in_chunks("negative gradient", width)
        tape.op(
            "decays between tokens", [total], difference, grads=((total, tape.grad(total)),), back_temps=(negative,)
        )
        mask = tape.new("mask of a chunk", f"{CHUNK} {CHUNK}", "bool")
        tape.op("mask decays", [difference], masked, mask, keeps=(mask,), grads=((difference, tape.grad(difference)),))
        return self._exponential(masked, "decays between tokens")

    def _weighed_products(self, x: Tensor, y: Tensor, weights: Tensor, name: str) -> Tensor:
        """x y' of the tokens of a chunk, each times a weight."""
        tape, width = self.tape, str(CHUNK)
        product = self.in_chunks(name, width)
        flops = ((product.basis, 2 * self.sizes.value_heads * CHUNK * CHUNK * self.sizes.key_dim),)
        grads = ((x, tape.grad(x)), (y, tape.grad(y)))
        tape.op(name, [x, y], product, keeps=(x, y), grads=grads, flops=flops)
        return self.w.multiply(f"{name} * decays", product, weights, self.in_chunks(f"{name} * decays", width))

    def _solved(self, system: Tensor, x: Tensor, name: str, width: str) -> Tensor:
        """y of system y = x (linalg_solve_triangular): keeps the system and y."""
        tape, y = self.tape, self.in_chunks(name, width)
        product = self.in_chunks("gradient of the system, whole", str(CHUNK))
        grads = ((x, tape.grad(x)), (system, tape.grad(system)))
        return tape.op(name, [system, x], y, keeps=(system, y), grads=grads, back_temps=(product,))

    def _scan(
        self, q: Tensor, k: Tensor, keys: Tensor, values: Tensor, inside: Tensor, state: Tensor, out: Tensor
    ) -> tuple[Tensor, ...]:
        """The loop over chunks as one operation, at its largest: in forward when the last chunk's state is made, in backward when the second
        chunk writes its gradient into a copy of that of all. Gradients of a chunk are added, one by one, to zeros of the size of all.

        Returns what all chunks gave, and what variables hold of the last one: what it read of the state, and its values where they are not kept.
        """
        tape, s = self.tape, self.sizes
        chunk_values = tape.new("values of a chunk", f"b C {CHUNK} o", _WIDE)
        chunk_state = tape.new("state of a chunk", "b C i o", _WIDE)
        kept = (self.in_chunks("values less what the state has", "o"), tape.new("states", "b x C i o", _WIDE))
        mixed = tape.view(out, "mixed values of chunks, written", out.shape)
        last = tape.new("what the last chunk read", f"b C {CHUNK} o", _WIDE)
        inputs = (q, k, keys, values, inside)
        states = 3 * (s.key_dim * s.value_dim) > 2 * CHUNK * s.value_dim
        tape.op(
            "scan chunks",
            [*inputs, state, out],
            mixed,
            last,
            recorded=kept,
            unrecorded=(chunk_values,),
            keeps=(*kept, q, k, keys, inside),
            temps=(chunk_state,) * 3 if states else (chunk_values,) * 2,
            grads=tuple((each, tape.grad(each)) for each in inputs),
            back_temps=self._of_a_chunk(),
            flops=((kept[0].basis, 2 * s.value_heads * CHUNK * s.value_dim * (3 * s.key_dim + CHUNK)),),
        )
        return mixed, last, chunk_values

    def _of_a_chunk(self) -> tuple[Tensor, ...]:
        """What the backward of a chunk makes at its largest beside gradients of all chunks: one more of these, and of its own what is more
        than it has let go of what was kept."""
        s, chunk = self.sizes, f"b C {CHUNK}"
        if max(CHUNK, s.key_dim) <= s.value_dim:
            own = self.tape.new("gradient of a chunk", f"{chunk} o", _WIDE)
            return (self.in_chunks("gradient of mixed values, a copy", "o"), own, own)
        if s.key_dim <= CHUNK:
            own = self.tape.new("gradient of a chunk", f"{chunk} {CHUNK}", _WIDE)
            return (self.in_chunks("gradient of a chunk among zeros", str(CHUNK)), own)
        own = self.tape.new("gradient of a chunk", f"{chunk} {s.key_dim - s.value_dim}", _WIDE)
        return (self.in_chunks("gradient of a chunk among zeros", "i"), own)
