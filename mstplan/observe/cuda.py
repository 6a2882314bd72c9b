"""What a CUDA card does where fake tensors on the CPU would do something else. `as_on_cuda` puts all of it in place, but for
what mstplan's own part of the step does otherwise (`fake_runtime.py`).

| on the card | source |
|---|---|
| attention by FlashAttention-2, its row statistics and workspace | from source: aten native/transformers/cuda/flash_attn/flash_api.cpp, mha_fwd and mha_bwd |
| with a mask, or head sizes not for that, the memory-efficient kernel | from source: aten transformers/cuda/attention.cu, attention_backward.cu |
| its sums and workspace | mstplan/plan/cuda.py |
| a mask as a bias, padded to rows of 8 | from source: aten transformers/attention.cpp, convert_boolean_attn_mask and preprocess_mask |
| which kernel scaled_dot_product_attention takes | from source: aten transformers/cuda/sdp_utils.cpp; cuDNN's, first on Hopper from torch 2.11, is left out |
| layer norm keeps its row statistics in fp32 | from source: aten native/cuda/layer_norm_kernel.cu, layer_norm_cuda |
| dropout keeps a mask of one byte a number | from source: aten native/Dropout.cpp, native_dropout |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..plan.cuda import efficient_accumulates, efficient_workspace, flash_head_size, flash_rows
from .fake_runtime import SIXTEEN_BIT
from .patches import (
    ATTENTION,
    BIDIRECTIONAL_MASK,
    CAUSAL_MASK,
    DROPOUT,
    GROUPED_PRODUCTS,
    LAYER_NORM,
    PACKED_SEQUENCES,
    Make,
    Target,
    patched,
)
from .recorder import Recorder
from .recording import Category

FLASH = "mstplan_fused"  # transformers looks for a library behind any name with "flash" in it


class _Flash(torch.autograd.Function):
    """q (b, H, s, e), k and v (b, G, s, e) -> (b, H, s, e); allocates what FlashAttention-2 does, computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, recorder: Recorder) -> torch.Tensor:
        batch, heads, tokens, _ = q.shape
        out = q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
        with recorder.purpose("flash: log-sum-exp"):
            log_sum_exp = q.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        ctx.recorder = recorder
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, *_ = ctx.saved_tensors
        batch, heads, tokens, size = q.shape
        made = tuple(torch.empty_like(x) for x in (q, k, v))
        with ctx.recorder.purpose("flash: row sums of dO * O"):
            workspace = [q.new_empty(batch, heads, flash_rows(tokens), dtype=torch.float32)]
        with ctx.recorder.purpose("flash: dQ accumulator"):
            workspace.append(q.new_empty(batch, flash_rows(tokens), heads, flash_head_size(size), dtype=torch.float32))
        if k.shape[1] != heads:  # gradients of keys and values are summed over the query heads that share them
            with ctx.recorder.purpose("flash: dK, dV of every query head"):
                workspace += [q.new_empty(batch, k.shape[2], heads, width) for width in (size, v.shape[-1])]
        return (*made, None)


class _Efficient(torch.autograd.Function):
    """The memory-efficient kernel, with a bias (b or 1, 1 or H, s, s) or without."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, recorder: Recorder
    ) -> torch.Tensor:
        batch, heads, tokens, size = q.shape
        out = q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
        if efficient_accumulates(size, v.shape[-1], q.itemsize):
            with recorder.purpose("efficient attention: output accumulator"):
                _accumulator = q.new_empty(batch, tokens, heads, v.shape[-1], dtype=torch.float32)
        with recorder.purpose("efficient attention: log-sum-exp"):
            log_sum_exp = q.new_empty(batch, heads, -(-tokens // 32) * 32, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sum_exp, *([bias] if bias is not None else []))
        ctx.recorder = recorder
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, *_ = ctx.saved_tensors
        batch, heads, tokens, size = q.shape
        made = tuple(torch.empty_like(x) for x in (q, k, v))
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
        return (*made, None, None)


class _Dropout(torch.autograd.Function):
    """CUDA's fused dropout, which keeps a mask of one byte a number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (_mask,) = ctx.saved_tensors
        return torch.empty_like(grads[0])


