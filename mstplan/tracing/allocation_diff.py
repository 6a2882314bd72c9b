"""A traced step's allocations beside those that were really made: what one sequence has and the other has not. No torch.

Both are sequences of sizes, in the order of allocation. They are laid side by side with as few unexplained differences as can
be, explained ones next. A difference is explained by an entry of a list such as `KNOWN_ON_CPU` that names it.

    differences(allocations_of_trace(trace), allocations.sequence(), KNOWN_ON_CPU)    mstplan.measuring.allocations, on the CPU
    differences(allocations_of_trace(trace), allocations_of_history(rows), known, block=MIN_BLOCK)    torch.cuda.memory's history
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

from ..units import MIB
from .trace import Trace

MISSING, EXTRA = "missing", "extra"
_UNEXPLAINED = 10_000  # an explained difference costs 1: no number of them is as bad as one unexplained


class Allocation(NamedTuple):
    bytes: int
    name: str  # what is known of it: operations, or Python's frames, the outermost first
    inside: bool = False  # given back before the operation that made it was over


class KnownBuffer(NamedTuple):
    """A buffer that a kernel makes for itself, which a trace does not predict."""

    name: str
    why: str
    source: str
    pattern: str  # of the allocation's name, a regular expression
    what: str = MISSING  # from the trace, or extra there
    inside: bool = True  # given back before the operation was over; where that is not known, it cannot be asked for

    def explains(self, what: str, allocation: Allocation) -> bool:
        return (
            what == self.what
            and allocation.inside >= self.inside
            and re.search(self.pattern, allocation.name) is not None
        )


class Difference(NamedTuple):
    """what: MISSING from the trace, or EXTRA in it. at: its number in the sequence that has it."""

    what: str
    position: int
    allocation: Allocation
    known: KnownBuffer | None

    def __str__(self) -> str:
        why = f", {self.known.name}" if self.known is not None else ""
        return f"{self.what} {self.allocation.bytes:,} bytes, number {self.position}: {self.allocation.name}{why}"


KNOWN_ON_CPU = (
    KnownBuffer(
        "oneDNN's scratch memory",
        "products of 16-bit matrices run in code that oneDNN makes for the CPU at hand; how much memory that needs is its affair",
        "measured; the call: aten native/mkldnn/Matmul.cpp, mkldnn_gemm and mkldnn_matmul, ideep::matmul_forward",
        r"(^|> )(mm|addmm|bmm|baddbmm|_scaled_dot_product_flash_attention_for_cpu(_backward)?)$",
    ),
    KnownBuffer(
        "keys and values packed",
        "in 16 bits, on CPUs with AMX, attention packs keys and values for oneDNN's products in forward; on others it does not",
        "from source: aten native/cpu/FlashAttentionKernel.cpp, cpu_flash_attention, need_pack; measured",
        r"(^|> )_scaled_dot_product_flash_attention_for_cpu > empty$",
    ),
    KnownBuffer(
        "matrices in order",
        "batched products copy matrices of which no axis lies in order, as the factors of experts' adapters; which of a CPU's kernels runs, "
        "and so whether it does, depends on libraries and sizes",
        "from source: aten native/mkldnn/Matmul.cpp, mkldnn_matmul; native/LinearAlgebra.cpp, bmm_out_or_baddbmm_ and addmm_impl_cpu_",
        r"(^|> )(bmm > contiguous|baddbmm > contiguous|baddbmm > addmm_) > clone > empty_like > empty$",
    ),
    KnownBuffer(
        "oneDNN's convolutions",
        "oneDNN lays images, filters and results out as the CPU at hand likes them, and copies them for that",
        "measured; the call: aten native/mkldnn/Conv.cpp, mkldnn_convolution and mkldnn_convolution_backward",
        r"(^|> )(mkldnn_convolution|convolution_backward|_slow_conv2d_forward|slow_conv2d_backward)( > |$)",
    ),
    KnownBuffer(
        "places of image tokens",
        "the backward of a masked_scatter counts on the CPU where its mask is true; a card's is traced",
        "from source: aten native/TensorAdvancedIndexing.cpp, masked_select_out_impl_cpu",
        r"masked_scatter_backward > masked_select > (sum|empty)",
    ),
)
"""What `trace(..., on="cpu")` leaves out. What else kernels of a CPU allocate for themselves stands in cpu.py, and is traced."""


def differences(
    traced: Iterable[Allocation],
    real: Iterable[Allocation],
    known: Sequence[KnownBuffer] = (),
    above: int = MIB,
    block: int = 1,
) -> list[Difference]:
    """Differences between allocations of more than `above` bytes, sizes rounded up to blocks of so many bytes. Explained ones are among them."""

    def round_and_filter(sequence: Iterable[Allocation]) -> list[Allocation]:
        rounded = [a._replace(bytes=-(-a.bytes // block) * block) for a in sequence]
        return [a for a in rounded if a.bytes > above]

    def find_known(what: str, allocation: Allocation) -> KnownBuffer | None:
        return next((k for k in known if k.explains(what, allocation)), None)

    ours, theirs = round_and_filter(traced), round_and_filter(real)
    extra, missing = [find_known(EXTRA, a) for a in ours], [find_known(MISSING, a) for a in theirs]
    path = _align(
        [a.bytes for a in ours],
        [a.bytes for a in theirs],
        [_UNEXPLAINED if k is None else 1 for k in extra],
        [_UNEXPLAINED if k is None else 1 for k in missing],
    )
    return [
        Difference(EXTRA, i, ours[i], extra[i]) if what == EXTRA else Difference(MISSING, j, theirs[j], missing[j])
        for what, i, j in path
    ]


def unexplained(all_differences: Iterable[Difference]) -> list[Difference]:
    return [difference for difference in all_differences if difference.known is None]


def allocations_of_trace(trace: Trace) -> list[Allocation]:
    """Allocations of a trace on the device."""
    storages = [trace.step.storages[index] for index, sign in trace.step.events if sign > 0]
    return [Allocation(m.bytes, " > ".join(filter(None, (m.module, m.operation)))) for m in storages if not m.host]


def allocations_of_history(rows: Iterable[Sequence[Any]]) -> list[Allocation]:
    """Allocations of torch.cuda.memory's history: rows of [action, bytes, address, frames of Python, innermost first]."""
    return [Allocation(size, " > ".join(reversed(frames))) for action, size, _, frames in rows if action == "alloc"]


