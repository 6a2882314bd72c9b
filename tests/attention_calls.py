"""151 calls of scaled_dot_product_attention, forward and backward, measured on an H200 with torch 2.11.0+cu130 and cuDNN 9.19:
tests/data/attention. Each says which kernel was asked for (auto: none), its sizes, and every allocation in order."""

from __future__ import annotations

import gzip
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from mstplan.spec.platform import Platform
from mstplan.step.kernels import KERNELS, SDPA
from mstplan.step.kernels.base import AttentionCall, Kernel

H200 = Platform((9, 0), 91900, (2, 11))
SMALL = 1000
"""Bytes up to which are numbers and seeds, which the formula leaves out."""
CUBLAS_BYTES = 33_554_432
"""Of a workspace, which the first product of a thread makes."""


class MeasuredCall:
    def __init__(self, row: dict[str, Any]):
        self.row = row
        self.sizes = tuple(row[name] for name in ("b", "H", "G", "s", "e", "ev"))

    def __repr__(self) -> str:
        return "-".join(
            str(self.row[n]) for n in ("kernel", "b", "H", "G", "s", "e", "dtype", "mask", "drop", "layout")
        )

    @property
    def refused(self) -> bool:
        return "error" in self.row

    @property
    def named(self) -> str:
        """As a recipe's attention names it."""
        kernel: str = self.row["kernel"]
        return SDPA if kernel == "auto" else kernel

    @property
    def asked(self) -> AttentionCall:
        _, heads, kv_heads, _, size, v_size = self.sizes
        row = self.row
        return AttentionCall(row["dtype"], size, v_size, heads != kv_heads, row["mask"] is not None, row["drop"], H200)

    @property
    def kernel(self) -> Kernel:
        if self.named != SDPA:
            return KERNELS[self.named]
        return next(each for each in KERNELS.values() if each.is_asked(H200) and each.serves(self.asked))

    @cached_property
    def allocations(self) -> list[int]:
        """Bytes of what was made, in order."""
        return [bytes_ for action, bytes_, _ in self.row["events"] if action == "alloc"]


def measured_calls() -> list[MeasuredCall]:
    path = Path(__file__).parent / "data" / "attention" / "h200-2026-11-26.json.gz"
    return [MeasuredCall(row) for row in json.loads(gzip.decompress(path.read_bytes()))]
