"""What the card would hold: torch's caching allocator for CUDA, followed event by event. No torch, no GPU.

Given the allocations of a step in order, it says how many bytes are allocated (blocks in use) and how many are reserved
(segments taken from the card): the second decides whether a step runs out of memory, and fragmentation is the difference.

Every constant and rule is from source: c10/cuda/CUDACachingAllocator.cpp, class DeviceCachingAllocator, whose functions are
named below, with its default settings; constants as in the headers of torch 2.13 (c10/core/AllocatorConfig.h).

    malloc            round_size, the pool, get_free_block, else a new segment, else release the cache and try again
    get_free_block    the smallest free block that is large enough, of equal ones the oldest segment's, lowest address first
    should_split      what is left of a block stays free when it is worth it
    free_block        a free block joins its free neighbours; its segment stays reserved
    release_blocks    wholly free segments, or wholly free pages of expandable ones, go back to the card

Every stream has free blocks and segments of its own (BlockComparatorSize, find_expandable_block): what one lets go of, no other gets, until the
card is full, when the cache of all is released. A block that another stream used (record_stream) is free when it is let go of: on a card it is a
moment later, when that stream has come so far.

Left out: CUDA graphs and private pools, and everything that a setting other than `expandable_segments` turns
on (max_split_size_mb, roundup_power2_divisions, garbage_collection_threshold, large_segment_size_mb, per_process_memory_fraction).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

from ..units import MIB

MIN_BLOCK = 512
"""from source: kMinBlockSize; sizes are multiples of it."""
SMALL_SIZE = MIB
"""from source: kSmallSize; requests up to this live in the small pool."""
SMALL_BUFFER = 2 * MIB
"""from source: kSmallBuffer; the segments, or the pages of the expandable segment, of the small pool."""
LARGE_BUFFER = 20 * MIB
"""from source: kLargeBuffer, now large_segment_size; the same for the large pool, up to MIN_LARGE."""
MIN_LARGE = 10 * MIB
"""from source: kMinLargeAlloc; requests from this on get a segment of their own size."""
ROUND_LARGE = 2 * MIB
"""from source: kRoundLarge; that size is a multiple of this."""

_FIRST_ADDRESS = 2**40  # addresses are made up; below 2^53 they are exact in the viewer's JavaScript
_NO_CARD = 2**43  # bytes of address space where no limit says how large the card is
_ADDRESS_BITS = 64

Watch = Callable[[str, int, int], None]
"""Called with (action, address, bytes) in the order and with the names of torch's trace: alloc, free_requested,
free_completed (bytes as requested), segment_alloc, segment_free, segment_map, segment_unmap, and oom (free bytes of the card
for an address)."""


class OutOfMemory(NamedTuple):
    """The card is full: an answer, not an error. Bytes."""

    requested: int
    needed: int  # what torch's message says it tried to allocate: the segment that the request would have needed
    allocated: int
    reserved: int  # after releasing what was cached


class Block(NamedTuple):
    address: int
    size: int  # bytes
    key: int | None  # None: free
    requested: int  # bytes asked for; 0 when free


class Segment(NamedTuple):
    """Memory taken from the card in one piece; of an expandable segment, pages that follow each other."""

    address: int
    size: int  # bytes
    small: bool  # of the small pool
    expandable: bool
    blocks: tuple[Block, ...]


def round_size(size: int) -> int:
    """Bytes that a request occupies."""
    return -(-size // MIN_BLOCK) * MIN_BLOCK if size > MIN_BLOCK else MIN_BLOCK


def allocation_size(size: int) -> int:
    """Bytes of the segment that is made for a block of `size` bytes (torch's get_allocation_size)."""
    if size <= SMALL_SIZE:
        return SMALL_BUFFER
    return LARGE_BUFFER if size < MIN_LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE


class _Block:
    """A piece of a segment, linked to its neighbours; `key` is None while it is free."""

    __slots__ = ("address", "after", "before", "key", "mapped", "pool", "rank", "requested", "size")

    def __init__(self, pool: _Pool, address: int, size: int, mapped: bool = True) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.mapped = mapped  # is there memory behind it? Only in expandable segments there may be none.
        self.key: int | None = None
        self.requested = 0
        self.rank = 0  # among the pool's free ones, while it is one of them
        self.before: _Block | None = None
        self.after: _Block | None = None

    def cut(self, size: int) -> _Block:
        """Keep the first `size` bytes; what follows becomes a block of its own, and is returned."""
        rest = _Block(self.pool, self.address + size, self.size - size, self.mapped)
        rest.before, rest.after = self, self.after
        if self.after is not None:
            self.after.before = rest
        self.after, self.size = rest, size
        return rest

    def reach(self) -> int:
        """Bytes that it could grow to: an expandable segment's last block is as large as the address space behind it."""
        after = self.after
        return self.size if after is None or after.mapped else self.size + after.size


class _Pool:
    """The free blocks of one stream in the small or in the large pool."""

    def __init__(self, small: bool, expandable: bool) -> None:
        self.small = small
        self.page = SMALL_BUFFER if small else LARGE_BUFFER
        self.least_rest = MIN_BLOCK if small or expandable else SMALL_SIZE + 1  # should_split
        # In order of size, then address. No address is used twice, so that is torch's order since pull request 183591 (May 2026):
        # size, age of the segment, address. Before, the addresses that the driver happened to give broke ties between segments.
        self.ranks: list[int] = []
        self.free: list[_Block] = []
        self.unmapped: list[_Block] = []  # address space without memory, lowest first
        self.unused: list[_Block] = []  # objects of blocks that joined others: to take one is faster than to make one

    def put(self, block: _Block) -> None:
        block.rank = rank = block.size << _ADDRESS_BITS | block.address
        at = bisect_left(self.ranks, rank)
        self.ranks.insert(at, rank)
        self.free.insert(at, block)

    def take(self, block: _Block) -> None:
        at = bisect_left(self.ranks, block.rank)
        del self.ranks[at], self.free[at]

    def spare_growing(self, at: int) -> int:
        """Of the free blocks from number `at` on, the one to take, so that what can still grow is spared (get_free_block)."""
        free = self.free
        while at + 1 < len(free) and free[at + 1].reach() < free[at].reach():
            at += 1
        return at


class Allocator:
    """One device. `limit`: bytes that the card has for it; without one, memory never ends.

    All sizes are bytes. `allocated` counts what torch.cuda.memory_allocated does, `reserved` what memory_reserved does, and
    the peaks are since the beginning or since `reset_peaks`. `retries` counts how often the cache had to be released to go on.
    """

    def __init__(self, expandable: bool, limit: int | None = None, watch: Watch | None = None) -> None:
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self.retries = 0
        self._expandable = expandable
        self._limit = limit
        self._watch = watch
        self._pools: dict[int, tuple[_Pool, _Pool]] = {}  # of each stream: the large, the small
        self._live: dict[int, _Block | None] = {}
        self._next_address = _FIRST_ADDRESS

    def allocate(self, key: int, size: int, stream: int = 0) -> OutOfMemory | None:
        """Allocate `size` bytes under a name of the caller's, any int that is not in use; None when that went well. stream: any number."""
        live = self._live
        if key in live:
            raise ValueError(f"{key} is allocated already")
        if size <= 0:
            if size < 0:
                raise ValueError(f"{size} bytes cannot be allocated")
            live[key] = None  # torch hands out a null pointer
            return None
        rounded = (size + MIN_BLOCK - 1) & -MIN_BLOCK  # round_size, without a call
        pools = self._pools.get(stream) or self._open(stream)
        pool = pools[rounded <= SMALL_SIZE]
        ranks, free = pool.ranks, pool.free
        at = bisect_left(ranks, rounded << _ADDRESS_BITS)
        if at < len(ranks):  # get_free_block
            block = free[at]
            after = block.after
            if after is not None and not after.mapped:
                at = pool.spare_growing(at)
                block = free[at]
            del ranks[at], free[at]
        else:
            grown = self._grow(pool, rounded) or self._retry(pool, rounded)
            if grown is None:
                return self._out_of_memory(size, rounded)
            block = grown
        left = block.size - rounded
        if left >= pool.least_rest:
            unused = pool.unused
            rest = unused.pop() if unused else _Block(pool, 0, 0)
            rest.address = address = block.address + rounded
            rest.size = left
            rest.before = block
            rest.after = after = block.after
            if after is not None:
                after.before = rest
            block.after = rest
            block.size = rounded
            rest.rank = rank = left << _ADDRESS_BITS | address
            at = bisect_left(ranks, rank)
            ranks.insert(at, rank)
            free.insert(at, rest)
            self.allocated += rounded
        else:
            self.allocated += block.size
        block.key, block.requested = key, size
        live[key] = block
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        if self._watch is not None:
            self._watch("alloc", block.address, size)
        return None

    def free(self, key: int) -> None:
        """Free what is allocated under `key`."""
        block = self._live.pop(key)
        if block is None:
            return
        self.allocated -= block.size
        if self._watch is not None:
            self._watch("free_requested", block.address, block.requested)
            self._watch("free_completed", block.address, block.requested)
        block.key, block.requested = None, 0
        pool, before, after = block.pool, block.before, block.after
        ranks, free = pool.ranks, pool.free
        # as _join, of what is mapped, and into the lower one
        if before is not None and before.key is None and before.mapped:
            at = bisect_left(ranks, before.rank)
            del ranks[at], free[at]
            pool.unused.append(block)
            before.size += block.size
            before.after = after
            if after is not None:
                after.before = before
            block = before
        if after is not None and after.key is None and after.mapped:
            at = bisect_left(ranks, after.rank)
            del ranks[at], free[at]
            pool.unused.append(after)
            block.size += after.size
            block.after = after = after.after
            if after is not None:
                after.before = block
        block.rank = rank = block.size << _ADDRESS_BITS | block.address
        at = bisect_left(ranks, rank)
        ranks.insert(at, rank)
        free.insert(at, block)

    def _retry(self, pool: _Pool, size: int) -> _Block | None:
        """Grow once what is cached has been given back."""
        self.retries += 1
        self.empty_cache()
        return self._grow(pool, size)

    def empty_cache(self) -> None:
        """Give back to the card what is wholly free (release_cached_blocks, torch.cuda.empty_cache)."""
        for pool in self._all_pools():
            for block in pool.free.copy():
                if self._expandable:
                    self._unmap(block)
                elif block.before is None and block.after is None:
                    pool.take(block)
                    self._release("segment_free", block.address, block.size)

    def reset_peaks(self) -> None:
        """Peaks count from now on."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def free_sizes(self) -> tuple[int, ...]:
        """Bytes reserved, and of each free block, smallest first: alike after two steps, a third finds what the second found."""
        return (self.reserved, *(rank >> _ADDRESS_BITS for pool in self._all_pools() for rank in pool.ranks))

    def segments(self) -> list[Segment]:
        """Segments that the card holds now, in order of addresses."""
        blocks = [block for pool in self._all_pools() for block in pool.free]
        blocks += [block for block in self._live.values() if block is not None]
        heads = [block for block in blocks if block.before is None or not block.before.mapped]
        return [self._segment(head) for head in sorted(heads, key=attrgetter("address"))]

    def _open(self, stream: int) -> tuple[_Pool, _Pool]:
        """The pools of a stream that allocates for the first time."""
        self._pools[stream] = _Pool(False, self._expandable), _Pool(True, self._expandable)
        return self._pools[stream]

    def _all_pools(self) -> list[_Pool]:
        """Large ones first, of which release_cached_blocks lets go first."""
        return [pools[small] for small in (False, True) for pools in self._pools.values()]

    def _segment(self, head: _Block) -> Segment:
        blocks: list[Block] = []
        block: _Block | None = head
        while block is not None and block.mapped:
            blocks.append(Block(block.address, block.size, block.key, block.requested))
            block = block.after
        return Segment(head.address, sum(b.size for b in blocks), head.pool.small, self._expandable, tuple(blocks))

    def _out_of_memory(self, size: int, rounded: int) -> OutOfMemory:
        if self._watch is not None and self._limit is not None:
            self._watch("oom", self._limit - self.reserved, rounded)
        return OutOfMemory(size, allocation_size(rounded), self.allocated, self.reserved)

    def _grow(self, pool: _Pool, size: int) -> _Block | None:
        """A free block of at least `size` bytes from memory that the card still has (alloc_block); None when it has too little."""
        if self._expandable:
            return self._expand(pool, size)
        whole = allocation_size(size)
        if not self._reserve("segment_alloc", self._next_address, whole):
            return None
        return _Block(pool, self._take_addresses(whole), whole)

    def _take_addresses(self, size: int) -> int:
        address = self._next_address
        self._next_address += size
        return address

    def _reserve(self, action: str, address: int, size: int) -> bool:
        """Take memory from the card; False when it has too little."""
        if self._limit is not None and self.reserved + size > self._limit:
            return False
        self.reserved += size
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved
        if self._watch is not None:
            self._watch(action, address, size)
        return True

    def _release(self, action: str, address: int, size: int) -> None:
        self.reserved -= size
        if self._watch is not None:
            self._watch(action, address, size)

    def _join(self, block: _Block, other: _Block | None) -> None:
        """Make a neighbour part of `block` when both are free, and both mapped or both not (try_merge_blocks)."""
        if other is None or other.key is not None or other.mapped is not block.mapped:
            return
        if other.mapped:
            other.pool.take(other)
        else:
            other.pool.unmapped.remove(other)
        if other is block.before:
            block.address, block.before = other.address, other.before
            if block.before is not None:
                block.before.after = block
        else:
            block.after = other.after
            if block.after is not None:
                block.after.before = block
        block.size += other.size

    # Expandable segments: address space for the whole card, once for each pool, with memory behind as many pages as are needed.

    def _expand(self, pool: _Pool, size: int) -> _Block | None:
        """Grow within an expandable segment (try_allocate_expandable_block). What was mapped before the card turned out to be full stays, and is free."""
        block = self._room(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            after = block.after
            if after is None or not self._map(after, min(after.size, size - block.size)):
                return None
            block = after  # it took in what was before it
        pool.take(block)
        return block

    def _room(self, pool: _Pool, size: int) -> _Block:
        """Address at which `size` bytes of free or unmapped space begin, the lowest first (find_expandable_block)."""
        for unmapped in pool.unmapped:
            before = unmapped.before
            first = before if before is not None and before.key is None else unmapped
            if self._stretches(first, size):
                return first
        card = (
            max(_NO_CARD, size) if self._limit is None else self._limit
        )  # torch asks for all that the card has, in use or not
        space = -(-(card + card // 8) // pool.page) * pool.page
        self._take_addresses(-self._next_address % pool.page)
        block = _Block(pool, self._take_addresses(space), space, mapped=False)
        pool.unmapped.append(block)  # no address is ever used again, so it is the highest
        return block

    @staticmethod
    def _stretches(first: _Block, size: int) -> bool:
        """Whether nobody uses the `size` bytes from `first` on."""
        found, block = 0, first
        while block.key is None:
            found += block.size
            if found >= size or block.after is None:
                break
            block = block.after
        return found >= size

    def _map(self, block: _Block, size: int) -> bool:
        """Put memory behind the first `size` bytes of an unmapped block, in whole pages, and make it free (map_block)."""
        pool = block.pool
        size = -(-size // pool.page) * pool.page
        if not self._reserve("segment_map", block.address, size):
            return False
        pool.unmapped.remove(block)
        if size < block.size:
            insort(pool.unmapped, block.cut(size), key=attrgetter("address"))
        block.mapped = True
        self._join(block, block.before)
        self._join(block, block.after)
        pool.put(block)
        return True

    def _unmap(self, block: _Block) -> None:
        """Give back the pages that lie wholly in a free block (unmap_block)."""
        pool = block.pool
        begin = -(-block.address // pool.page) * pool.page
        end = (block.address + block.size) // pool.page * pool.page
        if begin >= end:
            return
        pool.take(block)
        if block.address < begin:
            head, block = block, block.cut(begin - block.address)
            pool.put(head)
        if end < block.address + block.size:
            pool.put(block.cut(end - block.address))
        block.mapped = False
        self._join(block, block.before)
        self._join(block, block.after)
        if block.before is not None or block.after is not None:  # else the address space is given back, too
            insort(pool.unmapped, block, key=attrgetter("address"))
        self._release("segment_unmap", begin, end - begin)
