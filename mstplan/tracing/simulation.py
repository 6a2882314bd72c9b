"""A traced step on a card: what torch's caching allocator would hold of it, allocated and reserved, step after step."""

from __future__ import annotations

from collections.abc import Iterator

from ..spec.hardware import CUBLAS_HANDLES, Card
from ..step.cuda import CUBLASLT_WORKSPACE
from ..step.instants import Pass
from ..step.simulation import MOST_STEPS, RELEASED, Allocations, AllocatorEvent, Usage, least_limit, simulate_steps
from ..units import MIB
from .trace import Trace


def simulate(trace: Trace, *, expandable: bool, limit: int | None = None, most_steps: int = MOST_STEPS) -> Usage:
    """Simulate what the allocator holds of training, step after step. limit: bytes of the card beside its CUDA context."""
    return simulate_steps(_allocations(trace), expandable=expandable, limit=limit, most_steps=most_steps)


def fits_on(trace: Trace, card: Card) -> bool:
    """Whether the allocator finds room for training on this card."""
    limit = card.allocatable_bytes
    return trace.peak.bytes <= limit and simulate(trace, expandable=card.expandable, limit=limit).runs


def required_bytes(trace: Trace, expandable: bool = True, precision: int = 2 * MIB) -> int:
    """The least room, to `precision` bytes, in which the allocator runs training."""
    return least_limit(_allocations(trace), expandable=expandable, precision=precision)


def all_events(trace: Trace, steps: int = 2) -> Iterator[tuple[int, int, int]]:
    """Allocations and releases of a run of a few steps: (key, bytes, +1 or -1)."""
    allocations, sizes = _allocations(trace), dict[int, int]()
    for key, size in _in_order(allocations, steps):
        if size == RELEASED:
            yield key, sizes.pop(key), -1
        else:
            sizes[key] = size
            yield key, size, 1


def _in_order(allocations: Allocations, steps: int) -> Iterator[AllocatorEvent]:
    yield from allocations.before
    for n in range(steps):
        for e, (number, size) in enumerate(allocations.step):
            if n == 0 and e == allocations.states_at:
                yield from allocations.states
            yield number + n * allocations.total, size


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


def _allocations(trace: Trace) -> Allocations:
    """The trace's events on the device; an optimizer that has no events of its own makes its states when all others are through."""
    storages, step, states_at, alive = trace.step.storages, list[AllocatorEvent](), None, dict[int, None]()
    update = next((start for place, start in trace.step.places if place.run == Pass.OPTIMIZER and start), None)
    for e, (index, sign) in enumerate(trace.step.events):
        if e == update:
            states_at = len(step)
        if storages[index].host:
            continue
        step.append((4 * index + _STORAGE, storages[index].bytes if sign > 0 else RELEASED))
        if sign > 0:
            alive[index] = None
        else:
            del alive[index]
    states_at = len(step) if states_at is None else states_at
    step += ((4 * index + _STORAGE, RELEASED) for index in sorted(alive))  # gradients, the batch
    states = [(4 * n + _STATE, state.bytes) for n, state in enumerate(trace.held_states)]
    return Allocations(_before(trace), step, states, states_at, 4 * len(storages))


def _before(trace: Trace) -> list[AllocatorEvent]:
    weights = [(4 * n + _WEIGHT, weight.bytes) for n, weight in enumerate(trace.weights)]
    handles = range(CUBLAS_HANDLES) if trace.workspace else ()
    lt = range(CUBLAS_HANDLES, CUBLAS_HANDLES + trace.lt_handles)
    return [
        *weights,
        *((4 * n + _WORKSPACE, trace.workspace // CUBLAS_HANDLES) for n in handles),
        *((4 * n + _WORKSPACE, CUBLASLT_WORKSPACE) for n in lt),
    ]
