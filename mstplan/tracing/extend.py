"""From a step of few layers to that of many, exactly: what a layer allocates and releases is repeated, event by event.

Layers of one kind between layers of one kind do the same, if they stand alike in their checkpoints, where these hold several.
`layers_to_run` picks the layers to run: the first checkpoints, until every kind was there, then of every pattern that occurs one.
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
from .recording import Place, Recording, Storage

Pattern = tuple[Hashable, ...]
UnitBlock = tuple[Pass, int, int]  # pass, unit, and which time a step comes there, from 0


class Unlike(Exception):
    """The units do not repeat."""


class LayerRow:
    """Layers in a row, by kind; starts: the first layer of every checkpoint. reach: over how many checkpoints a tensor's life may go."""

    def __init__(self, kinds: Sequence[Hashable], starts: Sequence[int], reach: int):
        self.kinds, self.count, self.reach = kinds, len(kinds), reach
        self.checkpoints = [range(*bounds) for bounds in pairwise([*starts, self.count])]
        self.checkpoint_numbers = [n for n, checkpoint in enumerate(self.checkpoints) for _ in checkpoint]

    def ends(self, unit: int) -> tuple[bool, bool]:
        """Whether it is the first layer of its checkpoint, and whether the last."""
        checkpoint = self.checkpoints[self.checkpoint_numbers[unit]]
        return unit == checkpoint[0], unit == checkpoint[-1]

    def kinds_beside(self, unit: int) -> set[Hashable]:
        """The kinds in its checkpoint."""
        return {self.kinds[i] for i in self.checkpoints[self.checkpoint_numbers[unit]]}

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
        near = [(min(n, self.reach), min(len(self.checkpoints) - 1 - n, self.reach)) for n in self.checkpoint_numbers]
        return list(zip(marked, marked[1:], marked[2:], near, strict=False))

    def way_between(self, unit: int, other: int) -> tuple[str, int]:
        """Way from a layer to another: to the one so many on, or from an end of a checkpoint to one of that so many on."""
        if abs(other - unit) <= 1:
            return "layers", other - unit
        distance = self.checkpoint_numbers[other] - self.checkpoint_numbers[unit]
        if not 1 < self.reach >= abs(distance) or True not in self.ends(unit) or True not in self.ends(other):
            raise Unlike
        return "to the first" if self.ends(other)[0] else "to the last", distance

    def follow_way(self, unit: int, way: tuple[str, int]) -> int:
        """The layer that one comes to."""
        kind, distance = way
        number = unit + distance if kind == "layers" else self.checkpoint_numbers[unit] + distance
        if not 0 <= number < (self.count if kind == "layers" else len(self.checkpoints)):
            raise Unlike
        return number if kind == "layers" else self.checkpoints[number][0 if kind == "to the first" else -1]

    def count_leading(self) -> int:
        """Number of leading layers to run as they are: whole checkpoints until every kind has appeared, or one where that comes late."""
        newest = max(self.kinds.index(kind) for kind in set(self.kinds))
        stop = self.checkpoints[self.checkpoint_numbers[newest]].stop
        return stop if 2 * stop <= self.count else self.checkpoints[0].stop

    def blocks_in_order(self, blocks: Callable[[int], list[tuple[Pass, int]]]) -> Iterator[UnitBlock]:
        """Blocks of a whole step in order, from those that each layer has: (pass, which time)."""

        def unit_blocks(unit: int, *passes: Pass) -> list[UnitBlock]:
            return [(run, unit, nth) for run, nth in blocks(unit) if run in passes]

        for unit in range(-1, self.count + 1):
            yield from unit_blocks(unit, Pass.FORWARD)
        yield from unit_blocks(self.count, Pass.BACKWARD, Pass.RECOMPUTE)
        for checkpoint in reversed(self.checkpoints):
            *earlier_layers, last = checkpoint
            # it is the last layer's that has a checkpoint run again
            backward = unit_blocks(last, Pass.BACKWARD, Pass.RECOMPUTE)
            recompute_start = next((n for n, (run, _, _) in enumerate(backward) if run == Pass.RECOMPUTE), 0)
            yield from backward[:recompute_start]
            for unit in earlier_layers:
                yield from unit_blocks(unit, Pass.RECOMPUTE)
            yield from backward[recompute_start:]
            for unit in reversed(earlier_layers):
                yield from unit_blocks(unit, Pass.BACKWARD)
        yield from unit_blocks(-1, Pass.BACKWARD, Pass.RECOMPUTE)
        for unit in range(-1, self.count + 1):
            yield from unit_blocks(unit, Pass.OPTIMIZER)


