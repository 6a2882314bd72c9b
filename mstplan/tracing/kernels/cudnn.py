"""cuDNN's attention (from source: aten native/cudnn/MHA.cpp, run_cudnn_SDP_fprop and run_cudnn_SDP_bprop; its workspaces measured)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend

from ...step.cuda import CUDNN_SPARE, cudnn_row_sums
from ..recorder import Recorder
from .base import Call, StandIn, bias_of, laid_out_like


class Cudnn(StandIn):
    name = "cudnn"
    implementation = real = "sdpa"
    backend = SDPBackend.CUDNN_ATTENTION

    def attend(self, call: Call, recorder: Recorder) -> torch.Tensor:
        bias = bias_of(call.mask, call.q.dtype, recorder) if call.mask is not None else None
        out: torch.Tensor = _Cudnn.apply(call.q, call.k, call.v, bias, recorder)
        return out


class _Cudnn(torch.autograd.Function):
    """q (b, H, s, e), k and v (b, G, s, e), a bias (b or 1, 1 or H, s, s) -> (b, H, s, e); computes nothing."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, recorder: Recorder
    ) -> torch.Tensor:
        def make() -> tuple[torch.Tensor, ...]:
            with recorder.purpose("cuDNN attention: seed and offset"):
                seeds = [q.new_empty((), dtype=torch.int64) for _ in range(2)]
            out = laid_out_like(q, v.shape[-1])
            with recorder.purpose("cuDNN attention: log-sum-exp"):
                log_sum_exp = q.new_empty(*q.shape[:-1], 1, dtype=torch.float32)
            with recorder.purpose("cuDNN attention: workspace"):
                _workspace = q.new_empty(CUDNN_SPARE, dtype=torch.uint8)
            return out, log_sum_exp, *seeds

        out, log_sum_exp, *seeds = recorder.kernel_results(make)
        ctx.save_for_backward(q, k, v, out, log_sum_exp, *seeds, *([bias] if bias is not None else []))
        ctx.recorder = recorder
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, *_ = ctx.saved_tensors
        batch, heads, tokens, size = q.shape
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        with ctx.recorder.purpose("cuDNN attention: sums of dQ, and of dK and dV of every query head"):
            sums = batch * tokens * cudnn_row_sums(heads, size, v.shape[-1], k.shape[1] != heads)
            _workspace = q.new_empty(sums + CUDNN_SPARE, dtype=torch.uint8)
        return (*gradients, None, None)
