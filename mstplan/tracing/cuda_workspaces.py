"""What kernels of CUDA take beside their results where a dispatch mode sees the operation and its sizes.

| operation | takes | source |
|---|---|---|
| gradient of an embedding | token ids sorted, and rows of equal ids added up by tens in fp32 | mstplan/step/workspaces.py, SortedLookups |
| sum or mean of rows | parts of the sum, added up through memory | the same, SumOverTokens |
| product that adds a bias | cuBLASLt's workspace, for good: by its name a trace counts it | mstplan/step/cuda.py, CUBLASLT_WORKSPACE |
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..step.workspaces import SortedLookups, SumOverTokens
from .recorder import Recorder, of_dtensors
from .trace import BIAS_PRODUCT, PARTS_OF_SUM, SORTED_IDS, SUMS_OF_IDS

_aten = torch.ops.aten
SUMS = {_aten.sum.dim_IntList, _aten.mean.dim}


class KernelWorkspaces(TorchDispatchMode):
    """Watcher that sees, within its context, what kernels of a GPU would allocate beside their results; entered after `recorder`'s."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if of_dtensors(types):
            return NotImplemented  # it comes again for the shard that is here
        if func is _aten.embedding_dense_backward.default:
            return self._embedding_gradient(func, args)
        if func is _aten.addmm.default and args[0].dim() == 1:
            with self.recorder.purpose(BIAS_PRODUCT, None):
                return func(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func in SUMS and (kernel := _sum_of_rows(args[0], args[1])) is not None:
            self._allocate(PARTS_OF_SUM, kernel.bytes(1), kernel.semaphores)
        return out

    def _embedding_gradient(self, func: Any, args: Sequence[Any]) -> torch.Tensor:
        grad, ids, rows, *_ = args
        sizes = [number * each for number, each in SortedLookups(rows, grad.shape[-1]).tensors(ids.numel())]
        before = self._allocate(SORTED_IDS, *sizes[:2])
        out: torch.Tensor = func(*args)
        self._allocate(SUMS_OF_IDS, *sizes[2:])
        del before
        return out

    def _allocate(self, purpose: str, *sizes: int) -> list[torch.Tensor]:
        with self.recorder.purpose(purpose):
            return [torch.empty(size, dtype=torch.uint8) for size in sizes if size]


def _sum_of_rows(x: torch.Tensor, dims: Sequence[int] | None) -> SumOverTokens | None:
    """The kernel that adds up an operand over these dimensions; None where it makes no parts: of all numbers, or along the last dimension
    that has several."""
    reduced = {dim % x.dim() for dim in dims or range(x.dim())}
    last = max((n for n, size in enumerate(x.shape) if size > 1), default=0)
    if last in reduced or not x.is_floating_point() or x.itemsize > 4:
        return None
    rows = prod(x.shape[n] for n in reduced)
    kernel = SumOverTokens(x.numel() // rows, rows)
    return kernel if kernel.parts(1) else None
