"""FlashAttention-2 (from source: aten native/transformers/cuda/flash_attn/flash_api.cpp, mha_fwd and mha_bwd)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...step.cuda import FLASH_ROWS, flash_head_size, flash_rows
from ...step.recipe import Recipe
from ..recorder import Recorder
from .base import Call, StandIn, laid_out_like

FLASH = "mstplan_fused"  # transformers looks for a library behind any name with "flash" in it


class Flash(StandIn):
    name = "flash"
    implementation = FLASH
    real = "flash_attention_2"

    def implementation_for(self, recipe: Recipe, kind: Any, on: str) -> str:
        there = on == "cuda" and not recipe.runs_in_fp32 and getattr(kind, "_supports_flash_attn", False)
        return FLASH if there else "eager"

    def attend(self, call: Call, recorder: Recorder) -> torch.Tensor:
        out: torch.Tensor = _Flash.apply(call.q, call.k, call.v, recorder, call.samples)
        return out

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, recorder: Recorder) -> tuple[torch.Tensor, ...]:
        out = laid_out_like(q, v.shape[-1])
        with recorder.purpose("flash: log-sum-exp"):
            log_sum_exp = q.new_empty(*q.shape[:-1], dtype=torch.float32)
        with recorder.purpose("flash: seed and offset"):
            return out, log_sum_exp, q.new_empty(2, dtype=torch.int64), q.new_empty((), dtype=torch.int64)

    def run_back(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        recorder: Recorder,
        samples: int = 1,
    ) -> tuple[torch.Tensor, ...]:
        batch, heads, tokens, size = q.shape
        with recorder.purpose("flash: tokens first"):  # (attention_backward.cu, _flash_attention_backward)
            _copies = [x.transpose(1, 2).contiguous() for x in (grad, out)]
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        rows = flash_rows(tokens) if samples == 1 else tokens + FLASH_ROWS * samples
        with recorder.purpose("flash: row sums of dO * O"):
            workspace = [q.new_empty(batch, heads, rows, dtype=torch.float32)]
        with recorder.purpose("flash: dQ accumulator"):
            workspace.append(q.new_empty(batch, rows, heads, flash_head_size(size), dtype=torch.float32))
        if k.shape[1] != heads:  # gradients of keys and values are summed over the query heads that share them
            with recorder.purpose("flash: dK, dV of every query head"):
                workspace += [q.new_empty(batch, k.shape[2], heads, width) for width in (size, v.shape[-1])]
        return gradients


class _Flash(torch.autograd.Function):
    """q (b, H, s, e), k and v (b, G, s, e) -> (b, H, s, e); allocates what FlashAttention-2 does, computes nothing."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, recorder: Recorder, samples: int
    ) -> torch.Tensor:
        out, log_sum_exp, *seeds = recorder.kernel_results(lambda: STAND_IN.run(q, k, v, recorder))
        ctx.save_for_backward(q, k, v, out, log_sum_exp, *seeds)
        ctx.recorder, ctx.samples = recorder, samples
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, *_ = ctx.saved_tensors
        return (*STAND_IN.run_back(grads[0], q, k, v, out, ctx.recorder, ctx.samples), None, None)


STAND_IN = Flash()


def _fused(
    _module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: object, **_: object
) -> tuple[torch.Tensor, None]:
    width = v.shape[-1]
    if width != q.shape[-1]:  # as transformers does for FlashAttention (integrations/flash_attention.py)
        v = F.pad(v, (0, q.shape[-1] - width))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)[..., :width], None


ALL_ATTENTION_FUNCTIONS.register(FLASH, _fused)
ALL_MASK_ATTENTION_FUNCTIONS.register(FLASH, lambda *_args, **_kwargs: None)
