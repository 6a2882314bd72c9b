"""cuDNN's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...spec.platform import Platform
from ..cuda import cudnn_row_sums
from ..tape import ForGradients
from .base import AttentionCall, Kernel, mask_as_bias, output, repeated, tokens_first

if TYPE_CHECKING:
    from ...spec.model import LayerKind
    from ..layers import Writer
    from ..tape import Tensor


class Cudnn(Kernel):
    name = "cudnn"
    label = "cuDNN"
    within_sdpa = True
    sixteen_bit_only = True
    in_rings = True

    def is_asked(self, platform: Platform) -> bool:
        return platform.prefers_cudnn

    def serves(self, asked: AttentionCall) -> bool:
        """from source: sdp_utils.cpp, check_cudnn_tensor_shapes; from torch 2.12 on check_cudnn_dropout."""
        sizes, platform = (asked.head_dim, asked.v_head_dim), asked.platform
        limit = 256 if platform.capability == (9, 0) else 128
        if platform.capability is not None and platform.capability[0] == 10 and sizes == (192, 128):
            limit = 192
        whole_sixteenths = (asked.dropout * 16).is_integer() or platform.torch < (2, 12)
        return asked.dtype != "float32" and max(sizes) <= limit and not any(n % 8 for n in sizes) and whole_sixteenths

    def lay_out(self, w: Writer, q: Tensor, k: Tensor, v: Tensor, kind: LayerKind, masked: bool) -> Tensor:
        """cuDNN's attention (aten native/cudnn/MHA.cpp, run_cudnn_SDP_fprop and run_cudnn_SDP_bprop).

        Keeps q, k, v, the output, laid out as q is, and one fp32 log-sum-exp a row, and a mask as a bias. Backward makes dq, dk,
        dv, and takes one workspace, in which it sums. Uncounted: a seed and an offset of 8 bytes, and cuda.CUDNN_SPARE.
        """
        tape, a = w.tape, w.model.attention
        grouped = a.kv_heads != a.heads and not masked
        bias = (mask_as_bias(w, q.dtype),) if masked else ()
        if not grouped:
            k, v = repeated(w, k), repeated(w, v)
        out, rows = output(w, q), tape.new("log-sum-exp", f"{w.t} H", "float32")
        row_sums = cudnn_row_sums(a.heads, a.head_dim, a.v_head_dim, grouped)
        name = "cuDNN's sums of dQ" + (", dK and dV" if grouped else "")
        tape.op(
            "masked attention" if masked else "cuDNN's attention",
            [q, k, v, *bias],
            out,
            rows,
            keeps=(q, k, v, out, rows, *bias),
            grads=tuple((x, tape.grad(x)) for x in (q, k, v)),
            for_gradients=ForGradients(all=True),
            back_temps=(tape.new(name, f"{w.t} {row_sums}", "uint8"),),
            flops=w.attention_flops(is_masked=masked),
        )
        return tokens_first(w, out)

    def ring_temps(self, w: Writer, mixed: Tensor, halved: str, by_head: bool) -> tuple[Tensor, ...]:
        """One workspace: sums of dQ for the block's queries, and with grouped queries dK and dV of every query head for its keys."""
        a = w.model.attention
        whole = cudnn_row_sums(a.heads, a.head_dim, a.v_head_dim, a.kv_heads != a.heads)
        of_queries = cudnn_row_sums(a.heads, a.head_dim, a.v_head_dim, grouped=False)
        of_keys = whole - of_queries
        row_sums = of_queries // (2 if halved == "queries" else 1) + of_keys // (2 if halved == "keys" else 1)
        return (w.tape.new("cuDNN's sums for a block", f"{w.t} {row_sums}", "uint8"),)