def make_row(kinds: Sequence[Hashable], every: int = 1, reach: int = 1) -> LayerRow:
    """Layers, `every` of them to a checkpoint."""
    return LayerRow(kinds, range(0, len(kinds), every), reach)


def select_layers(whole: LayerRow, layer_numbers: Sequence[int]) -> LayerRow:
    """Some layers of a row, as they are run."""
    return LayerRow(
        [whole.kinds[i] for i in layer_numbers],
        [n for n, i in enumerate(layer_numbers) if whole.ends(i)[0]],
        whole.reach,
    )


def layers_to_run(whole: LayerRow) -> list[int]:
    """Choose the layers to run: those at the beginning, as they are; then every pattern of the whole at least once, the commonest
    twice, each followed by one that follows it in the whole; and the last."""
    patterns, begin = whole.patterns(), whole.count_leading()
    number = {pattern: n for n, pattern in enumerate(dict.fromkeys(patterns))}
    walk = [number[pattern] for pattern in patterns]
    missing = Counter(set(walk))
    commonest, times = Counter(walk).most_common(1)[0]
    missing[commonest] = min(times, 2)
    places = {n: iter([i for i in range(begin, whole.count) if walk[i] == n]) for n in set(walk)}
    layer_numbers = [
        *range(begin),
        *(next(places[n], -1) for n in _shortest_tour(walk[begin - 1 :], missing - Counter(walk[:begin]))),
    ]
    return layer_numbers if -1 not in layer_numbers and len(layer_numbers) < whole.count else list(range(whole.count))


def _shortest_tour(walk: Sequence[int], missing: Counter[int]) -> Iterator[int]:
    """A short way from the first of a walk to its last, without the first, by steps that the walk takes, past all that is missing: always
    on to the nearest from which one still comes to the others."""
    steps: dict[int, list[int]] = {n: [] for n in walk}
    for one, other in dict.fromkeys(pairwise(walk)):
        steps[one].append(other)
    beyond = {n: set(_shortest_ways(n, steps)) for n in steps}  # the last is the only way's end, so it comes last
    current = walk[0]
    while missing:
        ways = _shortest_ways(current, steps)
        goal = next(n for n in ways if n in missing and set(missing - Counter([n])) <= beyond[n])
        for current in ways[goal]:
            missing -= Counter([current])
            yield current


def _shortest_ways(start: int, steps: dict[int, list[int]]) -> dict[int, list[int]]:
    """The shortest way to everything that can be come to, nearest first."""
    ways: dict[int, list[int]] = {}
    queue = deque([(start, list[int]())])
    while queue:
        current, way = queue.popleft()
        for n in steps[current]:
            if n not in ways:
                ways[n] = [*way, n]
                queue.append((n, ways[n]))
    return ways


def extend(short: Recording, layer_numbers: Sequence[int], whole: LayerRow) -> Recording:
    """The recording of a step of all layers, of one that ran those of `layer_numbers`, as `layers_to_run` chose them. Raises Unlike."""
    if len(layer_numbers) == whole.count:
        return short
    return _Extension(short, layer_numbers, whole).run()


