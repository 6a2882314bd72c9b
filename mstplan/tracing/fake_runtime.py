"""What mstplan's own part of a step runs on while it is traced: see `mstplan/train/runtime.py`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..spec.platform import AMPERE, Platform
from ..train.locate import find_parts
from ..train.ring import RingKernel
from ..train.runtime import Runtime
from .recorder import Recorder
from .ring import ring_stand_in
from .saved_tensors import HostHooks

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
FEW_CHUNKS = 3
"""The first, the second, which those between repeat, and the last."""


class FakeRuntime(Runtime):
    """On fake tensors, whose random numbers need no seed. most_chunks: of each sequence (2 or more), the first ones and the
    last; None: all."""

    def __init__(self, most_chunks: int | None = None):
        self.most_chunks = most_chunks

    def replicate(self, model: PreTrainedModel) -> None:
        """Its buckets have no room on fake tensors: they are counted (`trace.py`)."""

    def draw_seed(self) -> None:
        return None

    def free_on_host(self) -> None:
        return None

    def chunk_slices(self, tokens: int, rows: int) -> Iterator[tuple[int, slice]]:
        """(number, place) of each chunk that is run."""
        if self.most_chunks is None or tokens <= self.most_chunks * rows:
            yield from super().chunk_slices(tokens, rows)
            return
        last = -(-tokens // rows) - 1
        yield from ((n, slice(n * rows, (n + 1) * rows)) for n in range(self.most_chunks - 1))
        yield last, slice(last * rows, tokens)


class FakeCardRuntime(FakeRuntime):
    """The same, allocating what a card does, seen by `recorder`."""

    def __init__(self, recorder: Recorder, most_chunks: int | None = None, platform: Platform = AMPERE):
        super().__init__(most_chunks)
        self.recorder, self.platform = recorder, platform

    def adds_to_fp32(self, device_type: str) -> bool:
        return True

    def add_product(self, total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """As on a card, where a product that adds to `total` allocates nothing (aten native/cuda/Blas.cpp). Not run in 16 bits: torch
        2.11 has no rule for it on fake tensors."""
        if total is not None and a.dtype in SIXTEEN_BIT:
            return total
        return super().add_product(total, a, b)

    def offload_saved(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        return HostHooks(model, find_parts(model).head, self.recorder).hooks()

    def ring_kernel(self, device_type: str) -> RingKernel:
        return ring_stand_in(self.recorder, self.platform)

    def keep_attention(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Stand-ins of kernels are no operations that torch's own contexts would see."""
        results: deque[tuple[torch.Tensor, ...]] = deque()
        return self.recorder.select(results, again=False), self.recorder.select(results, again=True)

    def empty_on_host(self, like: torch.Tensor, pinned: bool, sizes: Sequence[int] | None = None) -> torch.Tensor:
        return self.recorder.empty_on_host(like, pinned, sizes)
