"""From a step of few layers to that of many, exactly: what a layer allocates and releases is repeated, event by event.

Layers of one kind between layers of one kind do the same, if they stand alike in their checkpoints, where these hold several.
`few` picks the layers to run: the first checkpoints, until every kind was there, then of every pattern that occurs one.
`extend` then writes the events of the whole step down, layer for layer, each copied from the layer that stands for it. Sizes,
order and life of every tensor are those of the whole step; its peak may lie at another moment than that of the few (all layer
inputs are alive in the last layer's backward, all gradients in the first one's).

That layers which should be alike are alike is checked; where they are not, where they share tensors over more than their
neighbours, or where they do not follow each other, `Unlike` is raised, and the whole step has to be run.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from ..step.instants import Pass
from .recording import Made, Place, Recording

Pattern = tuple[Hashable, ...]
Block = tuple[Pass, int, int]  # pass, unit, and which time a step comes there, from 0


class Unlike(Exception):
    """The units do not repeat."""


class Row:
    """Layers in a row, by kind; starts: the first layer of every checkpoint. reach: over how many checkpoints a tensor's life may go."""

    def __init__(self, kinds: Sequence[Hashable], starts: Sequence[int], reach: int):
        self.kinds, self.count, self.reach = kinds, len(kinds), reach
        self.checkpoints = [range(*bounds) for bounds in pairwise([*starts, self.count])]
        self.number = [n for n, checkpoint in enumerate(self.checkpoints) for _ in checkpoint]

    def ends(self, unit: int) -> tuple[bool, bool]:
        """Whether it is the first layer of its checkpoint, and whether the last."""
        checkpoint = self.checkpoints[self.number[unit]]
        return unit == checkpoint[0], unit == checkpoint[-1]

    def kinds_beside(self, unit: int) -> set[Hashable]:
        """The kinds in its checkpoint."""
        return {self.kinds[i] for i in self.checkpoints[self.number[unit]]}

    def patterns(self) -> list[Pattern]:
        """Keys that tell what a layer does: it and its neighbours, by kind and place in their checkpoints; and, where lives are
        long, how near an end its checkpoint is."""
        marked: list[Hashable] = [
            "beyond",
            *((kind, *self.ends(unit)) for unit, kind in enumerate(self.kinds)),
            "beyond",
        ]
        if self.reach == 1:
            return list(zip(marked, marked[1:], marked[2:], strict=False))
        near = [(min(n, self.reach), min(len(self.checkpoints) - 1 - n, self.reach)) for n in self.number]
        return list(zip(marked, marked[1:], marked[2:], near, strict=False))

    def way(self, unit: int, other: int) -> tuple[str, int]:
        """Way from a layer to another: to the one so many on, or from an end of a checkpoint to one of that so many on."""
        if abs(other - unit) <= 1:
            return "layers", other - unit
        on = self.number[other] - self.number[unit]
        if not 1 < self.reach >= abs(on) or True not in self.ends(unit) or True not in self.ends(other):
            raise Unlike
        return "to the first" if self.ends(other)[0] else "to the last", on

    def follow(self, unit: int, way: tuple[str, int]) -> int:
        """The layer that one comes to."""
        what, on = way
        number = unit + on if what == "layers" else self.number[unit] + on
        if not 0 <= number < (self.count if what == "layers" else len(self.checkpoints)):
            raise Unlike
        return number if what == "layers" else self.checkpoints[number][0 if what == "to the first" else -1]

    def beginning(self) -> int:
        """Number of leading layers to run as they are: whole checkpoints until every kind has appeared, or one where that comes late."""
        newest = max(self.kinds.index(kind) for kind in set(self.kinds))
        stop = self.checkpoints[self.number[newest]].stop
        return stop if 2 * stop <= self.count else self.checkpoints[0].stop

    def in_order(self, blocks: Callable[[int], list[tuple[Pass, int]]]) -> Iterator[Block]:
        """Blocks of a whole step in order, from those that each layer has: (pass, which time)."""

        def of(unit: int, *passes: Pass) -> list[Block]:
            return [(run, unit, nth) for run, nth in blocks(unit) if run in passes]

        for unit in range(-1, self.count + 1):
            yield from of(unit, Pass.FORWARD)
        yield from of(self.count, Pass.BACKWARD, Pass.RECOMPUTE)
        for checkpoint in reversed(self.checkpoints):
            *before, last = checkpoint
            backward = of(last, Pass.BACKWARD, Pass.RECOMPUTE)  # it is the last layer's that has a checkpoint run again
            again = next((n for n, (run, _, _) in enumerate(backward) if run == Pass.RECOMPUTE), 0)
            yield from backward[:again]
            for unit in before:
                yield from of(unit, Pass.RECOMPUTE)
            yield from backward[again:]
            for unit in reversed(before):
                yield from of(unit, Pass.BACKWARD)
        yield from of(-1, Pass.BACKWARD, Pass.RECOMPUTE)
        for unit in range(-1, self.count + 1):
            yield from of(unit, Pass.OPTIMIZER)


