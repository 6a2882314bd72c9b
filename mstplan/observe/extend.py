"""From a step of few layers to that of many, exactly: what a layer allocates and releases is repeated, event by event.

Layers of one kind between layers of one kind do the same. `few` picks the layers to run: those at both ends, and of every
pattern that occurs in between once. `extend` then writes the events of the whole step down, layer for layer, each copied
from the layer that stands for it. Sizes, order and life of every tensor are those of the whole step; its peak may lie at another
moment than that of the few (all layer inputs are alive in the last layer's backward, all gradients in the first one's).

That layers which should be alike are alike is checked; where they are not, where they share tensors over more than their
neighbours, or where they do not follow each other, `Unlike` is raised, and the whole step has to be run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import pairwise

from .recording import BACKWARD, FORWARD, OPTIMIZER, RECOMPUTE, Made, Place, Recording

MOST_PATTERNS = 12
"""With more, the shortest sequence that shows them all is not looked for: it would hardly be shorter."""

Pattern = tuple[Hashable, ...]


class Unlike(Exception):
    """The units do not repeat."""


def patterns_of(kinds: Sequence[Hashable], reach: int) -> list[Pattern]:
    """Each unit's kind between those of its neighbours, and how near an end it is, up to `reach` units."""
    count = len(kinds)

    def at(i: int, away: int) -> Hashable:
        if not 0 <= i + away < count:
            return "beyond"
        return kinds[i + away] if abs(away) <= 1 else "some unit"

    return [tuple(at(i, away) for away in range(-reach, reach + 1)) for i in range(count)]


def few(kinds: Sequence[Hashable], reach: int = 1) -> list[int]:
    """Which units to run of units of these kinds: the first, the last, and between them every pattern of the whole at least once,
    the commonest twice, in an order in which each pattern is followed by one that follows it in the whole."""
    patterns = patterns_of(kinds, reach)
    numbers = {pattern: n for n, pattern in enumerate(dict.fromkeys(patterns))}
    if len(numbers) > MOST_PATTERNS:
        return list(range(len(kinds)))
    walk = [numbers[pattern] for pattern in patterns]
    twin = max(range(len(numbers)), key=walk.count)
    following: dict[int, list[int]] = {}
    for one, other in dict.fromkeys(pairwise(walk)):
        following.setdefault(one, []).append(other)
    found = _shortest(walk[0], walk[-1], following, len(numbers), twin if walk.count(twin) > 1 else None)
    places = {number: iter([i for i, at in enumerate(walk) if at == number]) for number in set(walk)}
    kept = [next(places[number], -1) for number in found]
    return kept if -1 not in kept and len(kept) < len(kinds) else list(range(len(kinds)))


def _shortest(start: int, end: int, following: dict[int, list[int]], count: int, twin: int | None) -> list[int]:
    """The shortest walk from start to end over all numbers below count, twice over `twin`."""
    goal = (1 << count) - 1 | (1 << count if twin is not None else 0)

    def seen(before: int, number: int) -> int:
        again = twin == number and before >> number & 1
        return before | 1 << number | (1 << count if again else 0)

    first = (start, seen(0, start))
    queue = deque([first])
    came_from: dict[tuple[int, int], tuple[int, int] | None] = {first: None}
    while queue:
        state = queue.popleft()
        if state == (end, goal):
            walk: list[int] = []
            at: tuple[int, int] | None = state
            while at is not None:
                walk.insert(0, at[0])
                at = came_from[at]
            return walk
        for number in following.get(state[0], []):
            after = (number, seen(state[1], number))
            if after not in came_from:
                came_from[after] = state
                queue.append(after)
    raise AssertionError("the whole is such a walk")


def extend(short: Recording, kept: Sequence[int], kinds: Sequence[Hashable], reach: int = 1) -> Recording:
    """The recording of a step of all units, of one that ran the `kept` ones, as `few` chose them. Raises Unlike."""
    if len(kept) == len(kinds):
        return short
    return _Extension(short, kept, kinds, reach).run()


