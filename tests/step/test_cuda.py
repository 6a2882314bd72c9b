"""The memory-efficient kernel's workspace, counted by hand from the kernels that PyTorch dispatches to
(mem_eff_attention/kernels/cutlassB.h, kernel_backward.h: workspace_size; compute capability 8.0 and later)."""

from __future__ import annotations

import pytest

from mstplan.step.cuda import efficient_accumulates, efficient_workspace

KERNELS = [  # head size of q and k, of v, bytes of a number: block of queries, of keys, tiles, bytes of a tile, of a block's dK and dV
    ((64, 64, 2), (64, 64, 1, 64 * 64 * 4 + 16, 0)),
    ((96, 96, 2), (128, 128, 1, 128 * 128 * 4 + 16, 0)),
    ((128, 128, 2), (128, 128, 1, 128 * 128 * 4 + 16, 0)),
    ((192, 128, 2), (128, 64, 3, 128 * 64 * 4 + 16, 64 * (256 + 128) * 4)),  # DeepSeek's
    ((256, 256, 2), (128, 64, 4, 128 * 64 * 4 + 16, 64 * (256 + 256) * 4)),  # Gemma 3's
    ((64, 64, 4), (64, 64, 1, 64 * 64 * 4 + 16, 0)),
    ((128, 128, 4), (128, 64, 2, 128 * 64 * 4 + 16, 0)),
]


@pytest.mark.parametrize(("sizes", "kernel"), KERNELS)
def test_kernels(sizes: tuple[int, int, int], kernel: tuple[int, ...]) -> None:
    assert efficient_workspace(*sizes) == kernel


def test_bytes_of_all_heads() -> None:
    workspace = efficient_workspace(192, 128, 2)
    blocks_of_queries, blocks_of_keys = 32, 200 // 16  # 4,096 tokens; about 200 blocks of keys in all
    one_head = blocks_of_queries * 3 * 32784 + blocks_of_keys * 98304
    assert workspace.bytes(16, 4096) == 16 * one_head == 69_230_592
    assert workspace.bytes(300, 128) == 300 * (3 * 32784 + 98304)  # never fewer than one block of keys a head
    assert workspace.bytes(1, 64) == 3 * 32784 + 98304  # no more of them than there are keys
    assert workspace.of_row == -(-3 * 32784 // 128)


def test_outputs_that_are_summed_in_fp32() -> None:
    cases = {(128, 128, 2): False, (192, 128, 2): True, (256, 256, 2): True, (192, 128, 4): False}
    assert {sizes: efficient_accumulates(*sizes) for sizes in cases} == cases