def row(kinds: Sequence[Hashable], every: int = 1, reach: int = 1) -> Row:
    """Layers, `every` of them to a checkpoint."""
    return Row(kinds, range(0, len(kinds), every), reach)


def part(whole: Row, kept: Sequence[int]) -> Row:
    """Some layers of a row, as they are run."""
    return Row([whole.kinds[i] for i in kept], [n for n, i in enumerate(kept) if whole.ends(i)[0]], whole.reach)


def few(whole: Row) -> list[int]:
    """Choose the layers to run: those at the beginning, as they are; then every pattern of the whole at least once, the commonest
    twice, each followed by one that follows it in the whole; and the last."""
    patterns, begin = whole.patterns(), whole.beginning()
    number = {pattern: n for n, pattern in enumerate(dict.fromkeys(patterns))}
    walk = [number[pattern] for pattern in patterns]
    missing = Counter(set(walk))
    commonest, times = Counter(walk).most_common(1)[0]
    missing[commonest] = min(times, 2)
    places = {n: iter([i for i in range(begin, whole.count) if walk[i] == n]) for n in set(walk)}
    kept = [*range(begin), *(next(places[n], -1) for n in _tour(walk[begin - 1 :], missing - Counter(walk[:begin])))]
    return kept if -1 not in kept and len(kept) < whole.count else list(range(whole.count))


def _tour(walk: Sequence[int], missing: Counter[int]) -> Iterator[int]:
    """A short way from the first of a walk to its last, without the first, by steps that the walk takes, past all that is missing: always
    on to the nearest from which one still comes to the others."""
    steps: dict[int, list[int]] = {n: [] for n in walk}
    for one, other in dict.fromkeys(pairwise(walk)):
        steps[one].append(other)
    beyond = {n: set(_ways(n, steps)) for n in steps}  # the last is the only way's end, so it comes last
    at = walk[0]
    while missing:
        ways = _ways(at, steps)
        goal = next(n for n in ways if n in missing and set(missing - Counter([n])) <= beyond[n])
        for at in ways[goal]:
            missing -= Counter([at])
            yield at


def _ways(start: int, steps: dict[int, list[int]]) -> dict[int, list[int]]:
    """The shortest way to everything that can be come to, nearest first."""
    found: dict[int, list[int]] = {}
    queue = deque([(start, list[int]())])
    while queue:
        at, way = queue.popleft()
        for n in steps[at]:
            if n not in found:
                found[n] = [*way, n]
                queue.append((n, found[n]))
    return found


def extend(short: Recording, kept: Sequence[int], whole: Row) -> Recording:
    """The recording of a step of all layers, of one that ran the `kept` ones, as `few` chose them. Raises Unlike."""
    if len(kept) == whole.count:
        return short
    return _Extension(short, kept, whole).run()


