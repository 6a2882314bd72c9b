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


@dataclass
class Recording:
    """Allocations and releases in the order in which they happened."""

    events: list[Event]

    def during(self, phase: str) -> Recording:
        return Recording([e for e in self.events if e.phase == phase])

    def sizes(self) -> set[int]:
        """Of every single allocation."""
        return {e.bytes for e in self.events if e.bytes > 0}

    def peak(self, phase: str = "", keep: Keep = lambda size: True) -> int:
        """The most bytes alive at once, of what was allocated since the recording began in blocks of a size to `keep`."""
        totals = accumulate(e.bytes if keep(abs(e.bytes)) else 0 for e in self.events)
        return max((t for t, e in zip(totals, self.events, strict=True) if e.phase.startswith(phase)), default=0)

    def alive(self, keep: Keep = lambda size: True) -> int:
        """Bytes that nobody has given back at the end."""
        return sum(e.bytes for e in self.events if keep(abs(e.bytes)))


def record(step: Callable[[Mark], object]) -> Recording:
    """`step` is called with a function that marks phases: `with mark("backward"): ...`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = step(lambda phase: record_function(f"phase {phase}"))
    del kept
    return Recording(sorted(_events(profiler.profiler.kineto_results.experimental_event_tree(), ""), key=lambda e: e.time))


def _events(tree: Sequence[Any], phase: str) -> Iterator[Event]:
    for event in tree:
        if event.name == "[memory]":
            yield Event(event.start_time_ns, event.extra_fields.alloc_size, phase)
        yield from _events(event.children, event.name[6:] if event.name.startswith("phase ") else phase)
