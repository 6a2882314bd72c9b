"""What torch really allocates on the CPU during a step: every allocation and release, in order, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile, record_function

Keep = Callable[[int], bool]
Mark = Callable[[str], AbstractContextManager[Any]]


class Event(NamedTuple):
    time: int  # nanoseconds
    bytes: int  # less than 0: given back
    phase: str
    address: int


@dataclass
class Recording:
    """Allocations and releases in the order in which they happened."""

    events: list[Event]

    def sizes(self) -> set[int]:
        """Of every single allocation."""
        return {e.bytes for e in self.events if e.bytes > 0}

    def peak(self, phase: str = "", keep: Keep = lambda size: True) -> int:
        """The most bytes alive at once in a phase (or ever), in blocks of a size to `keep`."""
        totals = accumulate(e.bytes if keep(abs(e.bytes)) else 0 for e in self.events)
        return max((t for t, e in zip(totals, self.events, strict=True) if e.phase.startswith(phase)), default=0)


def record(step: Callable[[Mark], object]) -> Recording:
    """`step` is called with a function that marks phases: `with mark("backward"): ...`. What it returns is kept to the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = step(lambda phase: record_function(f"phase {phase}"))
    del kept
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    return Recording(list(_own(sorted(_events(tree, ""), key=lambda e: e.time))))


def _events(tree: Sequence[Any], phase: str) -> Iterator[Event]:
    for event in tree:
        if event.name == "[memory]":
            yield Event(event.start_time_ns, event.extra_fields.alloc_size, phase, event.extra_fields.ptr)
        yield from _events(event.children, event.name[6:] if event.name.startswith("phase ") else phase)


def _own(events: Sequence[Event]) -> Iterator[Event]:
    """Without the release of what was there before."""
    own: set[int] = set()
    for event in events:
        if event.bytes > 0:
            own.add(event.address)
            yield event
        elif event.address in own:
            own.remove(event.address)
            yield event