class _Extension:
    def __init__(self, short: Recording, kept: Sequence[int], whole: Row):
        self.short, self.kept, self.whole, self.part = short, kept, whole, part(whole, kept)
        self.count, self.few, self.begin = whole.count, len(kept), whole.beginning()
        patterns = whole.patterns()
        stands_for = {patterns[unit]: n for n, unit in reversed(list(enumerate(kept)))}
        self.like = [unit if unit < self.begin else stands_for[pattern] for unit, pattern in enumerate(patterns)]
        self.blocks = self._numbered_blocks()
        self.home: dict[int, tuple[Block, int]] = {}  # of a storage: its block, and its number there
        self.there: dict[tuple[Block, int], int] = {}  # the other way round
        self.sizes: dict[Block, int] = {}  # allocations of a block
        for block, span in self.blocks.items():
            allocated = [index for index, sign in self._events(span) if sign > 0]
            for k, index in enumerate(allocated):
                self.home[index] = block, k
                for number in (k, k - len(allocated)):  # from the block's beginning, and from its end
                    self.there[block, number] = index
            self.sizes[block] = len(allocated)
        self._check([patterns[unit] for unit in kept])
        self.long = Recording()
        self.now: dict[tuple[int, int], int] = {}  # (unit, storage of the short step): storage of the long one

    def _numbered_blocks(self) -> dict[Block, range]:
        """Blocks in order; a place that is come back to has several, numbered from 0."""
        times: Counter[Place] = Counter()
        found: dict[Block, range] = {}
        for place, span in self.short.blocks():
            found[place.run, place.unit, times[place]] = span
            times[place] += 1
        return found

    def _events(self, span: range) -> list[tuple[int, int]]:
        return self.short.events[span.start : span.stop]

    def _blocks_of(self, unit: int) -> list[tuple[Pass, int]]:
        return [(run, nth) for run, at, nth in self.blocks if at == unit]

    def _is_layer(self, unit: int) -> bool:
        """Whether a unit of the short step is a layer."""
        return 0 <= unit < self.few

    # ---- are they alike? --------------------------------------------------------------------------------------------------

    def _check(self, patterns: Sequence[Pattern]) -> None:
        """Units must follow each other as they do when they are written down, which those of reversible models do not; and
        units of one pattern must have done the same."""
        if list(self.blocks) != list(self.part.in_order(self._blocks_of)):
            raise Unlike
        told: dict[Pattern, object] = {}
        for unit, pattern in enumerate(patterns):
            did = (
                [(run, nth, self._story(span, unit)) for (run, at, nth), span in self.blocks.items() if at == unit],
                self._left(unit),
            )
            if told.setdefault(pattern, did) != did:
                raise Unlike

    def _story(self, span: range, unit: int) -> list[object]:
        """The block's events relative to its layer, so that layers can be compared. What all units share, only one lets go."""
        return [
            self._role(index, sign, unit)
            for index, sign in self._events(span)
            if sign > 0 or self._is_layer(self.home[index][0][1])
        ]

    def _role(self, index: int, sign: int, unit: int) -> object:
        (run, at, nth), k = self.home[index]
        way = self.part.way(unit, at)
        return sign, self._kind(index), run, nth, way, k if at == unit else None

    def _left(self, unit: int) -> list[object]:
        """Storages of a unit that are let go of before or after all units."""
        found: list[object] = []
        for (run, at, nth), span in self.blocks.items():
            gone = (
                [self.home[index] for index, sign in self._events(span) if sign < 0] if not self._is_layer(at) else []
            )
            found += [(run, at, nth, made_in, made_nth, k) for (made_in, by, made_nth), k in gone if by == unit]
        return found

    # ---- written down -------------------------------------------------------------------------------------------------------

    def run(self) -> Recording:
        did = {unit: self._blocks_of(unit) for unit in range(-1, self.few + 1)}
        for run, unit, nth in self.whole.in_order(lambda unit: did[self._stand_in(unit)]):
            self.long.enter(Place(run, unit))
            self._copy((run, self._stand_in(unit), nth), unit)
        gone = {index for index, sign in self.short.events if sign < 0}
        if any(index in gone for _, index in self.now):
            raise Unlike
        return self.long

    def _stand_in(self, unit: int) -> int:
        return unit if unit < 0 else self.few if unit == self.count else self.like[unit]

    def _copy(self, block: Block, unit: int) -> None:
        """Repeat in `unit` what was done in a block of its stand-in."""
        for index, sign in self._events(self.blocks[block]):
            if sign > 0:
                made = self.short.made[index]
                self.now[unit, index] = self.long.add(replace(made, module=self._renamed(made, unit, block[1])))
                continue
            for key in self._meant(index, block, unit):
                if key not in self.now:
                    raise Unlike
                self.long.events.append((self.now.pop(key), -1))

    def _meant(self, index: int, block: Block, unit: int) -> list[tuple[int, int]]:
        """Storage that a release of `index` in a block means when `unit` repeats it."""
        (run, at, nth), k = self.home[index]
        if not self._is_layer(
            block[1]
        ):  # before or after all units one of each is meant: that of every unit that is like it
            return (
                [(u, index) for u in range(self.count) if self.like[u] == at]
                if self._is_layer(at)
                else [(self._outside(at), index)]
            )
        if not self._is_layer(at):
            return [(self._outside(at), index)] if self._lets_go(block, unit) else []
        other = self.whole.follow(unit, self.part.way(block[1], at))
        for number in (k, k - self.sizes[run, at, nth]):  # a unit of another kind makes more or less before or after it
            meant = self.there.get(((run, self._stand_in(other), nth), number))
            if meant is not None and self._kind(meant) == self._kind(index):
                return [(other, meant)]
        raise Unlike

    def _outside(self, unit: int) -> int:
        return self.count if unit == self.few else unit

    def _lets_go(self, block: Block, unit: int) -> bool:
        """Whether `unit` is the one that lets go of what all units share, where the short step does it in `block`? That must be at one
        certain layer, and nothing may come after it in the whole that does not in the short step, as it could need it."""
        run, short_unit, _ = block
        its, at_the_beginning = self.kept[short_unit], short_unit < self.begin
        if not at_the_beginning and (self.like.count(short_unit) > 1 or run == Pass.RECOMPUTE):
            raise Unlike
        if unit == its and (run == Pass.FORWARD or not at_the_beginning):
            after, shown = (
                (slice(its + 1, None), slice(short_unit + 1, None))
                if run == Pass.FORWARD
                else (slice(its), slice(short_unit))
            )
            if not {*self.whole.kinds[after]} <= {*self.part.kinds[shown]}:
                raise Unlike
            if self.part.ends(short_unit)[0] and not self.part.kinds_beside(short_unit) <= self.whole.kinds_beside(its):
                raise Unlike  # its checkpoint let go of it, for another of its layers
        return unit == its

    def _kind(self, index: int) -> object:
        made = self.short.made[index]
        return made.bytes, made.dtype, made.operation

    def _renamed(self, made: Made, unit: int, stand_in: int) -> str:
        """The path of the same module in the layer that is meant."""
        if unit == stand_in or not 0 <= unit < self.count:
            return made.module
        parts = made.module.split(".")
        return ".".join(str(unit) if part == str(stand_in) else part for part in parts)
