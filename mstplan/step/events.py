"""A step's allocations and releases in order, as the step model lays it out: what the caching allocator is given.

The replay of a tape (`tape.py`) says which tensors come and go and in which order; here they are followed through the layers, through
the pieces of the sequence and through micro-batches, so that each release meets its allocation. Sizes are filled in later: the order
is the same for all lengths in the same number of pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from .fsdp import last_stream
from .optimizers import optimizer_memory, states_in_order
from .optimizers.base import Held
from .roles import Role
from .simulation import RELEASED, Allocations, Stream
from .tape import BASIS, Change, Event, Happening, Repeat, Rules, Tensor, backward, finish_reducing, forward, grad_of

if TYPE_CHECKING:
    from .steps import Chunks, Sizes, Step

MOST_PIECES = 4


class Events(NamedTuple):
    """Allocations and releases: (which one it is, index of its size in `sizes` or RELEASED).

    before: of what stays, before the first step. step: of one optimizer step. states: of optimizer states, which come in the first
    step, after its event number `states_at`. sizes: (index into BASIS, bytes per unit of it, stream).
    """

    before: tuple[tuple[int, int], ...]
    step: tuple[tuple[int, int], ...]
    states: tuple[tuple[int, int], ...]
    states_at: int
    sizes: tuple[tuple[int, int, Stream], ...]

    total: int  # of allocations

    def at(self, sizes: Sizes) -> Allocations:
        """Events in bytes, at a length."""
        units = sizes.units
        table = [
            *((units[basis] * each, int(stream)) for basis, each, stream in self.sizes),
            (RELEASED, 0),
        ]  # RELEASED is the last one's index, too
        before, step, states = (
            [(number, *table[size]) for number, size in events] for events in (self.before, self.step, self.states)
        )
        first = [*step[: self.states_at], *states, *step[self.states_at :]]
        return Allocations(before, first, step, self.total)


class _Follower:
    """Gives every allocation a number of its own, and finds it again when it is let go."""

    def __init__(self, pieces: dict[int, int]):
        self.pieces = pieces  # numbers of pieces by the basis of what is alike in a piece
        self.sizes: dict[tuple[int, int, Stream], int] = {}
        self.alive: dict[object, list[int]] = {}  # those of one identity, the newest last
        self.count = 0
        self.events: list[tuple[int, int]] = []

    def take(self) -> tuple[tuple[int, int], ...]:
        """What has been followed since the last time."""
        taken, self.events = tuple(self.events), []
        return taken

    def allocate(self, basis: int, size: int, identity: object, stream: Stream = Stream.COMPUTE) -> None:
        self.events.append((self.count, self.sizes.setdefault((basis, size, stream), len(self.sizes))))
        self.alive.setdefault(identity, []).append(self.count)
        self.count += 1

    def release(self, identity: object) -> None:
        self.events.append((self.alive[identity].pop(), RELEASED))

    def put(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self.allocate(tensor.basis, tensor.bytes, tensor.identity, tensor.stream)

    def mark(self, _operation: str, _has_workspace: bool = False) -> None:
        """A moment of a replay: nothing comes or goes."""

    def drop(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self.release(tensor.identity)

    def _count(self, repeat: Repeat) -> int:
        """Pieces that are followed: all, or `MOST_PIECES` of those that leave nothing behind, as the next find what the last found."""
        count = self.pieces[repeat.basis]
        leaves = sum(
            e.happening.value for e in repeat.events if isinstance(e, Change) and e.tensor.basis == repeat.basis
        )
        return count if leaves else min(count, MOST_PIECES)

    def follow(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Repeat):
                count = self._count(event)
                for n in range(count):
                    self.follow(_of_piece(event.events, event.basis, n == 0, n == count - 1))
            elif event.happening is Happening.ALLOCATED:
                self.put(event.tensor)
            elif event.happening is Happening.RELEASED:
                self.drop(event.tensor)
            elif event.other is not None and event.tensor.identity != event.other.identity:
                self.alive.setdefault(event.other.identity, []).append(self.alive[event.tensor.identity].pop())


def _of_piece(events: Sequence[Event], basis: int, first: bool, last: bool) -> Iterable[Event]:
    """Events of one piece: what is the same for all of them, such as a weight's copy or what is whole, comes with the first and goes with the last."""
    changes = [event for event in events if isinstance(event, Change) and event.tensor.basis != basis]
    here = {
        happening: {event.tensor.identity for event in changes if event.happening is happening}
        for happening in (Happening.ALLOCATED, Happening.RELEASED)
    }
    for event in events:
        if isinstance(event, Change) and event.tensor.basis != basis:
            identity = event.tensor.identity
            if event.happening is Happening.ALLOCATED and not first and identity not in here[Happening.RELEASED]:
                continue
            if event.happening is Happening.RELEASED and not last and identity not in here[Happening.ALLOCATED]:
                continue
        yield event


