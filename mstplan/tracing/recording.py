"""What a step allocates and releases, in order, and what for. Plain data: nothing here needs torch.

A step is walked through in places: a pass (forward, recomputation, backward, optimizer) of a unit. Units are the decoder
layers; what runs before them is unit -1, what runs after them unit n. Places follow each other as blocks of events, and
`extend.py` repeats the blocks of a layer for many.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from ..step.instants import Pass
from ..words import Word


class Category(Word):
    """Purpose of a storage, in the order of a picture."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    STATES = "optimizer"
    INPUTS = "layer inputs"
    ATTENTION = "attention"
    MLP = "MLP"
    NORMS = "norms"
    LOSS = "loss"
    WORKSPACE = "workspace"
    OTHER = "other"


Size = Annotated[int, Field(ge=0, le=1 << 62)]  # bytes, or of an axis


class Place(NamedTuple):
    run: Pass
    unit: int


@dataclass(slots=True)
class Storage:
    """A storage: bytes, and the tensor that it was made for."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    operation: str
    module: str  # its path in the model; in backward that of the module whose forward made the node
    category: Category = Category.OTHER
    host: bool = False  # in CPU RAM
    stream: int = 0  # on which it is allocated; 0: that which computes, others in the order in which they come


@dataclass
class Recording:
    """events: (index into `storages`, +1 allocated or -1 released), in order. places: (place, index of its first event)."""

    storages: list[Storage] = field(default_factory=list)
    events: list[tuple[int, int]] = field(default_factory=list)
    places: list[tuple[Place, int]] = field(default_factory=list)

    def enter(self, place: Place) -> None:
        """Note that what follows happens at `place`."""
        if self.places and self.places[-1][1] == len(self.events):
            self.places.pop()  # nothing happened there
        if not self.places or self.places[-1][0] != place:
            self.places.append((place, len(self.events)))

    def add(self, storage: Storage) -> int:
        """Record an allocation; returns its index."""
        self.storages.append(storage)
        self.events.append((len(self.storages) - 1, 1))
        return len(self.storages) - 1

    def blocks(self) -> Iterator[tuple[Place, range]]:
        """The events of each place, in order."""
        ends = [start for _, start in self.places[1:]] + [len(self.events)]
        for (place, start), end in zip(self.places, ends, strict=True):
            yield place, range(start, end)

    def place_of(self, event: int) -> Place:
        return self.places[bisect_right(self.places, event, key=lambda p: p[1]) - 1][0]

    def live(self) -> Iterator[int]:
        """Bytes on the device after each event."""
        total = 0
        for index, sign in self.events:
            storage = self.storages[index]
            total += 0 if storage.host else sign * storage.bytes
            yield total

    def alive_at(self, event: int) -> list[int]:
        """Indices of what is alive on the device after an event, largest first."""
        alive: set[int] = set()
        for index, sign in self.events[: event + 1]:
            (alive.add if sign > 0 else alive.discard)(index)
        return sorted((i for i in alive if not self.storages[i].host), key=lambda i: -self.storages[i].bytes)

    def without(self, omitted: Collection[int | None]) -> Recording:
        """Recording without some of its storages."""
        remaining = [i for i in range(len(self.storages)) if i not in omitted]
        new_index = {old: n for n, old in enumerate(remaining)}
        events = [(new_index[index], sign) for index, sign in self.events if index in new_index]
        places = [(place, sum(index in new_index for index, _ in self.events[:start])) for place, start in self.places]
        return Recording([self.storages[i] for i in remaining], events, places)

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "made": [
                [m.bytes, list(m.shape), m.dtype, m.operation, m.module, m.category, m.host, m.stream]
                for m in self.storages
            ],
            "events": [[index, sign] for index, sign in self.events],
            "places": [[place.run, place.unit, start] for place, start in self.places],
        }

    @classmethod
    def from_data(cls, data: RecordingData) -> Recording:
        """Recording of plain data. Raises ValueError for what is none."""
        storages = [
            Storage(fields[0], tuple(fields[1]), *fields[2:5], Category(fields[5]), *fields[6:]) for fields in data.made
        ]
        recording = cls(
            storages, list(data.events), [(Place(Pass(run), unit), start) for run, unit, start in data.places]
        )
        recording.check()
        return recording

    def check(self) -> None:
        """Check that every storage is allocated once and released at most once, later, and every event has a place. Raises ValueError."""
        alive: list[bool | None] = [None] * len(self.storages)
        for index, sign in self.events:
            if not 0 <= index < len(self.storages) or alive[index] is not (None if sign > 0 else True):
                raise ValueError(f"storage {index} comes or goes twice")
            alive[index] = sign > 0
        starts = [start for _, start in self.places]
        if (
            None in alive
            or (self.events and starts[:1] != [0])
            or sorted(starts) != starts
            or max(starts, default=0) > len(self.events)
        ):
            raise ValueError("storages that never come, or places out of order")


class RecordingData(NamedTuple):
    """A recording as JSON has it."""

    made: list[tuple[Size, list[Size], str, str, str, str, bool, Annotated[int, Field(ge=0)]]]
    events: list[tuple[int, Literal[1, -1]]]
    places: list[tuple[Literal["forward", "recompute", "backward", "optimizer"], int, int]]


def largest(totals: Iterable[int]) -> tuple[int, int]:
    """(the largest, its index) of running totals; (0, -1) of none."""
    best, index = 0, -1
    for n, total in enumerate(totals):
        if total > best:
            best, index = total, n
    return best, index
