"""FlashAttention-2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cuda import FLASH_ROWS, flash_head_size
from ..selection import WeightKind
from ..tape import ForGradients
from .base import AttentionCall, Kernel, heads_first, tokens_first

if TYPE_CHECKING:
    from ...spec.model import LayerKind
    from ..layers import Writer
    from ..tape import Tensor


class Flash(Kernel):
    name = "flash"
    label = "FlashAttention-2"
    sixteen_bit_only = True
    in_rings = True

    def serves(self, asked: AttentionCall) -> bool:
        same = asked.head_dim == asked.v_head_dim
        return asked.dtype != "float32" and same and asked.head_dim <= 256 and not asked.masked

    def lay_out(self, w: Writer, q: Tensor, k: Tensor, v: Tensor, kind: LayerKind, masked: bool) -> Tensor:
        """FlashAttention-2 (aten transformers/cuda/flash_attn/flash_api.cpp, mha_fwd and mha_bwd).

        Keeps q, k, v, the output, laid out as q is, and one fp32 log-sum-exp a row. Backward makes dq, dk, dv, an fp32
        accumulator of dq over rows rounded up to 128 and head sizes to 32, an fp32 row sum, with grouped queries dk and dv
        for every query head, and a copy of an output that lies heads first (attention_backward.cu). Values of smaller heads
        are padded, and the output is cropped (transformers integrations/flash_attention.py). Without sdpa the output is a view, which
        the output projection copies; of a layer in pieces each piece by itself, and backward its whole gradient.

        Several samples in a row (flash-attn's mha_varlen_fwd and mha_varlen_bwd): rows are not rounded up, but there are 128 more for
        each sample. Uncounted: where samples begin, 4 bytes each, and what transformers works that out with.
        """
        tape, a, window = w.tape, w.model.attention, kind.window
        narrow = a.v_head_dim != a.head_dim
        if narrow:
            padded = tape.new("V, padded", f"{w.t} H e", v.dtype)
            v = tape.op("pad V", [v], padded, grads=((v, tape.grad(v)),))
        out = tape.new("attention mixed", "b H s e" if heads_first(q) else f"{w.t} H e", q.dtype)
        rows = tape.new("log-sum-exp", f"{w.t} H", "float32")
        rounded = flash_head_size(a.head_dim)
        sinks = (w.weight("sinks", a.heads, kinds=(WeightKind.ATTENTION,), name=""),) if a.sinks else ()
        samples = w.numerics.samples
        rows_shape = w.rounded_rows if samples == 1 else w.t
        heads = "H" if w.heads_here == a.heads else str(w.heads_here)  # whose rows are rounded up
        temps = [
            tape.new("dQ accumulator", f"{rows_shape} {heads} {rounded}", "float32"),
            tape.new("row sums of dO * O", f"{rows_shape} {heads}", "float32"),
        ]
        if samples > 1:
            between = f"{FLASH_ROWS * samples} {heads} {rounded + 1}"
            temps.append(tape.new("rows between samples of both", between, "float32"))
        if a.kv_heads != a.heads:
            temps += [tape.new(f"d{x} for every query head", f"{w.t} H e", q.dtype) for x in "KV"]
        stays_view = w.in_chunks and w.numerics.attention == self.name
        by_rank = w.numerics.ranks > 1 and w.numerics.several_rows  # so the gradient lies, a row's tokens not together
        copied: tuple[str, ...] = ("attention mixed",) if heads_first(q) else ()
        if by_rank or (heads_first(q) and stays_view and not narrow):
            copied += ("grad of attention mixed",)
        temps += [tape.new(f"{name}, tokens first", f"{w.t} H e", q.dtype) for name in copied]
        tape.op(
            "flash attention",
            [q, k, v],
            out,
            rows,
            keeps=(q, k, v, out, rows),
            grads=tuple((x, tape.grad(x)) for x in (q, k, v)),
            for_gradients=ForGradients(all=True),
            back_temps=tuple(temps),
            flops=w.attention_flops(window),
            weights=sinks,
        )
        if not narrow:
            return out if stays_view else tokens_first(w, out)
        shape = f"{w.t} H ev"
        cropped = tape.new("attention mixed, cropped", shape, q.dtype, out if stays_view else None)
        return tape.op("crop", [out], cropped, grads=((out, tape.grad(out)),))

    def ring_temps(self, w: Writer, mixed: Tensor, halved: str, by_head: bool) -> tuple[Tensor, ...]:
        """As above; rows of half of the queries are taken for half of the rows, and what rounding may add is counted in full."""
        a, tape = w.model.attention, w.tape
        rounded = flash_head_size(a.head_dim)
        queries, keys = (2 if halved == "queries" else 1), (2 if halved == "keys" else 1)
        temps = [
            tape.new("dQ accumulator and row sums of a block", f"b r {a.heads * (rounded + 1) * 4 // queries}", "uint8")
        ]
        if queries > 1:
            temps.append(
                tape.new(
                    "rows that its half is rounded up by", f"b {FLASH_ROWS // 2 * a.heads * (rounded + 1)}", "float32"
                )
            )
        copies = by_head + (queries > 1 and w.numerics.several_rows)
        temps += [
            tape.new("output or gradient of a block, tokens first", f"{w.t} {w.width(mixed) // queries}", mixed.dtype)
        ] * copies
        if a.kv_heads != a.heads:
            temps.append(tape.new("dK and dV of every query head", f"{w.t} {2 * w.width(mixed) // keys}", mixed.dtype))
        return tuple(temps)