@lru_cache(maxsize=16)
def events_of(step: Step, chunks: Chunks) -> Events:
    """Events of a step in so many pieces."""
    return _Assembly(step, chunks).assemble()


class _Assembly:
    def __init__(self, step: Step, chunks: Chunks):
        self.step, self.recipe = step, step.layout.recipe
        self.follower = _Follower({BASIS.index("bc"): chunks.mlp, BASIS.index("bk"): chunks.loss})
        self.numbers = [weight.numel for weight in step.card_weights_in_order()]
        self.trained = [weight for weight in step.card_weights_in_order() if weight.trained]
        if step.zero is not None:  # one flat tensor of all weights, and a part of it
            self.numbers, self.trained = [1], step.zero.steps

    def assemble(self) -> Events:
        follower, step = self.follower, self.step
        for tensor in step.stays():
            self._of_weights(tensor, self.numbers)
        before = follower.take()
        follower.put(*step.batch())
        for n in range(self.recipe.accumulation):
            self._follow_passes(step.rules(events=True, number=n))
            if n == 0 and self.recipe.sharded and not self.recipe.adapters_are_whole:
                for tensor in step.gradients_between():
                    self._of_weights(tensor, [weight.numel for weight in self.trained], Stream.REDUCE)
        if step.zero is not None and not self.recipe.optimizer_on_host:
            step.zero.follow_step(follower)
        gone = set(self._make_and_release(step.clipping)) if step.steps_at_end else set()
        states_at = len(follower.events)
        if step.steps_at_end:
            last = (
                slice(-1, None) if step.zero is not None else slice(None)
            )  # partitions are stepped one after the other
            each = [(weight, 1) for weight in self.trained[last]]  # in their order
            temporaries = (*optimizer_memory(self.recipe, each).temporaries, *step.rows_to_step)
            gone |= set(self._make_and_release(temporaries))
        alive = [number for numbers in follower.alive.values() for number in numbers]
        first = len(before)
        follower.events += [(n, RELEASED) for n in sorted(alive) if n >= first and n not in gone]
        made = follower.take()
        self._states()
        return Events(before, made, follower.take(), states_at, tuple(follower.sizes), follower.count)

    def _follow_passes(self, rules: Rules) -> None:
        tape, follower = self.step.replayed, self.follower
        ahead = forward(tape, rules, keep=True, prune=False)
        follower.follow(ahead.events)
        follower.drop(*ahead.cached)
        follower.put(grad_of(tape.output))
        follower.follow(backward(tape, rules, prune=False).events)
        follower.follow(finish_reducing(rules).events)

    def _states(self) -> None:
        """A weight's states come together."""
        steps_there = self.recipe.sharding == "fsdp" and self.recipe.optimizer_in_backward
        stream = last_stream(self.recipe) if steps_there else Stream.COMPUTE
        self._allocate(states_in_order(self.recipe, self.trained), stream)

    def _make_and_release(self, made: Iterable[Held]) -> list[int]:
        """Temporaries of a step over all weights: all at once. Returns which allocations these are."""
        numbers = self._allocate(made)
        self.follower.events += [(number, RELEASED) for number in numbers]
        return numbers

    def _allocate(self, made: Iterable[Held], stream: Stream = Stream.COMPUTE) -> list[int]:
        """Allocate each copy for itself. Returns which allocations these are."""
        first = self.follower.count
        for held in made:
            for _ in range(held.copies):
                self.follower.allocate(0, held.bytes // held.copies, held, stream)
        return list(range(first, self.follower.count))

    def _of_weights(self, tensor: Tensor, numbers: Sequence[int], stream: Stream = Stream.COMPUTE) -> None:
        """Allocate what the step model counts in sum, a tensor for each weight."""
        for size in self._divided(tensor, numbers):
            self.follower.allocate(0, size, tensor, stream)

    @staticmethod
    def _divided(tensor: Tensor, numbers: Sequence[int]) -> list[int]:
        """Bytes of a tensor for each weight; all in one where that makes no whole bytes."""
        total = sum(numbers)
        each, rest = divmod(tensor.bytes, total) if total else (0, 1)
        return (
            [tensor.bytes]
            if rest or tensor.role in (Role.WORKSPACE, Role.REDUCED, Role.TOWER)
            else [each * number for number in numbers]
        )
