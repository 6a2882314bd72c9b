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
class Made:
    """A storage: bytes, and the tensor that it was made for."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    operation: str
    module: str  # its path in the model; in backward that of the module whose forward made the node
    category: Category = Category.OTHER
    host: bool = False  # in host memory


@dataclass
class Recording:
    """events: (index into `made`, +1 allocated or -1 released), in order. places: (place, index of its first event)."""

    made: list[Made] = field(default_factory=list)
    events: list[tuple[int, int]] = field(default_factory=list)
    places: list[tuple[Place, int]] = field(default_factory=list)

    def enter(self, place: Place) -> None:
        """Note that what follows happens at `place`."""
        if self.places and self.places[-1][1] == len(self.events):
            self.places.pop()  # nothing happened there
        if not self.places or self.places[-1][0] != place:
            self.places.append((place, len(self.events)))

    def add(self, made: Made) -> int:
        """Record an allocation; returns its index."""
        self.made.append(made)
        self.events.append((len(self.made) - 1, 1))
        return len(self.made) - 1

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
            made = self.made[index]
            total += 0 if made.host else sign * made.bytes
            yield total

    def alive_at(self, event: int) -> list[int]:
        """Indices of what is alive on the device after an event, largest first."""
        alive: set[int] = set()
        for index, sign in self.events[: event + 1]:
            (alive.add if sign > 0 else alive.discard)(index)
        return sorted((i for i in alive if not self.made[i].host), key=lambda i: -self.made[i].bytes)

    def without(self, left_out: Collection[int | None]) -> Recording:
        """Recording without some of its storages."""
        kept = [i for i in range(len(self.made)) if i not in left_out]
        new = {old: n for n, old in enumerate(kept)}
        events = [(new[index], sign) for index, sign in self.events if index in new]
        places = [(place, sum(index in new for index, _ in self.events[:start])) for place, start in self.places]
        return Recording([self.made[i] for i in kept], events, places)

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "made": [[m.bytes, list(m.shape), m.dtype, m.operation, m.module, m.category, m.host] for m in self.made],
            "events": [[index, sign] for index, sign in self.events],
            "places": [[place.run, place.unit, start] for place, start in self.places],
        }

    @classmethod
    def of(cls, data: Recorded) -> Recording:
        """Recording of plain data. Raises ValueError for what is none."""
        made = [Made(row[0], tuple(row[1]), *row[2:5], Category(row[5]), row[6]) for row in data.made]
        found = cls(made, list(data.events), [(Place(Pass(run), unit), start) for run, unit, start in data.places])
        found.check()
        return found

    def check(self) -> None:
        """Check that every storage is allocated once and released at most once, later, and every event has a place. Raises ValueError."""
        alive: list[bool | None] = [None] * len(self.made)
        for index, sign in self.events:
            if not 0 <= index < len(self.made) or alive[index] is not (None if sign > 0 else True):
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


class Recorded(NamedTuple):
    """A recording as JSON has it."""

    made: list[tuple[Size, list[Size], str, str, str, str, bool]]
    events: list[tuple[int, Literal[1, -1]]]
    places: list[tuple[Literal["forward", "recompute", "backward", "optimizer"], int, int]]


def largest(totals: Iterable[int]) -> tuple[int, int]:
    """(the largest, its index) of running totals; (0, -1) of none."""
    best, at = 0, -1
    for n, total in enumerate(totals):
        if total > best:
            best, at = total, n
    return best, at