class _LayerNorm(torch.autograd.Function):
    """CUDA's layer norm of 16-bit rows, whose mean and deviation are fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        ctx.save_for_backward(x, weight, *(x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) for _ in range(2)))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight, *_ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _attention(plain: Callable[..., torch.Tensor], recorder: Recorder) -> Callable[..., torch.Tensor]:
    """scaled_dot_product_attention as CUDA chooses its kernel."""

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        q, k, v = _cast(query, key, value)
        size, same = q.shape[-1], q.shape[-1] == k.shape[-1] == v.shape[-1]
        shared = k.shape[1] != q.shape[1]
        if attn_mask is None and q.dtype in SIXTEEN_BIT and same and size <= 256:
            return _Flash.apply(q, k, v, recorder)
        if shared:
            with sdpa_kernel(SDPBackend.MATH):
                return plain(
                    q, k, v, attn_mask, dropout_p, is_causal and attn_mask is None, scale=scale, enable_gqa=True
                )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            with recorder.purpose("attention bias", Category.ATTENTION):
                attn_mask = _padded(torch.empty_like(attn_mask, dtype=q.dtype))
        return _Efficient.apply(q, k, v, attn_mask, recorder)

    return attention


def _padded(bias: torch.Tensor) -> torch.Tensor:
    """The same with rows that begin at multiples of 8 numbers."""
    tokens = bias.shape[-1]
    return F.pad(bias, (0, 8 - tokens % 8))[..., :tokens] if tokens % 8 else bias


def _cast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As autocast does for scaled_dot_product_attention."""
    return tuple(x.to(torch.bfloat16) for x in tensors) if torch.is_autocast_enabled("cpu") else tensors


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    if not training or p == 0:
        return x
    out: torch.Tensor = _Dropout.apply(x)
    return out


def _layer_norm(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        x = x.float()  # as autocast does on a card
    if x.dtype not in SIXTEEN_BIT or weight is None or bias is None or len(shape) != 1:
        return torch.layer_norm(x, shape, weight, bias, eps)
    out: torch.Tensor = _LayerNorm.apply(x, weight, bias)
    return out


def _fused(
    _module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: object, **_: object
) -> tuple[torch.Tensor, None]:
    width = v.shape[-1]
    if width != q.shape[-1]:  # as transformers does for FlashAttention (integrations/flash_attention.py)
        v = F.pad(v, (0, q.shape[-1] - width))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)[..., :width], None


ALL_ATTENTION_FUNCTIONS.register(FLASH, _fused)
ALL_MASK_ATTENTION_FUNCTIONS.register(FLASH, lambda *_args, **_kwargs: None)


@contextmanager
def as_on_cuda(recorder: Recorder) -> Iterator[None]:
    """Within the context a step on fake CPU tensors, seen by `recorder`, allocates what it would on a card. Raises VersionError
    where torch or transformers has no place for that."""
    kernels: dict[Target, Make] = {
        ATTENTION: lambda plain: _attention(plain, recorder),
        DROPOUT: lambda _plain: _dropout,
        LAYER_NORM: lambda _plain: _layer_norm,
    }
    with patched(kernels), on_fake_tensors():
        yield


@contextmanager
def on_fake_tensors() -> Iterator[None]:
    """Within the context what needs values of tensors goes on as if it had seen usual ones. Raises VersionError as above."""
    without_values: dict[Target, Make] = {
        CAUSAL_MASK: _nothing_hidden,
        BIDIRECTIONAL_MASK: _nothing_hidden,
        PACKED_SEQUENCES: _not_packed,
        GROUPED_PRODUCTS: _grouped,
    }
    with patched(without_values):
        yield


def _nothing_hidden(skips_mask: Callable[..., bool]) -> Callable[..., bool]:
    """A padding mask of ones, which some models make for themselves, is none."""
    return lambda _padding_mask, *args, **kwargs: skips_mask(None, *args, **kwargs)


def _not_packed(packed: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], None]:
    """No sequence is several, whatever position ids say."""

    def not_packed(position_ids: torch.Tensor) -> None:
        packed(position_ids)  # for what it allocates

    return not_packed


def _grouped(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Products of experts' matrices, which kernels make in every dtype, but torch's rules for fake tensors in bf16 only."""

    def grouped(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if a.dtype not in (torch.float32, torch.float16):
            return plain(a, b, *args, **kwargs)
        return plain(a.bfloat16(), b.bfloat16(), *args, **kwargs).to(a.dtype)

    return grouped
