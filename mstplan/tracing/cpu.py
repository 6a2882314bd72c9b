"""What kernels of a CPU allocate for themselves: no dispatcher sees it, and fake tensors have no need of it.

| kernel | allocates | source |
|---|---|---|
| attention (scaled_dot_product_attention's flash kernel for CPUs) | for every thread, a block of scores and of what is summed; in 16 bits the scores once more | from source: aten native/cpu/FlashAttentionKernel.cpp, `buf` and `buf_reduced`; measured |
| its backward | for every thread, two blocks of scores; in 16 bits once more | the same; measured |
| element by element, over tensors of several dtypes | copies in the common dtype (CUDA converts as it reads) | from source: aten TensorIterator.cpp, compute_types, promote_inputs_to_common_dtype_; measured |
| sums and means in another dtype | a copy in that dtype (CUDA does not, from 16 bits to fp32) | from source: aten native/ReduceOpsUtils.h, make_reduction_from_out_ty; measured |

Not here: oneDNN's scratch memory for products in 16 bits, whose size depends on the code that it makes for the CPU at hand.
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .recorder import Recorder

_aten = torch.ops.aten
ELEMENT_BY_ELEMENT = {
    _aten.add,
    _aten.sub,
    _aten.mul,
    _aten.div,
    _aten.pow,
    _aten.where,
    _aten.maximum,
    _aten.minimum,
    _aten.lerp,
    _aten.addcmul,
    _aten.addcdiv,
    _aten.add_,
    _aten.sub_,
    _aten.mul_,
    _aten.div_,
    _aten.eq,
    _aten.ne,
    _aten.lt,
    _aten.le,
    _aten.gt,
    _aten.ge,
}
REDUCTIONS = {_aten.sum, _aten.mean}
ATTENTION, ATTENTION_BACKWARD = (
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
)
KEYS_AT_ONCE = 512
"""Keys to a block of scores: kv_split_size of every kernel."""


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Let torch seem to have so many threads, each with buffers of its own. None: as it is."""
    own_count = torch.get_num_threads()
    torch.set_num_threads(count or own_count)
    try:
        yield
    finally:
        torch.set_num_threads(own_count)


class KernelBuffers(TorchDispatchMode):
    """Watcher that sees, within its context, what kernels would allocate beside their results; entered after `recorder`'s."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func.overloadpacket
        buffers = [self._copy(kind, x, dtype) for x, dtype in casts(kind, args)]
        out = func(*args, **(kwargs or {}))
        if kind in REDUCTIONS and args[0].dtype != out.dtype:
            buffers.append(self._copy(kind, args[0], out.dtype))
        elif kind in (ATTENTION, ATTENTION_BACKWARD):
            backward = kind is ATTENTION_BACKWARD
            query, key = args[1:3] if backward else args[:2]
            with self.recorder.purpose("flash: a block of scores for every thread"):
                buffers += [torch.empty(n, dtype=torch.uint8) for n in attention_buffers(query, key, backward) if n]
        return out

    def _copy(self, kind: Any, operand: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        with self.recorder.purpose(f"{kind.__name__}: operand in {str(dtype).removeprefix('torch.')}"):
            return torch.empty(operand.shape, dtype=dtype)


def casts(kind: Any, args: Sequence[Any]) -> list[tuple[torch.Tensor, torch.dtype]]:
    """The operands that a kernel copies, and the dtype of the copies. A number has the dtype of the tensor beside it, if that has
    such numbers: a mask beside a whole number is copied."""
    if kind not in ELEMENT_BY_ELEMENT:
        return []
    operands = [x for x in args[1 if kind is _aten.where else 0 :] if isinstance(x, torch.Tensor) and x.dim()]
    if not operands:
        return []
    common = reduce(torch.promote_types, [x.dtype for x in operands])
    if common == torch.bool and any(type(x) is int for x in args):
        common = torch.int64
    return [(x, common) for x in operands if x.dtype != common]


def attention_buffers(query: torch.Tensor, key: torch.Tensor, backward: bool) -> tuple[int, int]:
    """Bytes of the attention kernel's two buffers, in fp32 and in 16 bits, for query (b, H, s, e) and key (b, G, t, e)."""
    tokens, size = query.shape[-2:]
    rows = min(tokens, 256 if tokens >= 768 else 64 if tokens >= 192 else 32)
    scores = rows * min(key.shape[-2], KEYS_AT_ONCE)
    threads, bits16 = torch.get_num_threads(), query.itemsize == 2
    if backward:
        return threads * 2 * scores * 4, threads * 2 * scores * 2 * bits16
    return threads * (scores + 2 * rows + rows * size) * 4, threads * scores * 2 * bits16
