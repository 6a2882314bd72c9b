"""The memory-efficient kernel (from source: aten transformers/cuda/attention.cu, attention_backward.cu); a mask as a bias, padded to
rows of 8 (aten transformers/attention.cpp, convert_boolean_attn_mask and preprocess_mask)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from ...step.cuda import efficient_accumulates, efficient_workspace
from ..recorder import Recorder
from ..recording import Category
from .base import SIXTEEN_BIT, Call, StandIn, bias_of


class Efficient(StandIn):
    name = "efficient"
    implementation = real = "sdpa"
    backend = SDPBackend.EFFICIENT_ATTENTION

    def attend(self, call: Call, recorder: Recorder) -> torch.Tensor:
        bias = call.mask
        if bias is not None and bias.dtype == torch.bool:
            bias = bias_of(bias, call.q.dtype, recorder)
            with recorder.purpose("attention bias", Category.ATTENTION):
                bias = _padded(bias)
        out: torch.Tensor = _Efficient.apply(call.q, call.k, call.v, bias, recorder)
        return out


def _padded(bias: torch.Tensor) -> torch.Tensor:
    """The same with rows that begin at multiples of 8 numbers."""
    tokens = bias.shape[-1]
    return F.pad(bias, (0, 8 - tokens % 8))[..., :tokens] if tokens % 8 else bias


class _Efficient(torch.autograd.Function):
    """The memory-efficient kernel, with a bias (b or 1, 1 or H, s, s) or without."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, recorder: Recorder
    ) -> torch.Tensor:
        batch, heads, tokens, size = q.shape

        def make() -> tuple[torch.Tensor, ...]:
            out = q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
            if efficient_accumulates(size, v.shape[-1], q.itemsize):
                with recorder.purpose("efficient attention: output accumulator"):
                    _accumulator = q.new_empty(batch, tokens, heads, v.shape[-1], dtype=torch.float32)
            with recorder.purpose("efficient attention: log-sum-exp"):
                return out, q.new_empty(batch, heads, -(-tokens // 32) * 32, dtype=torch.float32)

        out, log_sum_exp = recorder.kernel_results(make)
        ctx.save_for_backward(q, k, v, out, log_sum_exp, *([bias] if bias is not None else []))
        ctx.recorder = recorder
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, *_ = ctx.saved_tensors
        batch, heads, tokens, size = q.shape
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        with ctx.recorder.purpose("efficient attention: row sums of dO * O"):
            products = (
                None if q.dtype in SIXTEEN_BIT else torch.empty_like(grads[0])
            )  # in 16 bits the kernel needs none
            sums = products.sum(-1) if products is not None else None
            _rows = q.new_empty(batch, heads, tokens, dtype=torch.float32)
            del products, sums
        with ctx.recorder.purpose("efficient attention: dQ accumulator, dK and dV of the blocks at work"):
            workspace = efficient_workspace(size, v.shape[-1], q.itemsize)
            _sums = q.new_empty(workspace.bytes(batch * heads, tokens), dtype=torch.uint8)
        return (*gradients, None, None)
