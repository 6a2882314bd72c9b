"""The caching allocator once more, as plainly as its rules can be written: one list of blocks for each pool, searched from end to end.

Slow, and for tests alone, which hold `mstplan/step/allocator.py` to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from mstplan.step.allocator import (
    LARGE_BUFFER,
    SMALL_BUFFER,
    SMALL_SIZE,
    OutOfMemory,
    allocation_size,
    round_size,
)

FIRST_ADDRESS = 2**40
NO_CARD = 2**43


@dataclass
class Piece:
    """Bytes of address space: unmapped, free, or in use by a key."""

    address: int
    size: int
    segment: int  # pieces of one segment may join
    mapped: bool = True
    key: int | None = None


class PlainPool:
    def __init__(self, small: bool, expandable: bool) -> None:
        self.page = SMALL_BUFFER if small else LARGE_BUFFER
        self.least_rest = 512 if small or expandable else SMALL_SIZE + 1
        self.pieces: list[Piece] = []  # in order of addresses

    def free(self) -> list[Piece]:
        """Free pieces in the order in which torch looks at them."""
        return sorted((p for p in self.pieces if p.mapped and p.key is None), key=lambda p: (p.size, p.address))

    def cut(self, piece: Piece, size: int) -> Piece:
        """Keep the first `size` bytes of a piece, and return the rest."""
        rest = Piece(piece.address + size, piece.size - size, piece.segment, piece.mapped)
        piece.size = size
        self.pieces.insert(self.pieces.index(piece) + 1, rest)
        return rest

    def join(self) -> None:
        """Join neighbours that are both free, and both mapped or both not."""
        joined: list[Piece] = []
        for piece in self.pieces:
            last = joined[-1] if joined else None
            if (
                last is not None
                and last.key is None
                and piece.key is None
                and last.segment == piece.segment
                and last.mapped is piece.mapped
            ):
                last.size += piece.size
            else:
                joined.append(piece)
        self.pieces = joined

    def reach(self, piece: Piece) -> int:
        """Bytes that a piece could grow to."""
        after = self.pieces[self.pieces.index(piece) + 1 :][:1]
        grows = after and after[0].segment == piece.segment and not after[0].mapped
        return piece.size + (after[0].size if grows else 0)

    def best_fit(self, size: int) -> Piece | None:
        fits = [piece for piece in self.free() if piece.size >= size]
        while len(fits) > 1 and self.reach(fits[1]) < self.reach(fits[0]):
            del fits[0]
        return fits[0] if fits else None


class PlainAllocator:
    """As Allocator."""

    def __init__(self, expandable: bool, limit: int | None) -> None:
        self.expandable, self.limit = expandable, limit
        self.reserved = self.allocated = self.retries = self.peak_allocated = self.peak_reserved = 0
        self.pools: dict[
            tuple[bool, int], PlainPool
        ] = {}  # by (small, stream), streams in order of their first allocation
        self.streams: list[int] = []
        self.next_address = FIRST_ADDRESS

    def allocate(self, key: int, size: int, stream: int = 0) -> OutOfMemory | None:
        if size == 0:
            return None
        rounded = round_size(size)
        if stream not in self.streams:
            self.streams.append(stream)
            for small in (False, True):
                self.pools[small, stream] = PlainPool(small, self.expandable)
        pool = self.pools[rounded <= SMALL_SIZE, stream]
        piece = pool.best_fit(rounded) or self.grow(pool, rounded)
        if piece is None:
            self.retries += 1
            self.empty_cache()
            piece = self.grow(pool, rounded)
            if piece is None:
                return OutOfMemory(size, allocation_size(rounded), self.allocated, self.reserved)
        if piece.size - rounded >= pool.least_rest:
            pool.cut(piece, rounded)
        piece.key = key
        self.allocated += piece.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return None

    def free(self, key: int) -> None:
        for pool in self.pools.values():
            for piece in pool.pieces:
                if piece.key == key:
                    self.allocated -= piece.size
                    piece.key = None
                    pool.join()
                    return

    def empty_cache(self) -> None:
        for small in (False, True):
            for stream in self.streams:
                pool = self.pools[small, stream]
                for piece in pool.free():
                    self.give_back(pool, piece)

    def give_back(self, pool: PlainPool, piece: Piece) -> None:
        """Whole segments; of expandable ones whole pages, and address space of which nothing is left."""
        begin, end = piece.address, piece.address + piece.size
        if self.expandable:
            begin, end = -(-begin // pool.page) * pool.page, end // pool.page * pool.page
        elif [p.segment for p in pool.pieces].count(piece.segment) > 1:
            return
        if begin >= end:
            return
        if begin > piece.address:
            piece = pool.cut(piece, begin - piece.address)
        if end < piece.address + piece.size:
            pool.cut(piece, end - piece.address)
        self.reserved -= piece.size
        piece.mapped = False
        pool.join()
        segments = [p.segment for p in pool.pieces]
        pool.pieces = [p for p in pool.pieces if p.mapped or (self.expandable and segments.count(p.segment) > 1)]

    def grow(self, pool: PlainPool, size: int) -> Piece | None:
        if self.expandable:
            return self.expand(pool, size)
        whole = allocation_size(size)
        if not self.reserve(whole):
            return None
        piece = Piece(self.next_address, whole, self.next_address)
        self.next_address += whole
        pool.pieces.append(piece)
        return piece

    def reserve(self, size: int) -> bool:
        if self.limit is not None and self.reserved + size > self.limit:
            return False
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def expand(self, pool: PlainPool, size: int) -> Piece | None:
        """Map what is missing, page by page, from the lowest address with room on."""
        start = self.room(pool, size)
        while True:
            at = max(n for n, piece in enumerate(pool.pieces) if piece.address <= start)
            piece = pool.pieces[at]
            if piece.mapped and piece.size >= size:
                return piece
            unmapped, there = (pool.pieces[at + 1], piece.size) if piece.mapped else (piece, 0)
            mapped = -(-min(unmapped.size, size - there) // pool.page) * pool.page
            if not self.reserve(mapped):
                return None
            if mapped < unmapped.size:
                pool.cut(unmapped, mapped)
            unmapped.mapped = True
            pool.join()

    def room(self, pool: PlainPool, size: int) -> int:
        """The lowest address from which on nobody uses so many bytes, some of them unmapped."""
        for n, piece in enumerate(pool.pieces):
            if piece.mapped:
                continue
            first = n
            before = pool.pieces[n - 1] if n else None
            if before is not None and before.segment == piece.segment and before.key is None:
                first = n - 1
            found = 0
            for other in pool.pieces[first:]:
                if other.segment != piece.segment or other.key is not None:
                    break
                found += other.size
            if found >= size:
                return pool.pieces[first].address
        card = max(NO_CARD, size) if self.limit is None else self.limit
        space = -(-(card + card // 8) // pool.page) * pool.page
        self.next_address = -(-self.next_address // pool.page) * pool.page
        pool.pieces.append(Piece(self.next_address, space, self.next_address, mapped=False))
        self.next_address += space
        return self.next_address - space

    def in_use(self) -> dict[int, tuple[int, int]]:
        """(address, bytes) by key."""
        pieces = [piece for pool in self.pools.values() for piece in pool.pieces]
        return {piece.key: (piece.address, piece.size) for piece in pieces if piece.key is not None}

    def free_pieces(self) -> list[tuple[int, int]]:
        """(address, bytes) of what is free, in order of addresses."""
        return sorted((piece.address, piece.size) for pool in self.pools.values() for piece in pool.free())