def _align(
    ours: Sequence[int], theirs: Sequence[int], skip_ours: Sequence[int], skip_theirs: Sequence[int]
) -> list[tuple[str, int, int]]:
    """The cheapest way through both sequences (Dijkstra), as the steps that skip an entry of one: (EXTRA or MISSING, i, j)."""
    goal = (len(ours), len(theirs))

    def walk_alike(i: int, j: int) -> tuple[int, int]:
        """Walk on while both are alike, which costs nothing. Where skipping is cheap there may be a better way: stop there."""
        while i < goal[0] and j < goal[1] and ours[i] == theirs[j] and skip_ours[i] == skip_theirs[j] == _UNEXPLAINED:
            i, j = i + 1, j + 1
        return i, j

    start = walk_alike(0, 0)
    queue: list[tuple[int, int, int]] = [(0, -sum(start), start[0])]  # of equal cost, the one that got furthest
    reached_from: dict[tuple[int, int], tuple[tuple[int, int], tuple[str, int, int] | None]] = {start: (start, None)}
    costs = {start: 0}
    while queue:
        cost, far, i = heappop(queue)
        current = (i, -far - i)
        if current == goal:
            break
        if cost > costs[current]:
            continue
        j = current[1]
        steps: list[tuple[int, int, int, tuple[str, int, int] | None]] = []
        if i < goal[0]:
            steps.append((cost + skip_ours[i], i + 1, j, (EXTRA, i, j)))
        if j < goal[1]:
            steps.append((cost + skip_theirs[j], i, j + 1, (MISSING, i, j)))
        if i < goal[0] and j < goal[1] and ours[i] == theirs[j]:
            steps.append((cost, i + 1, j + 1, None))
        for price, a, b, step in steps:
            neighbour = walk_alike(a, b)
            if price < costs.get(neighbour, price + 1):
                costs[neighbour], reached_from[neighbour] = price, (current, step)
                heappush(queue, (price, -sum(neighbour), neighbour[0]))
    path: list[tuple[str, int, int]] = []
    position = goal
    while position != start:
        position, step = reached_from[position]
        if step is not None:
            path.insert(0, step)
    return path
