"""What CUDA's kernels take beside the tensors that a model's code names. Each number has its source; `from source` means read in
PyTorch's code, `measured` on a card."""

from __future__ import annotations

from typing import NamedTuple

CUBLASLT_WORKSPACE = 1 << 20
"""Bytes that cuBLASLt holds for a handle, from the first product that adds a bias on. from source: aten native/cuda/Blas.cpp,
addmm_out_cuda_impl, takes it for a bias of one dimension; aten cuda/CublasHandlePool.cpp, getCUDABlasLtWorkspaceSize. measured: 1 MiB
in steps of which no layer is run again in backward, else 2 MiB: autograd's thread has a handle of its own."""

FLASH_ROWS = 128
"""from source: mha_bwd rounds the rows of its workspace up to this (aten transformers/cuda/flash_attn/flash_api.cpp)."""


def flash_rows(tokens: int) -> int:
    """Rows of FlashAttention-2's backward workspace for a sequence."""
    return -(-tokens // FLASH_ROWS) * FLASH_ROWS


def flash_head_size(size: int) -> int:
    """Head size of that workspace. from source: mha_bwd rounds up to 32, beyond 192 to 256."""
    return -(-size // 32) * 32 if size <= 192 else 256


def pinned_bytes(size: int) -> int:
    """Bytes of pinned CPU RAM that torch takes for a tensor of so many. from source: aten core/CachingHostAllocator.h, allocate, rounds up
    to a power of two; measured."""
    return 1 << (size - 1).bit_length() if size else 0


CUDNN_SPARE = 256
"""measured: bytes of cuDNN's workspace in forward, and in backward those beyond its sums."""


def cudnn_row_sums(heads: int, size: int, v_size: int, grouped: bool) -> int:
    """Bytes of one row, in all heads, of what cuDNN's attention sums in its backward: dQ in fp32 and one number, and with grouped
    queries dK and dV of every query head in 16 bits. from source: cudnn-frontend, scaled_dot_product_flash_attention.h; measured."""
    return heads * (4 * size + 4 + (2 * (size + v_size) if grouped else 0))


BIAS_ROWS = 8
"""from source: the memory-efficient kernel takes a mask whose rows begin at multiples of so many numbers; one of another length is
copied into one that is padded (aten transformers/attention.cpp, preprocess_mask)."""


class EfficientWorkspace(NamedTuple):
    """What the memory-efficient kernel's backward allocates beside gradients and row sums, in one piece.

    Sums of dQ in fp32, in tiles of `queries` rows, and in 16 bits beyond a head size of 128 those of dK and dV for the blocks of
    `keys` rows that are at work. from source: aten transformers/cuda/mem_eff_attention/kernel_backward.h, workspace_size; the
    blocks of compute capability 8.0 and 9.0 in kernels/cutlassB.h. Bytes.
    """

    queries: int
    keys: int
    tiles: int  # of a block of rows
    of_tile: int
    of_keys: int  # of one block's dK and dV

    @property
    def of_row(self) -> int:
        """Of one query's row in one head, but for rounding rows up to blocks."""
        return -(-self.tiles * self.of_tile // self.queries)

    def blocks_at_work(self, heads: int) -> int:
        """Blocks of keys of each head; heads: of all sequences (attention_backward.cu: about 200 in all)."""
        return max(1, 200 // heads)

    def bytes(self, heads: int, tokens: int) -> int:
        """Of all `heads` of all sequences, each of so many tokens."""
        blocks = min(self.blocks_at_work(heads), -(-tokens // self.keys))
        one = -(-tokens // self.queries) * self.tiles * self.of_tile + blocks * self.of_keys
        return heads * (-(-one // 16) * 16)


def efficient_workspace(size: int, v_size: int, itemsize: int) -> EfficientWorkspace:
    """size, v_size: of a head of queries and keys, and of values. itemsize: bytes of a number."""
    largest = max(size, v_size)
    wide = largest > 64
    queries, keys = 128 if wide else 64, 128 if wide and largest <= 128 and itemsize == 2 else 64
    of_keys = 0
    if itemsize == 2 and largest > 128:
        of_keys = 4 * keys * sum(-(-n // queries) * queries for n in (size, v_size))
    return EfficientWorkspace(queries, keys, -(-size // keys), 4 * queries * keys + 16, of_keys)


def efficient_accumulates(size: int, v_size: int, itemsize: int) -> bool:
    """Whether the memory-efficient kernel's forward sums its output in an fp32 tensor of its own. from source:
    mem_eff_attention/kernel_forward.h, kNeedsOutputAccumulatorBuffer; kernels/cutlassF.h."""
    return itemsize == 2 and max(size, v_size) > 128