class _Extension:
    def __init__(self, short: Recording, layer_numbers: Sequence[int], whole: LayerRow):
        self.short, self.layer_numbers, self.whole_row, self.short_row = (
            short,
            layer_numbers,
            whole,
            select_layers(whole, layer_numbers),
        )
        self.count, self.short_count, self.leading = whole.count, len(layer_numbers), whole.count_leading()
        patterns = whole.patterns()
        stands_for = {patterns[unit]: n for n, unit in reversed(list(enumerate(layer_numbers)))}
        self.stand_ins = [unit if unit < self.leading else stands_for[pattern] for unit, pattern in enumerate(patterns)]
        self.blocks = self._numbered_blocks()
        self.origins: dict[int, tuple[UnitBlock, int]] = {}  # of a storage: its block, and its number there
        self.storage_at: dict[tuple[UnitBlock, int], int] = {}  # the other way round
        self.allocation_counts: dict[UnitBlock, int] = {}  # allocations of a block
        for block, span in self.blocks.items():
            allocated = [index for index, sign in self._events(span) if sign > 0]
            for k, index in enumerate(allocated):
                self.origins[index] = block, k
                for number in (k, k - len(allocated)):  # from the block's beginning, and from its end
                    self.storage_at[block, number] = index
            self.allocation_counts[block] = len(allocated)
        self._check([patterns[unit] for unit in layer_numbers])
        self.long = Recording()
        self.live: dict[tuple[int, int], int] = {}  # (unit, storage of the short step): storage of the long one

    def _numbered_blocks(self) -> dict[UnitBlock, range]:
        """Blocks in order; a place that is come back to has several, numbered from 0."""
        times: Counter[Place] = Counter()
        blocks: dict[UnitBlock, range] = {}
        for place, span in self.short.blocks():
            blocks[place.run, place.unit, times[place]] = span
            times[place] += 1
        return blocks

    def _events(self, span: range) -> list[tuple[int, int]]:
        return self.short.events[span.start : span.stop]

    def _blocks_of(self, unit: int) -> list[tuple[Pass, int]]:
        return [(run, nth) for run, block_unit, nth in self.blocks if block_unit == unit]

    def _is_layer(self, unit: int) -> bool:
        """Whether a unit of the short step is a layer."""
        return 0 <= unit < self.short_count

    # ---- are they alike? --------------------------------------------------------------------------------------------------

    def _check(self, patterns: Sequence[Pattern]) -> None:
        """Units must follow each other as they do when they are written down, which those of reversible models do not; and
        units of one pattern must have done the same."""
        if list(self.blocks) != list(self.short_row.blocks_in_order(self._blocks_of)):
            raise Unlike
        descriptions: dict[Pattern, object] = {}
        for unit, pattern in enumerate(patterns):
            description = (
                [
                    (run, nth, self._describe_block(span, unit))
                    for (run, block_unit, nth), span in self.blocks.items()
                    if block_unit == unit
                ],
                self._outside_releases(unit),
            )
            if descriptions.setdefault(pattern, description) != description:
                raise Unlike

    def _describe_block(self, span: range, unit: int) -> list[object]:
        """The block's events relative to its layer, so that layers can be compared. What all units share, only one lets go."""
        return [
            self._describe_event(index, sign, unit)
            for index, sign in self._events(span)
            if sign > 0 or self._is_layer(self.origins[index][0][1])
        ]

    def _describe_event(self, index: int, sign: int, unit: int) -> object:
        (run, origin, nth), k = self.origins[index]
        way = self.short_row.way_between(unit, origin)
        return sign, self._storage_kind(index), run, nth, way, k if origin == unit else None

    def _outside_releases(self, unit: int) -> list[object]:
        """Storages of a unit that are let go of before or after all units."""
        releases: list[object] = []
        for (run, block_unit, nth), span in self.blocks.items():
            released = (
                [self.origins[index] for index, sign in self._events(span) if sign < 0]
                if not self._is_layer(block_unit)
                else []
            )
            releases += [
                (run, block_unit, nth, made_in, made_nth, k)
                for (made_in, maker, made_nth), k in released
                if maker == unit
            ]
        return releases

    # ---- written down -------------------------------------------------------------------------------------------------------

    def run(self) -> Recording:
        blocks_of_unit = {unit: self._blocks_of(unit) for unit in range(-1, self.short_count + 1)}
        for run, unit, nth in self.whole_row.blocks_in_order(lambda unit: blocks_of_unit[self._unit_in_short(unit)]):
            self.long.enter(Place(run, unit))
            self._copy_block((run, self._unit_in_short(unit), nth), unit)
        released = {index for index, sign in self.short.events if sign < 0}
        if any(index in released for _, index in self.live):
            raise Unlike
        return self.long

    def _unit_in_short(self, unit: int) -> int:
        return unit if unit < 0 else self.short_count if unit == self.count else self.stand_ins[unit]

    def _copy_block(self, block: UnitBlock, unit: int) -> None:
        """Repeat in `unit` what was done in a block of its stand-in."""
        for index, sign in self._events(self.blocks[block]):
            if sign > 0:
                storage = self.short.storages[index]
                self.live[unit, index] = self.long.add(
                    replace(storage, module=self._rename_module(storage, unit, block[1]))
                )
                continue
            for key in self._storages_meant(index, block, unit):
                if key not in self.live:
                    raise Unlike
                self.long.events.append((self.live.pop(key), -1))

    def _storages_meant(self, index: int, block: UnitBlock, unit: int) -> list[tuple[int, int]]:
        """Storage that a release of `index` in a block means when `unit` repeats it."""
        (run, origin, nth), k = self.origins[index]
        if not self._is_layer(
            block[1]
        ):  # before or after all units one of each is meant: that of every unit that is like it
            return (
                [(u, index) for u in range(self.count) if self.stand_ins[u] == origin]
                if self._is_layer(origin)
                else [(self._unit_in_whole(origin), index)]
            )
        if not self._is_layer(origin):
            return [(self._unit_in_whole(origin), index)] if self._releases_shared(block, unit) else []
        other = self.whole_row.follow_way(unit, self.short_row.way_between(block[1], origin))
        # a unit of another kind makes more or less before or after it
        for number in (k, k - self.allocation_counts[run, origin, nth]):
            candidate = self.storage_at.get(((run, self._unit_in_short(other), nth), number))
            if candidate is not None and self._storage_kind(candidate) == self._storage_kind(index):
                return [(other, candidate)]
        raise Unlike

    def _unit_in_whole(self, unit: int) -> int:
        return self.count if unit == self.short_count else unit

    def _releases_shared(self, block: UnitBlock, unit: int) -> bool:
        """Whether `unit` is the one that lets go of what all units share, where the short step does it in `block`? That must be at one
        certain layer, and nothing may come after it in the whole that does not in the short step, as it could need it."""
        run, short_unit, _ = block
        layer_number, at_the_beginning = self.layer_numbers[short_unit], short_unit < self.leading
        if not at_the_beginning and (self.stand_ins.count(short_unit) > 1 or run == Pass.RECOMPUTE):
            raise Unlike
        if unit == layer_number and (run == Pass.FORWARD or not at_the_beginning):
            in_whole, in_short = (
                (slice(layer_number + 1, None), slice(short_unit + 1, None))
                if run == Pass.FORWARD
                else (slice(layer_number), slice(short_unit))
            )
            if not {*self.whole_row.kinds[in_whole]} <= {*self.short_row.kinds[in_short]}:
                raise Unlike
            if self.short_row.ends(short_unit)[0] and not self.short_row.kinds_beside(
                short_unit
            ) <= self.whole_row.kinds_beside(layer_number):
                raise Unlike  # its checkpoint let go of it, for another of its layers
        return unit == layer_number

    def _storage_kind(self, index: int) -> object:
        storage = self.short.storages[index]
        return storage.bytes, storage.dtype, storage.operation

    def _rename_module(self, storage: Storage, unit: int, stand_in: int) -> str:
        """The path of the same module in the layer that is meant."""
        if unit == stand_in or not 0 <= unit < self.count:
            return storage.module
        parts = storage.module.split(".")
        return ".".join(str(unit) if name == str(stand_in) else name for name in parts)
