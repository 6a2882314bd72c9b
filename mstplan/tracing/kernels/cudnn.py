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

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, recorder: Recorder) -> tuple[torch.Tensor, ...]:
        with recorder.purpose("cuDNN attention: seed and offset"):
            seeds = [q.new_empty((), dtype=torch.int64) for _ in range(2)]
        out = laid_out_like(q, v.shape[-1])
        with recorder.purpose("cuDNN attention: log-sum-exp"):
            log_sum_exp = q.new_empty(*q.shape[:-1], 1, dtype=torch.float32)
        with recorder.purpose("cuDNN attention: workspace"):
            _workspace = q.new_empty(CUDNN_SPARE, dtype=torch.uint8)
        return out, log_sum_exp, *seeds

    def run_back(
        self,
        _grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        _out: torch.Tensor,
        recorder: Recorder,
        samples: int = 1,
    ) -> tuple[torch.Tensor, ...]:
        batch, heads, tokens, size = q.shape
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        with recorder.purpose("cuDNN attention: sums of dQ, and of dK and dV of every query head"):
            of_queries = cudnn_row_sums(heads, size, v.shape[-1], grouped=False)
            of_keys = cudnn_row_sums(heads, size, v.shape[-1], k.shape[1] != heads) - of_queries
            sums = batch * (tokens * of_queries + k.shape[2] * of_keys)
            _workspace = q.new_empty(sums + CUDNN_SPARE, dtype=torch.uint8)
        return gradients


class _Cudnn(torch.autograd.Function):
    """q (b, H, s, e), k and v (b, G, s, e), a bias (b or 1, 1 or H, s, s) -> (b, H, s, e); computes nothing."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, recorder: Recorder
    ) -> torch.Tensor:
        out, log_sum_exp, *seeds = recorder.kernel_results(lambda: STAND_IN.run(q, k, v, recorder))
        ctx.save_for_backward(q, k, v, out, log_sum_exp, *seeds, *([bias] if bias is not None else []))
        ctx.recorder = recorder
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, *_ = ctx.saved_tensors
        return (*STAND_IN.run_back(grads[0], q, k, v, out, ctx.recorder), None, None)


STAND_IN = Cudnn()
