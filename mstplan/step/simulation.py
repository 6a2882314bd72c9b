"""What torch's caching allocator holds of training, step after step: whether it runs, and what it reserves. No torch, no GPU.

A step that runs once need not run for long: each leaves the free memory in other pieces for the next. So steps are simulated until one leaves
it as an earlier one did.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from .allocator import Allocator, OutOfMemory

RELEASED = -1
"""In place of bytes."""
MOST_STEPS = 6
"""Steps that are simulated where none leaves the free memory as an earlier one did."""

AllocatorEvent = tuple[int, int, int]
"""Which allocation, by a number of its own, its bytes or RELEASED, and the stream that it is made on."""


class Stream(IntEnum):
    """Streams of a GPU by what they do. Memory of each is kept apart."""

    COMPUTE = 0
    GATHER = 1  # weights of other GPUs
    REDUCE = 2  # sums gradients over GPUs that share weights
    ALL_REDUCE = 3  # and over replicas of these
    CAST = 4  # FSDP1's shards, before they are gathered


class Allocations(NamedTuple):
    """Allocations and releases of training, in order.

    before: what stays from before the first step. first: the first optimizer step, which leaves the optimizer's states. step: every later one,
    which lets go of all that it allocates. Each number stands for one allocation: of the n-th step after the first, n times `total` is added to it.
    """

    before: Sequence[AllocatorEvent]
    first: Sequence[AllocatorEvent]
    step: Sequence[AllocatorEvent]
    total: int

    def of_step(self, n: int) -> tuple[Sequence[AllocatorEvent], int]:
        """Events of the n-th step, from 0, and what is added to their numbers."""
        return (self.step, n * self.total) if n else (self.first, 0)


class Usage(NamedTuple):
    """What the allocator holds at most, in bytes, in the last step that was simulated.

    retries: how often it had to give back what it cached to go on, in all steps. steps: how many were simulated; memory ran out in the last of
    them, if it did.
    """

    allocated: int
    reserved: int
    retries: int
    out_of_memory: OutOfMemory | None
    steps: int = 0

    @property
    def runs(self) -> bool:
        return self.out_of_memory is None


def simulate_steps(
    allocations: Allocations, *, expandable: bool, limit: int | None = None, most_steps: int = MOST_STEPS
) -> Usage:
    """Simulate training until it repeats itself, or for `most_steps`. limit: bytes of the GPU beside its CUDA context."""
    allocator = Allocator(expandable=expandable, limit=limit)
    failure, steps = _run(allocator, allocations.before, 0), 0
    left: set[tuple[int, ...]] = set()  # what steps left free
    while failure is None and steps < most_steps and len(left) == steps:
        allocator.reset_peaks()
        failure = _run(allocator, *allocations.of_step(steps))
        left.add(allocator.free_sizes())
        steps += 1
    return Usage(allocator.peak_allocated, allocator.peak_reserved, allocator.retries, failure, steps)


def _run(allocator: Allocator, events: Iterable[AllocatorEvent], offset: int) -> OutOfMemory | None:
    allocate, free = allocator.allocate, allocator.free
    for number, size, stream in events:
        if size < 0:
            free(number + offset)
        elif (failure := allocate(number + offset, size, stream)) is not None:
            return failure
    return None


def least_limit(allocations: Allocations, *, expandable: bool, precision: int) -> int:
    """The least limit, to `precision` bytes, with which training runs."""
    usage = simulate_steps(allocations, expandable=expandable)
    low, high = usage.allocated - 1, usage.reserved  # too little; enough, as nothing else is ever reserved
    while high - low > precision:
        middle = (low + high) // 2
        if simulate_steps(allocations, expandable=expandable, limit=middle).runs:
            high = middle
        else:
            low = middle
    return high
