"""sdpa's math kernel, operation by operation (from source: aten transformers/attention.cpp, _scaled_dot_product_attention_math and
_safe_softmax). torch's own would add the bias out of place, as it does to tensors that are no plain ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..recorder import Recorder
from .base import SIXTEEN_BIT, Call, StandIn, bias_of


class Math(StandIn):
    name = "math"
    implementation = real = "sdpa"

    def attend(self, call: Call, recorder: Recorder) -> torch.Tensor:
        scale = (call.scale or call.q.shape[-1] ** -0.5) ** 0.5
        bias = bias_of(call.mask, call.q.dtype, recorder) if call.mask is not None else None
        queries, k, v = (x.float() if x.dtype in SIXTEEN_BIT else x for x in (call.q, call.k, call.v))
        q = queries * scale
        if call.mask is None and call.is_causal:
            allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
            bias = bias_of(allowed, q.dtype, recorder)
            del allowed
        if call.enable_gqa and k.shape[1] != q.shape[1]:  # else the product broadcasts them
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = q @ (k.transpose(-2, -1) * scale)
        if bias is not None:
            scores = _AddInPlace.apply(scores, bias)
        weights = _SafeSoftmax.apply(scores, recorder)
        del scores
        mixed = F.dropout(weights, call.dropout) @ v if call.dropout else weights @ v
        out = mixed.to(call.q.dtype)
        _second_result = weights.to(call.q.dtype)
        return out


class _AddInPlace(torch.autograd.Function):
    """scores += bias."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, _bias: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(scores)
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return grads[0], None


class _SafeSoftmax(torch.autograd.Function):
    """Softmax that knows rows of -inf alone; keeps its output."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, recorder: Recorder) -> torch.Tensor:
        weights = torch.empty_like(scores)
        with recorder.purpose("softmax: scores at -inf"):
            masked = torch.empty_like(scores, dtype=torch.bool)
            _rows = masked.new_empty(*scores.shape[:-1], 1)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (weights,) = ctx.saved_tensors
        return torch._softmax_backward_data(grads[0], weights, -1, weights.dtype), None
