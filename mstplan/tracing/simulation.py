"""A traced step on a card: what torch's caching allocator would hold of it, allocated and reserved, step after step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..spec.hardware import CUBLAS_HANDLES, Card
from ..step.allocator import Allocator, OutOfMemory
from ..step.cuda import CUBLASLT_WORKSPACE
from ..step.instants import Pass
from ..units import MIB
from .trace import Trace

AllocatorEvent = tuple[int, int, int]  # key, bytes, +1 allocated or -1 released


class Usage(NamedTuple):
    """Most bytes in a step after the first. retries: how often the cache had to be given back to go on."""

    allocated: int
    reserved: int
    retries: int
    out_of_memory: OutOfMemory | None


def simulate(trace: Trace, *, expandable: bool, limit: int | None = None, steps: int = 3) -> Usage:
    """Simulate what the allocator holds in the last of `steps` steps. limit: bytes of the card beside its CUDA context."""
    allocator = Allocator(expandable=expandable, limit=limit)
    for n, events in enumerate(_events_by_step(trace, steps)):
        if n == steps:  # the first entry is what is there before any step
            allocator.reset_peaks()
        for key, size, sign in events:
            if sign < 0:
                allocator.free(key)
            elif (failed := allocator.allocate(key, size)) is not None:
                return Usage(allocator.peak_allocated, allocator.peak_reserved, allocator.retries, failed)
    return Usage(allocator.peak_allocated, allocator.peak_reserved, allocator.retries, None)


def allocatable_bytes(card: Card) -> int:
    """Bytes of a card that the allocator can reserve."""
    return card.total_bytes - card.gpu.context_bytes - card.reserve_bytes


def fits_on(trace: Trace, card: Card) -> bool:
    """Whether the allocator finds room for the step on this card, with expandable segments."""
    return (
        trace.peak.bytes <= allocatable_bytes(card)
        and simulate(trace, expandable=True, limit=allocatable_bytes(card)).out_of_memory is None
    )


def required_bytes(trace: Trace, precision: int = 2 * MIB) -> int:
    """The least room, to `precision` bytes, in which the allocator runs the step with expandable segments."""
    low, high = trace.peak.bytes, simulate(trace, expandable=True).reserved  # too little, or just enough; enough
    while high - low > precision:
        middle = (low + high) // 2
        if simulate(trace, expandable=True, limit=middle).out_of_memory is None:
            high = middle
        else:
            low = middle
    return high


def all_events(trace: Trace, steps: int = 2) -> Iterator[AllocatorEvent]:
    """Allocations and releases of a run of a few steps."""
    for events in _events_by_step(trace, steps):
        yield from events


def frame_names(trace: Trace, key: int) -> list[str]:
    """Names behind a key of `all_events`, innermost first."""
    number, kind = divmod(key, 4)
    if kind == _WEIGHT:
        weight = trace.weights[number]
        return [f"{weight.dtype} {weight.shape}", weight.name]
    if kind == _STATE:
        state = trace.held_states[number]
        return [state.dtype, state.name, "optimizer"]
    if kind == _WORKSPACE:
        library, count = ("cuBLASLt", trace.lt_handles) if number >= CUBLAS_HANDLES else ("cuBLAS", CUBLAS_HANDLES)
        return [f"{library} workspace {number % CUBLAS_HANDLES + 1} of {count}"]
    storage = trace.step.storages[number % len(trace.step.storages)]
    return [f"{storage.dtype} {storage.shape}", storage.operation, storage.module or "step", storage.category]


_WEIGHT, _STATE, _WORKSPACE, _STORAGE = range(4)


def _events_by_step(trace: Trace, steps: int) -> Iterator[Iterator[AllocatorEvent]]:
    """The events before the first step, then those of each step. The optimizer's states come in the first one's update."""
    yield _events_before(trace)
    for n in range(steps):
        yield _events_of_step(trace, n)


def _events_before(trace: Trace) -> Iterator[AllocatorEvent]:
    yield from ((4 * n + _WEIGHT, weight.bytes, 1) for n, weight in enumerate(trace.weights))
    if trace.workspace:
        yield from ((4 * n + _WORKSPACE, trace.workspace // CUBLAS_HANDLES, 1) for n in range(CUBLAS_HANDLES))
    for n in range(trace.lt_handles):
        yield 4 * (CUBLAS_HANDLES + n) + _WORKSPACE, CUBLASLT_WORKSPACE, 1


def _events_of_step(trace: Trace, n: int) -> Iterator[AllocatorEvent]:
    storages, alive = trace.step.storages, set[int]()
    update = next(
        (start for place, start in trace.step.places if place.run == Pass.OPTIMIZER and start), len(trace.step.events)
    )

    def key(index: int) -> int:
        return 4 * (n * len(storages) + index) + _STORAGE

    for e, (index, sign) in enumerate(trace.step.events):
        if n == 0 and e == update:
            yield from ((4 * i + _STATE, state.bytes, 1) for i, state in enumerate(trace.held_states))
        if storages[index].host:
            continue
        (alive.add if sign > 0 else alive.discard)(index)
        yield key(index), storages[index].bytes, sign
    if n == 0 and update == len(trace.step.events):
        yield from ((4 * i + _STATE, state.bytes, 1) for i, state in enumerate(trace.held_states))
    yield from ((key(index), storages[index].bytes, -1) for index in sorted(alive))  # gradients, the batch
