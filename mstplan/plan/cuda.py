"""What CUDA's kernels take beside the tensors that a model's code names. Each number has its source; `from source` means read in
PyTorch's code, `measured` on a card."""

from __future__ import annotations

FLASH_ROWS = 128
"""from source: mha_bwd rounds the rows of its workspace up to this (aten transformers/cuda/flash_attn/flash_api.cpp)."""


def flash_rows(tokens: int) -> int:
    """Rows of FlashAttention-2's backward workspace for a sequence."""
    return -(-tokens // FLASH_ROWS) * FLASH_ROWS


def flash_head_size(size: int) -> int:
    """Head size of that workspace. from source: mha_bwd rounds up to 32, beyond 192 to 256."""
    return -(-size // 32) * 32 if size <= 192 else 256
