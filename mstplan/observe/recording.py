"""What a step allocates and releases, in order, and what for. Plain data: nothing here needs torch.

A step is walked through in places: a pass (forward, recomputation, backward, optimizer) of a unit. Units are the decoder
layers; what runs before them is unit -1, what runs after them unit n. Places follow each other as blocks of events, and
`extend.py` repeats the blocks of a layer for many.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

FORWARD, RECOMPUTE, BACKWARD, OPTIMIZER = "forward", "recompute", "backward", "optimizer"

WEIGHTS, GRADIENTS, STATES, INPUTS, ATTENTION = "weights", "gradients", "optimizer", "layer inputs", "attention"
MLP, NORMS, LOSS, WORKSPACE, OTHER = "MLP", "norms", "loss", "workspace", "other"
CATEGORIES = (WEIGHTS, GRADIENTS, STATES, INPUTS, ATTENTION, MLP, NORMS, LOSS, WORKSPACE, OTHER)


class Place(NamedTuple):
    run: str  # forward | recompute | backward | optimizer
    unit: int


@dataclass(slots=True)
class Made:
    """A storage: bytes, and the tensor that it was made for."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    operation: str
    module: str  # its path in the model; in backward that of the module whose forward made the node
    category: str = OTHER
    host: bool = False  # in host memory


@dataclass
class Recording:
    """events: (index into `made`, +1 allocated or -1 released), in order. places: (place, index of its first event)."""

    made: list[Made] = field(default_factory=list)
    events: list[tuple[int, int]] = field(default_factory=list)
    places: list[tuple[Place, int]] = field(default_factory=list)

    def enter(self, place: Place) -> None:
        """What follows happens at `place`."""
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
        """The same without some of the storages."""
        kept = [i for i in range(len(self.made)) if i not in left_out]
        new = {old: n for n, old in enumerate(kept)}
        events = [(new[index], sign) for index, sign in self.events if index in new]
        places = [(place, sum(index in new for index, _ in self.events[:start])) for place, start in self.places]
        return Recording([self.made[i] for i in kept], events, places)

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "made": [[m.bytes, list(m.shape), m.dtype, m.operation, m.module, m.category, m.host] for m in self.made],
            "events": [[index, sign] for index, sign in self.events],
            "places": [[place.run, place.unit, start] for place, start in self.places],
        }

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Recording:
        made = [Made(size, tuple(shape), *rest) for size, shape, *rest in data["made"]]
        events = [(index, sign) for index, sign in data["events"]]
        return cls(made, events, [(Place(run, unit), start) for run, unit, start in data["places"]])


def largest(totals: Iterable[int]) -> tuple[int, int]:
    """(the largest, its index) of running totals; (0, -1) of none."""
    best, at = 0, -1
    for n, total in enumerate(totals):
        if total > best:
            best, at = total, n
    return best, at