class _Extension:
    def __init__(self, short: Recording, kept: Sequence[int], kinds: Sequence[Hashable], reach: int):
        self.short, self.count, self.few, self.reach = short, len(kinds), len(kept), reach
        patterns = patterns_of(kinds, reach)
        stands_for = {patterns[unit]: n for n, unit in reversed(list(enumerate(kept)))}
        self.like = [stands_for[pattern] for pattern in patterns]
        self.blocks = self._numbered_blocks()
        self.home: dict[int, tuple[Place, int, int]] = {}  # of a storage: its block's place and number, its number there
        self.there: dict[tuple[str, int, int, int], int] = {}  # the other way round
        self.sizes: dict[tuple[Place, int], int] = {}  # allocations of a block
        for (place, nth), span in self.blocks.items():
            allocated = [short.events[e][0] for e in span if short.events[e][1] > 0]
            for k, index in enumerate(allocated):
                self.home[index] = (place, nth, k)
                for number in (k, k - len(allocated)):  # from the block's beginning, and from its end
                    self.there[place.run, nth, number, place.unit] = index
            self.sizes[place, nth] = len(allocated)
        self._check([patterns[unit] for unit in kept])
        self._check_order()
        self.long = Recording()
        self.now: dict[tuple[int, int], int] = {}  # (unit, storage of the short step): storage of the long one

    def _numbered_blocks(self) -> dict[tuple[Place, int], range]:
        """Blocks in order; a place that is come back to has several, numbered from 0."""
        found: dict[tuple[Place, int], range] = {}
        for place, span in self.short.blocks():
            nth = 0
            while (place, nth) in found:
                nth += 1
            found[place, nth] = span
        return found

    def _check(self, patterns: Sequence[Pattern]) -> None:
        """Units of one pattern must have done the same."""
        told: dict[Pattern, list[object]] = {}
        for unit, pattern in enumerate(patterns):
            did: list[object] = [
                (place.run, nth, self._story(span, unit)) for (place, nth), span in self.blocks.items() if place.unit == unit
            ]  # fmt: skip
            if told.setdefault(pattern, did) != did:
                raise Unlike

    def _check_order(self) -> None:
        """Units must follow each other, as they do when they are written down: reversible models come back to what is no layer."""
        forward = [place.unit for place, _ in self.blocks if place.run == FORWARD]
        backward = [place.unit for place, _ in self.blocks if place.run in (BACKWARD, RECOMPUTE)]
        if forward != sorted(forward) or backward != sorted(backward, reverse=True):
            raise Unlike

    def _story(self, span: range, unit: int) -> list[object]:
        """What happens in a block, in terms that do not depend on the unit's number. What all units share, only the last lets go."""
        events = [self.short.events[e] for e in span]
        return [self._role(index, sign, unit) for index, sign in events if sign > 0 or 0 <= self.home[index][0].unit < self.few]

    def _role(self, index: int, sign: int, unit: int) -> object:
        made, (place, nth, k) = self.short.made[index], self.home[index]
        away = place.unit - unit
        if abs(away) > self.reach:
            raise Unlike
        return sign, made.bytes, made.dtype, made.operation, place.run, nth, away, None if away else k

    def run(self) -> Recording:
        for run, units in (
            (FORWARD, range(-1, self.count + 1)), (BACKWARD, range(self.count, -2, -1)), (OPTIMIZER, range(-1, self.count + 1)),
        ):  # fmt: skip
            for unit in units:
                stand_in = self._stand_in(unit)
                for (place, _), span in self.blocks.items():
                    again = place.run == RECOMPUTE and run == BACKWARD
                    if place.unit == stand_in and (place.run == run or again):
                        self.long.enter(Place(place.run, unit))
                        self._copy(span, unit, stand_in, unit == self._final(run, unit, stand_in))
        return self.long

    def _stand_in(self, unit: int) -> int:
        return unit if unit < 0 else self.few if unit == self.count else self.like[unit]

    def _final(self, run: str, unit: int, stand_in: int) -> int:
        """The unit that comes last in a pass, of those that do as `unit` does."""
        alike = [u for u in range(self.count) if self.like[u] == stand_in] if 0 <= unit < self.count else [unit]
        return alike[0] if run == BACKWARD else alike[-1]

    def _copy(self, span: range, unit: int, stand_in: int, final: bool) -> None:
        for e in span:
            index, sign = self.short.events[e]
            if sign > 0:
                made = self.short.made[index]
                self.now[unit, index] = self.long.add(replace(made, module=self._renamed(made, unit, stand_in)))
                continue
            for key in self._meant(index, unit, stand_in, final):
                if (long := self.now.pop(key, None)) is not None:
                    self.long.events.append((long, -1))

    def _meant(self, index: int, unit: int, stand_in: int, final: bool) -> list[tuple[int, int]]:
        """What a release of `index` releases when `unit` repeats what `stand_in` did; what all units share, the last one does."""
        place, nth, k = self.home[index]
        if not 0 <= place.unit < self.few:
            return [] if not final else [(self.count if place.unit == self.few else -1, index)]
        if 0 <= unit < self.count:
            other = unit + place.unit - stand_in
            for number in (k, k - self.sizes[place, nth]):  # a unit of another kind makes more or less before or after it
                meant = self.there.get((place.run, nth, number, self._stand_in(other)))
                if meant is not None and self._kind(meant) == self._kind(index):
                    return [(other, meant)]
            raise Unlike
        # Before or after all units, one of each is meant: that of every unit that is like it.
        return [(u, index) for u in range(self.count) if self.like[u] == place.unit]

    def _kind(self, index: int) -> object:
        made = self.short.made[index]
        return made.bytes, made.dtype, made.operation

    def _renamed(self, made: Made, unit: int, stand_in: int) -> str:
        """The path of the same module in the layer that is meant."""
        if unit == stand_in or not 0 <= unit < self.count:
            return made.module
        parts = made.module.split(".")
        return ".".join(str(unit) if part == str(stand_in) else part for part in parts)
