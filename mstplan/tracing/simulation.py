"""A traced step on a card: what torch's caching allocator would hold of it, allocated and reserved, step after step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from ..spec.hardware import CUBLAS_HANDLES, Card
from ..step.cuda import CUBLASLT_WORKSPACE
from ..step.instants import Pass
from ..step.simulation import (
    MOST_STEPS,
    RELEASED,
    Allocations,
    AllocatorEvent,
    Stream,
    Usage,
    least_limit,
    simulate_steps,
)
from ..units import MIB
from .recording import Category, Recording
from .trace import Trace


def simulate(trace: Trace, *, expandable: bool, limit: int | None = None, most_steps: int = MOST_STEPS) -> Usage:
    """Simulate what the allocator holds of training, step after step. limit: bytes of the card beside its CUDA context."""
    return simulate_steps(allocations_of(trace), expandable=expandable, limit=limit, most_steps=most_steps)


def fits_on(trace: Trace, card: Card) -> bool:
    """Whether the allocator finds room for training on this card."""
    limit = card.allocatable_bytes
    return trace.peak.bytes <= limit and simulate(trace, expandable=card.expandable, limit=limit).runs


def required_bytes(trace: Trace, expandable: bool = True, precision: int = 2 * MIB) -> int:
    """The least room, to `precision` bytes, in which the allocator runs training."""
    return least_limit(allocations_of(trace), expandable=expandable, precision=precision)


def all_events(trace: Trace, steps: int = 2) -> Iterator[tuple[int, int, int]]:
    """Allocations and releases of a run of a few steps: (key, bytes, +1 or -1)."""
    allocations, sizes = allocations_of(trace), dict[int, int]()
    for key, size, _stream in _in_order(allocations, steps):
        if size == RELEASED:
            yield key, sizes.pop(key), -1
        else:
            sizes[key] = size
            yield key, size, 1


def _in_order(allocations: Allocations, steps: int) -> Iterator[AllocatorEvent]:
    yield from allocations.before
    for n in range(steps):
        events, offset = allocations.of_step(n)
        yield from ((number + offset, size, stream) for number, size, stream in events)


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
    storages = [*trace.step.storages, *(trace.first_passes.storages if trace.first_passes is not None else ())]
    storage = storages[number % len(storages)]
    return [f"{storage.dtype} {storage.shape}", storage.operation, storage.module or "step", storage.category]


_WEIGHT, _STATE, _WORKSPACE, _STORAGE = range(4)


def allocations_of(trace: Trace) -> Allocations:
    """The trace's events on the device. Of an optimizer step's micro-batches the first two are followed: more find what the second found."""
    step, first, states = trace.step, trace.first_passes, trace.held_states
    update = next((start for place, start in step.places if place.run == Pass.OPTIMIZER), len(step.events))
    passes, updating = _on_device(step, step.events[:update]), _on_device(step, step.events[update:])
    new_states = [(4 * n + _STATE, state.bytes, Stream.COMPUTE) for n, state in enumerate(states)]
    total = 4 * len(step.storages)
    if first is None:
        return Allocations(_before(trace), _closed(passes + new_states + updating), _closed(passes + updating), total)
    first_passes = [(number + total, size, stream) for number, size, stream in _on_device(first, first.events)]
    total += 4 * len(first.storages)
    kept = {4 * (i + len(step.storages)) + _STORAGE for i, made in enumerate(first.storages) if made.category in _STAY}
    if trace.recipe.optimizer_in_backward:  # whose states come one by one
        return Allocations(_before(trace), _closed(first_passes, kept), _closed(passes), total)
    passes = _closed(first_passes, kept) + _closed(passes)
    return Allocations(_before(trace), _closed(passes + new_states + updating), _closed(passes + updating), total)


_STAY = (Category.GRADIENTS, Category.STATES)


def _on_device(recording: Recording, events: Iterable[tuple[int, int]]) -> list[AllocatorEvent]:
    storages = recording.storages
    return [
        (4 * index + _STORAGE, storages[index].bytes if sign > 0 else RELEASED, storages[index].stream)
        for index, sign in events
        if not storages[index].host
    ]


def _closed(events: list[AllocatorEvent], kept: Collection[int] = ()) -> list[AllocatorEvent]:
    """Events, and the release of what they leave, such as gradients and the batch, but for states and what is kept."""
    alive: dict[int, None] = {}
    for number, size, _stream in events:
        if size == RELEASED:
            del alive[number]
        elif number % 4 != _STATE:
            alive[number] = None
    return [*events, *((number, RELEASED, Stream.COMPUTE) for number in sorted(alive.keys() - set(kept)))]


def _before(trace: Trace) -> list[AllocatorEvent]:
    held = set(trace.held_weights)
    weights = [(4 * n + _WEIGHT, weight.bytes) for n, weight in enumerate(trace.weights) if weight in held]
    buckets = enumerate(trace.gradient_buckets.values(), len(trace.weights))
    handles = range(CUBLAS_HANDLES) if trace.workspace else ()
    lt = range(CUBLAS_HANDLES, CUBLAS_HANDLES + trace.lt_handles)
    made = [
        *weights,
        *((4 * n + _WEIGHT, size) for n, size in buckets),
        *((4 * n + _WORKSPACE, trace.workspace // CUBLAS_HANDLES) for n in handles),
        *((4 * n + _WORKSPACE, CUBLASLT_WORKSPACE) for n in lt),
    ]
    return [(number, size, Stream.COMPUTE) for number, size in made]
