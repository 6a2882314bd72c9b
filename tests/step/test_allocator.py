"""The simulated caching allocator: cases worked by hand from the rules of c10/cuda/CUDACachingAllocator.cpp, and what must always hold.

Numbers are MiB where nothing else is said. E: expandable segments.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mstplan.step.allocator import (
    LARGE_BUFFER,
    MIN_BLOCK,
    SMALL_BUFFER,
    SMALL_SIZE,
    Allocator,
    Block,
    OutOfMemory,
    Segment,
    allocation_size,
    round_size,
)
from mstplan.units import GIB, KIB, MIB

from .plain_allocator import PlainAllocator

BOTH = pytest.mark.parametrize("expandable", [False, True])


def filled(expandable: bool, sizes: Iterable[int], limit: int | None = None) -> Allocator:
    """With these many MiB allocated, under the keys 0, 1, ..."""
    allocator = Allocator(expandable, None if limit is None else limit * MIB)
    for key, size in enumerate(sizes):
        assert allocator.allocate(key, size * MIB) is None
    return allocator


def place(allocator: Allocator, key: int) -> tuple[int, int]:
    """(segment, offset in it in bytes) of what is allocated under `key`."""
    return next(
        (n, block.address - segment.address)
        for n, segment in enumerate(allocator.segments())
        for block in segment.blocks
        if block.key == key
    )


def mib(*sizes: int) -> tuple[int, ...]:
    return tuple(size // MIB for size in sizes)


@pytest.mark.parametrize(
    ("size", "rounded"), [(1, 512), (512, 512), (513, 1024), (MIB - 1, MIB), (MIB, MIB), (MIB + 1, MIB + 512)]
)
def test_round_size(size, rounded):
    assert round_size(size) == rounded
    allocator = Allocator(expandable=False)
    allocator.allocate(0, size)
    assert allocator.allocated == rounded


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),  # small: 2
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),  # under 10: 20
        (10 * MIB - 1, 10 * MIB),  # rounded to 10 first, and 10 is not under 10
        (10 * MIB + 1, 12 * MIB),
        (31 * MIB, 32 * MIB),
        (32 * MIB, 32 * MIB),  # else the next even number
    ],
)
def test_segment_sizes(size, segment):
    allocator = Allocator(expandable=False)
    allocator.allocate(0, size)
    assert allocator.reserved == segment == allocation_size(round_size(size))


@BOTH
def test_small_blocks_share_a_segment(expandable):
    allocator = Allocator(expandable)
    for key in range(4096):  # 2 MiB / 512 B
        allocator.allocate(key, 1)
    assert allocator.allocated == allocator.reserved == 2 * MIB
    allocator.allocate(4096, 1)
    assert allocator.reserved == 4 * MIB


def test_the_rest_of_a_large_block_must_be_worth_it():
    for asked, allocated, pieces in [(11 * MIB, 12 * MIB, 1), (11 * MIB - 512, 11 * MIB - 512, 2)]:
        allocator = filled(False, [12])
        allocator.free(0)
        allocator.allocate(
            1, asked
        )  # what is left: 1 MiB, not more than 1 MiB, so all is handed out; 512 B more, and it is split
        assert allocator.allocated == allocated and allocator.reserved == 12 * MIB
        assert len(allocator.segments()[0].blocks) == pieces


@pytest.mark.parametrize(("expandable", "size"), [(True, 20 * MIB), (False, MIB), (True, MIB)])
def test_512_bytes_are_worth_it_in_small_and_in_expandable_blocks(expandable, size):
    allocator = Allocator(expandable)
    allocator.allocate(0, size)
    allocator.allocate(1, size)  # 1 + 1 fill a segment or page of 2; 20 and 20 are two pages
    allocator.free(0)
    allocator.allocate(2, size - 512)
    assert allocator.allocated == 2 * size - 512
    assert [block.size for block in allocator.segments()[0].blocks] == [size - 512, 512, size]


def test_the_smallest_that_fits_and_the_oldest_of_equal_ones():
    allocator = filled(False, [30, 20, 40, 20])  # a segment each
    for key in (3, 2, 1, 0):
        allocator.free(key)
    assert allocator.allocate(9, 15 * MIB) is None
    assert place(allocator, 9) == (1, 0)  # not in the other 20; 5 are left there
    assert allocator.allocate(10, 20 * MIB) is None
    assert place(allocator, 10) == (3, 0)
    assert allocator.allocate(11, 21 * MIB) is None
    assert place(allocator, 11) == (0, 0)
    assert allocator.reserved == 110 * MIB


@BOTH
def test_free_neighbours_join(expandable):
    allocator = filled(expandable, [6, 6, 6])  # all in 20: 0-6, 6-12, 12-18, and 2 free
    allocator.free(0)
    allocator.free(1)  # joins what is before it: 0-12
    assert allocator.allocate(3, 9 * MIB) is None  # 0-9; the largest of three separate ones would be 6
    assert place(allocator, 3) == (0, 0) and allocator.reserved == 20 * MIB
    allocator.free(2)  # joins what is before and after it: 9-20
    assert [mib(b.address - allocator.segments()[0].address, b.size) for b in allocator.segments()[0].blocks] == [
        (0, 9),
        (9, 11),
    ]


@BOTH
def test_pools_do_not_share(expandable):
    allocator = filled(expandable, [20])
    allocator.free(0)
    allocator.allocate(1, MIB)
    assert allocator.reserved == 22 * MIB and {s.small for s in allocator.segments()} == {True, False}


@BOTH
def test_what_is_freed_stays_reserved_until_the_cache_is_emptied(expandable):
    allocator = filled(expandable, [20, 40, 1])
    for key in range(3):
        allocator.free(key)
    assert (allocator.allocated, allocator.reserved) == (0, 62 * MIB)
    allocator.empty_cache()
    assert (allocator.reserved, allocator.segments()) == (0, [])
    assert (allocator.peak_allocated, allocator.peak_reserved) == (61 * MIB, 62 * MIB)


def test_a_segment_in_use_is_not_given_back():
    allocator = filled(False, [6, 6, 30])
    allocator.free(0)
    allocator.free(2)
    allocator.empty_cache()  # 30 goes; the 20 of the sixes has one in it
    assert allocator.reserved == 20 * MIB


def test_peaks_of_phases():
    allocator = filled(False, [20, 20])
    allocator.free(1)
    assert (allocator.peak_allocated, allocator.peak_reserved) == (40 * MIB, 40 * MIB)
    allocator.reset_peaks()
    assert (allocator.peak_allocated, allocator.peak_reserved) == (20 * MIB, 40 * MIB)  # the cache is still reserved
    allocator.empty_cache()
    allocator.reset_peaks()
    allocator.allocate(2, 10 * MIB)
    allocator.free(2)
    assert (allocator.peak_allocated, allocator.peak_reserved) == (30 * MIB, 30 * MIB)


@BOTH
def test_out_of_memory_is_an_answer(expandable):
    allocator = filled(expandable, [20, 20], limit=40)
    allocator.free(0)
    # 20 are free, in one piece, but 22 are not: they are released, and 20 in use + 22 > 40.
    assert allocator.allocate(2, 22 * MIB) == OutOfMemory(22 * MIB, 22 * MIB, 20 * MIB, 20 * MIB)
    assert allocator.retries == 1 and allocator.allocated == allocator.reserved == 20 * MIB
    assert allocator.allocate(2, 20 * MIB) is None  # the key was not taken
    assert (allocator.reserved, allocator.peak_reserved, allocator.retries) == (40 * MIB, 40 * MIB, 1)


@BOTH
def test_the_cache_is_released_before_giving_up(expandable):
    allocator = filled(expandable, [20, 20], limit=61)
    allocator.free(0)
    allocator.free(1)
    assert allocator.allocate(2, 60 * MIB) is None  # E: one free block of 40, and a page more
    assert (allocator.retries, allocator.reserved) == (0 if expandable else 1, 60 * MIB)


@BOTH
def test_fragmented_memory_runs_out_early(expandable):
    allocator = filled(
        expandable, [9, 9, 9, 9], limit=40
    )  # two in 20 and two in 20; E: 0-9, 9-18, 18-27, 27-36 in two pages of 20
    allocator.free(0)
    allocator.free(2)
    # 22 are free, 11 in a piece at most (E: 9), and neither segment (E: page) is wholly free.
    answer = allocator.allocate(4, 12 * MIB)
    assert answer == OutOfMemory(12 * MIB, 12 * MIB, 18 * MIB, 40 * MIB)


def test_what_expandable_segments_save():
    outcomes = []
    for expandable in (False, True):
        allocator = filled(expandable, [40], limit=80)
        allocator.free(0)
        allocator.allocate(1, 16 * MIB)  # 0-16 of the 40; 24 are free behind it
        outcomes.append(allocator.allocate(2, 50 * MIB))
    # Without: 40 + 50 > 80, and the 40 are in use. With: 24 + 26 more, two pages of 20: 80.
    assert outcomes == [OutOfMemory(50 * MIB, 50 * MIB, 16 * MIB, 40 * MIB), None]
    assert allocator.reserved == 80 * MIB and allocator.allocated == 66 * MIB


def test_expandable_segments_grow_by_pages():
    allocator = Allocator(expandable=True)
    allocator.allocate(0, 1)
    assert allocator.reserved == 2 * MIB  # a page of the small pool
    allocator.allocate(1, MIB + 1)
    assert allocator.reserved == 22 * MIB  # and one of the large
    allocator.allocate(2, 30 * MIB)  # behind it: 1 MiB + 512 B + 30 MiB < 40 MiB
    assert allocator.reserved == 42 * MIB and place(allocator, 2) == (1, MIB + 512)
    assert [mib(s.size) for s in allocator.segments()] == [(2,), (40,)]
    allocator.allocate(3, 9 * MIB)  # 40 MiB + 512 B: a third page for 512 B
    assert allocator.reserved == 62 * MIB


def test_a_block_that_can_grow_is_spared():
    for expandable, expected in [(True, 0), (False, 16 * MIB)]:
        allocator = filled(expandable, [6, 10])
        allocator.free(0)  # free: 0-6 and 16-20; in E the smaller one goes on into address space
        allocator.allocate(2, 3 * MIB)
        assert place(allocator, 2) == (0, expected)


def test_wholly_free_pages_are_unmapped_and_gaps_filled_first():
    allocator = filled(True, [30, 5])  # 0-30, 30-35, and 5 free: two pages
    allocator.free(0)
    allocator.empty_cache()
    assert allocator.reserved == 20 * MIB  # 0-20 went; 20-30 lies in a page in use
    assert [mib(b.size) for b in allocator.segments()[0].blocks] == [(10,), (5,), (5,)]
    allocator.allocate(
        2, 31 * MIB
    )  # 30 are in the gap and behind it, so it goes to the end: 35-66, two pages more, 14 left
    assert place(allocator, 2) == (0, 15 * MIB) and allocator.reserved == 60 * MIB
    allocator.allocate(3, 20 * MIB)  # no free block has 20: the gap is the lowest address with room
    assert place(allocator, 3) == (0, 0) and allocator.reserved == 80 * MIB
    assert [mib(b.size) for b in allocator.segments()[0].blocks] == [(20,), (10,), (5,), (31,), (14,)]


def test_a_gap_and_the_free_memory_behind_it_serve_together():
    allocator = filled(True, [30, 5])
    allocator.free(0)
    allocator.empty_cache()  # 0-20 unmapped, 20-30 free, 30-35 in use, 35-40 free
    allocator.allocate(2, 25 * MIB)  # map 0-20, join 20-30
    assert place(allocator, 2) == (0, 0) and allocator.reserved == 40 * MIB


def test_what_was_mapped_before_the_card_was_full_goes_with_the_cache():
    seen: list[tuple[str, int]] = []
    allocator = Allocator(True, 60 * MIB, lambda action, address, size: seen.append((action, size // MIB)))
    allocator.allocate(0, 30 * MIB)
    allocator.allocate(1, 5 * MIB)
    allocator.free(0)
    allocator.empty_cache()
    allocator.free(1)  # 0-20 unmapped, 20-40 free
    seen.clear()
    # From 0 on: a page for 0-20, then 40 of 70 are there; two pages more make 80. All goes back, and 80 at once are too many, too.
    assert allocator.allocate(2, 70 * MIB) == OutOfMemory(70 * MIB, 70 * MIB, 0, 0)
    assert seen == [("segment_map", 20), ("segment_unmap", 40), ("oom", 70)]


def test_memory_never_ends_without_a_limit():
    allocator = filled(True, [16 * 2**20, 1])  # 16 TiB
    assert allocator.reserved == 2**44 + 2 * MIB + -(2**44) % (20 * MIB)


@BOTH
def test_nothing_is_allocated_for_no_bytes(expandable):
    allocator = Allocator(expandable)
    assert allocator.allocate(0, 0) is None
    assert (allocator.allocated, allocator.reserved) == (0, 0)
    allocator.free(0)
    with pytest.raises(KeyError):
        allocator.free(0)


def test_misuse_is_refused():
    allocator = filled(False, [1])
    with pytest.raises(ValueError, match="0 is allocated already"):
        allocator.allocate(0, 1)
    with pytest.raises(ValueError, match="-1 bytes"):
        allocator.allocate(1, -1)
    with pytest.raises(KeyError):
        allocator.free(1)


def watched(expandable: bool) -> list[tuple[str, int]]:
    seen: list[tuple[str, int]] = []
    allocator = Allocator(
        expandable, 42 * MIB, lambda action, address, size: seen.append((action, address if action == "oom" else size))
    )
    allocator.allocate(0, 1000)
    allocator.allocate(1, 12 * MIB)
    allocator.free(0)
    allocator.allocate(2, 50 * MIB)
    return seen


def test_what_a_watcher_sees():
    work = [("alloc", 1000), ("alloc", 12 * MIB), ("free_requested", 1000), ("free_completed", 1000)]
    assert watched(False) == [
        ("segment_alloc", 2 * MIB),
        work[0],
        ("segment_alloc", 12 * MIB),
        *work[1:],
        ("segment_free", 2 * MIB),
        ("oom", 30 * MIB),
    ]
    assert watched(True) == [
        ("segment_map", 2 * MIB),
        work[0],
        ("segment_map", 20 * MIB),
        *work[1:],
        ("segment_unmap", 2 * MIB),
        ("oom", 22 * MIB),
    ]


@BOTH
def test_a_stream_gets_nothing_that_another_let_go_of(expandable):
    allocator = Allocator(expandable)
    assert allocator.allocate(0, 40 * MIB, stream=1) is None
    allocator.free(0)
    assert allocator.allocate(1, 40 * MIB, stream=2) is None and allocator.reserved == 80 * MIB
    assert allocator.allocate(2, 40 * MIB, stream=1) is None and allocator.reserved == 80 * MIB


@BOTH
def test_a_full_card_lets_go_of_what_all_streams_cached(expandable):
    allocator = Allocator(expandable, 100 * MIB)
    assert allocator.allocate(0, 60 * MIB, stream=1) is None
    allocator.free(0)
    assert allocator.allocate(1, 80 * MIB) is None
    assert (allocator.reserved, allocator.retries) == (80 * MIB, 1)


@settings(max_examples=50)
@given(expandable=st.booleans(), steps=st.lists(st.tuples(st.integers(1, 60 * MIB), st.integers(0, 2), st.booleans())))
def test_streams_are_as_allocators_of_their_own_while_there_is_room(expandable, steps):
    together, apart = Allocator(expandable), [Allocator(expandable) for _ in range(3)]
    for key, (size, stream, stays) in enumerate(steps):
        for allocator, number in ((together, stream), (apart[stream], 0)):
            assert allocator.allocate(key, size, number) is None
            if not stays:
                allocator.free(key)
    assert together.reserved == sum(each.reserved for each in apart)
    assert together.allocated == sum(each.allocated for each in apart)


def test_torch_is_not_needed():
    code = "import sys, mstplan.step.allocator, mstplan.tracing.snapshot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


SIZES = st.one_of(
    st.integers(0, 4 * KIB),
    st.integers(0, 2 * MIB),
    st.integers(MIB, 24 * MIB),
    st.integers(20 * MIB, 200 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 10 * MIB - 512, 10 * MIB, 20 * MIB, 22 * MIB]),
)
FREE = st.floats(0, 1, exclude_max=True)  # which of the live ones
ACTIONS = st.lists(st.one_of(SIZES, SIZES, FREE, FREE, st.just("empty")), max_size=60)
LIMITS = st.one_of(st.none(), st.integers(2, 400).map(lambda n: n * MIB))


class Follower:
    """Runs actions, and compares the allocator after each with the rules, on nothing but its layout before and after."""

    def __init__(self, expandable: bool, limit: int | None) -> None:
        self.expandable, self.limit = expandable, limit
        self.allocator = Allocator(expandable, limit)
        self.live: dict[int, int] = {}
        self.key = 0
        self.peaks = (0, 0)

    def run(self, actions: Iterable[object]) -> None:
        for action in actions:
            if action == "empty":
                self.allocator.empty_cache()
                self.nothing_more_to_release(self.allocator.segments())
            elif isinstance(action, float):
                if self.live:
                    key = list(self.live)[int(action * len(self.live))]
                    self.allocator.free(key)
                    del self.live[key]
            else:
                assert isinstance(action, int)
                self.allocate(action)
            self.check()

    def allocate(self, size: int) -> None:
        before, reserved, retries = self.allocator.segments(), self.allocator.reserved, self.allocator.retries
        answer = self.allocator.allocate(self.key, size)
        rounded = round_size(size)
        if answer is not None:
            assert self.limit is not None
            assert (answer.requested, answer.allocated, answer.reserved) == (
                size,
                self.allocator.allocated,
                self.allocator.reserved,
            )
            assert self.expandable or answer.reserved + answer.needed > self.limit
            self.nothing_more_to_release(self.allocator.segments())
        else:
            self.live[self.key] = size
            if size:
                self.compare_with_best_fit(
                    before, rounded, self.allocator.reserved > reserved or self.allocator.retries > retries
                )
        self.key += 1

    def compare_with_best_fit(self, before: list[Segment], rounded: int, grew: bool) -> None:
        """From the layout before: it grew only when nothing was large enough, and else took the block that get_free_block takes."""
        mine = [segment for segment in before if segment.small == (rounded <= SMALL_SIZE)]
        following = [segment.address for segment in mine[1:]] + [2**60]
        fits = sorted(
            (
                block.size,
                block.address,
                after - block.address if self.expandable and block is segment.blocks[-1] else block.size,
            )
            for segment, after in zip(mine, following, strict=False)
            for block in segment.blocks
            if block.key is None and block.size >= rounded
        )
        assert bool(fits) is not grew
        if fits:
            at = 0
            while at + 1 < len(fits) and fits[at + 1][2] < fits[at][2]:
                at += 1
            if self.expandable and self.limit is not None:  # the layout does not show where the address space ends
                assert self.block(self.key).address in {address for _, address, _ in fits}
            else:
                assert self.block(self.key).address == fits[at][1]

    def block(self, key: int) -> Block:
        return next(block for segment in self.allocator.segments() for block in segment.blocks if block.key == key)

    def nothing_more_to_release(self, segments: list[Segment]) -> None:
        for segment in segments:
            page = SMALL_BUFFER if segment.small else LARGE_BUFFER
            for block in segment.blocks:
                if block.key is None:
                    assert block.size < segment.size
                    assert not self.expandable or -(-block.address // page) * page + page > block.address + block.size

    def check(self) -> None:
        allocator, segments = self.allocator, self.allocator.segments()
        blocks = [block for segment in segments for block in segment.blocks]
        end = 0
        for segment in segments:
            assert segment.address >= end and segment.expandable is self.expandable
            end = segment.address
            for n, block in enumerate(segment.blocks):
                assert (
                    block.address == end and block.size > 0 and block.size % MIN_BLOCK == 0
                )  # they tile it: no two overlap
                assert not (
                    n and block.key is None and segment.blocks[n - 1].key is None
                )  # free neighbours have joined
                end += block.size
            assert end - segment.address == segment.size
            page = SMALL_BUFFER if segment.small or not self.expandable else LARGE_BUFFER
            assert segment.size % page == 0 and (not self.expandable or segment.address % page == 0)
        held = {block.key: block for block in blocks if block.key is not None}
        assert {key: block.requested for key, block in held.items()} == {
            key: size for key, size in self.live.items() if size
        }
        for block in held.values():
            waste = block.size - round_size(block.requested)
            assert waste == 0 if self.expandable or block.size <= SMALL_SIZE else 0 <= waste <= SMALL_SIZE
        assert allocator.allocated == sum(block.size for block in held.values())
        assert allocator.allocated <= allocator.reserved == sum(segment.size for segment in segments)
        assert self.limit is None or allocator.reserved <= self.limit
        self.peaks = max(self.peaks[0], allocator.allocated), max(self.peaks[1], allocator.reserved)
        assert allocator.peak_allocated == self.peaks[0] and allocator.peak_reserved >= self.peaks[1]


@given(st.booleans(), LIMITS, ACTIONS)
def test_what_always_holds(expandable, limit, actions):
    follower = Follower(expandable, limit)
    follower.run(actions)
    again = Follower(expandable, limit)
    again.run(actions)
    assert again.allocator.segments() == follower.allocator.segments()  # the same from the same
    for key in follower.live:
        follower.allocator.free(key)
    assert follower.allocator.allocated == 0
    follower.allocator.empty_cache()
    assert (follower.allocator.reserved, follower.allocator.segments()) == (0, [])


STREAMS = st.integers(0, 2)


@settings(max_examples=300)
@example(True, None, [(6 * MIB, 0), (10 * MIB, 0), (0.0, 0), (3 * MIB, 0)])  # what can still grow is spared
@given(
    st.booleans(),
    LIMITS,
    st.lists(st.tuples(st.one_of(SIZES, SIZES, FREE, FREE, st.just("empty")), STREAMS), max_size=60),
)
def test_it_is_the_plain_allocator(expandable, limit, actions):
    """Whatever comes and goes: the same answer to each request, all in the same places, with as many retries."""
    fast, plain = Allocator(expandable, limit), PlainAllocator(expandable, limit)
    live: list[int] = []
    for key, (action, stream) in enumerate(actions):
        if action == "empty":
            fast.empty_cache()
            plain.empty_cache()
        elif isinstance(action, int):
            answer = fast.allocate(key, action, stream)
            assert answer == plain.allocate(key, action, stream)
            if answer is None:
                live.append(key)
        elif live:
            gone = live.pop(int(action * len(live)))
            fast.free(gone)
            plain.free(gone)
        blocks = [block for segment in fast.segments() for block in segment.blocks]
        assert {b.key: (b.address, b.size) for b in blocks if b.key is not None} == plain.in_use()
        assert [(b.address, b.size) for b in blocks if b.key is None] == plain.free_pieces()
        for field in ("allocated", "reserved", "retries", "peak_allocated", "peak_reserved"):
            assert getattr(fast, field) == getattr(plain, field)


@given(ACTIONS)
def test_a_card_of_the_peak_is_enough(actions):
    """It changes nothing; with a byte less the cache must be released, or memory runs out. (E: address space ends elsewhere then.)"""
    free = Follower(False, None)
    free.run(actions)
    peak = free.allocator.peak_reserved
    enough = Follower(False, peak)
    enough.run(actions)
    assert enough.allocator.segments() == free.allocator.segments() and enough.allocator.retries == 0
    if peak:
        less = Follower(False, peak - 1)
        less.run(actions)
        assert less.allocator.retries > 0 and less.allocator.peak_reserved < peak


def test_a_card_of_80_gib_is_no_special_case():
    allocator = Allocator(True, 80 * GIB)
    answers = [allocator.allocate(n, GIB) for n in range(81)]
    # 20 MiB pages: 80 GiB are 4096 of them, exactly.
    assert answers == [None] * 80 + [OutOfMemory(GIB, GIB, 80 * GIB, 80 * GIB)]
