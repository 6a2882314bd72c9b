"""What torch really allocates on the CPU during a step: every allocation and release, in order, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function

from ..step.instants import Pass
from ..tracing.allocation_diff import MISSING, Allocation, KnownBuffer
from ..tracing.recorder import local_tensor
from ..train.step import TrainingStep
from .instant_hooks import Mark, marking

KeepSize = Callable[[int], bool]

_MARK_PREFIX, _OPERATION_PREFIX = "phase: ", "aten::"


class AllocationEvent(NamedTuple):
    time: int  # nanoseconds
    bytes: int  # less than 0: given back
    phase: str
    address: int
    operations: tuple[str, ...]  # what allocates, outermost first: autograd's nodes, torch's operations
    running: int  # the number of the outermost of torch's operations; 0: none runs


@dataclass
class Allocations:
    """Allocations and releases in the order in which they happened. resident: bytes that were there before, and stay."""

    events: list[AllocationEvent]
    resident: int = 0

    def sequence(self) -> list[Allocation]:
        """The allocations."""
        return [allocation for _, _, allocation in self._lives()]

    def without(self, known: Sequence[KnownBuffer]) -> Allocations:
        """Allocations without the buffers that a list names."""
        omitted = {
            n
            for born, died, a in self._lives()
            if any(buffer.explains(MISSING, a) for buffer in known)
            for n in (born, died)
        }
        return Allocations([event for n, event in enumerate(self.events) if n not in omitted], self.resident)

    def _lives(self) -> list[tuple[int, int, Allocation]]:
        """(number of the event that allocates, of the one that gives back or -1, what is known of it)."""
        lives: list[tuple[int, int, Allocation]] = []
        latest: dict[int, int] = {}
        for n, event in enumerate(self.events):
            if event.bytes > 0:
                latest[event.address] = len(lives)
                lives.append((n, -1, Allocation(event.bytes, " > ".join(event.operations))))
            else:
                index = latest.pop(event.address)
                born, _, allocation = lives[index]
                inside = event.running == self.events[born].running != 0
                lives[index] = born, n, allocation._replace(inside=inside)
        return lives

    def sizes(self) -> set[int]:
        """Bytes of every single allocation."""
        return {e.bytes for e in self.events if e.bytes > 0}

    def peak(self, phase: str = "", keep: KeepSize = lambda size: True) -> int:
        """The most bytes alive at once in a phase (or ever), in blocks of a size to `keep`, beside what is resident."""
        totals = accumulate(e.bytes if keep(abs(e.bytes)) else 0 for e in self.events)
        return max((t for t, e in zip(totals, self.events, strict=True) if e.phase.startswith(phase)), default=0)

    def peaks(self) -> dict[str, int]:
        """The most bytes alive at once in each phase, with what is resident; what a phase begins with, if it allocates nothing."""
        peaks: dict[str, int] = {}
        allocating = {event.phase for event in self.events if event.bytes > 0}
        total = self.resident
        for event in self.events:
            before, total = total, total + event.bytes
            peaks[event.phase] = max(total if event.phase in allocating else before, peaks.get(event.phase, 0))
        return peaks


def record_allocations(run_step: Callable[[Mark], object]) -> Allocations:
    """`run_step` is called with a function that says which phase begins: `mark("backward")`. What it returns is kept to the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run_step(_mark_phase)
    del result
    profiled: Any = profiler.profiler
    events = sorted(_walk_events(profiled.kineto_results.experimental_event_tree()), key=lambda e: e.time)
    return Allocations(list(_omit_earlier(_assign_phases(events))))


def record_step(step: TrainingStep) -> Allocations:
    """One step on the CPU, its phases named as the step model's instants. Not the first, which makes the optimizer's states."""
    resident = resident_bytes(step)

    def run(mark: Mark) -> None:
        with marking(step, mark) as begin:
            begin(Pass.FORWARD)
            step.tokens, step.labels = step.tokens.clone(), step.labels.clone()  # made anew for every step
            step.images = {name: tensor.clone() for name, tensor in step.images.items()}
            step.run(begin)

    allocations = record_allocations(run)
    allocations.resident = resident
    return allocations


def storage_bytes(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of each of the tensors' storages, by its address; of distributed tensors the shard that is here."""
    storages = (local_tensor(tensor).untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def resident_bytes(step: TrainingStep) -> int:
    """Bytes that are there between steps: of `resident_tensors`, and of DDP's buckets."""
    return sum(storage_bytes(resident_tensors(step)).values()) + step.gradient_buckets_bytes


def resident_tensors(step: TrainingStep) -> Iterator[torch.Tensor]:
    """Weights, buffers and the optimizer's states."""
    yield from step.model.parameters()
    yield from step.model.buffers()
    for optimizer in [*step.backward_optimizers, *([step.optimizer] if step.optimizer is not None else [])]:
        for state in optimizer.state.values():
            yield from (part for value in state.values() if torch.is_tensor(value) for part in _parts_of(value))


def _parts_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor; of one made of others, as torchao's quantised states are, those."""
    if isinstance(tensor, DTensor) or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
    else:
        yield from (part for name in tensor.__tensor_flatten__()[0] for part in _parts_of(getattr(tensor, name)))


def managed_bytes(step: TrainingStep) -> int:
    """Bytes of states in CUDA's managed memory, which bitsandbytes' paged optimizers have there, beside torch's allocator."""
    return sum(tensor.nbytes for tensor in resident_tensors(step) if getattr(tensor, "is_paged", False))


def _mark_phase(phase: str) -> None:
    with record_function(_MARK_PREFIX + phase):
        pass


def _walk_events(tree: Sequence[Any], operations: tuple[str, ...] = (), running: int = 0) -> Iterator[AllocationEvent]:
    for event in tree:
        if event.name == "[memory]":
            yield AllocationEvent(
                event.start_time_ns, event.extra_fields.alloc_size, "", event.extra_fields.ptr, operations, running
            )
        elif event.name.startswith(_MARK_PREFIX):
            yield AllocationEvent(event.start_time_ns, 0, event.name.removeprefix(_MARK_PREFIX), 0, (), 0)
        inner = running or (event.id if event.name.startswith(_OPERATION_PREFIX) else 0)
        yield from _walk_events(event.children, (*operations, _short_name(event.name)), inner)


def _short_name(name: str) -> str:
    return name.removeprefix(_OPERATION_PREFIX).removeprefix("autograd::engine::evaluate_function: ")


def _assign_phases(events: Iterable[AllocationEvent]) -> Iterator[AllocationEvent]:
    phase = ""
    for event in events:
        if event.bytes:
            yield event._replace(phase=phase)
        else:
            phase = event.phase


def _omit_earlier(events: Iterable[AllocationEvent]) -> Iterator[AllocationEvent]:
    """Allocations without the release of what was there before."""
    addresses: set[int] = set()
    for event in events:
        if event.bytes > 0:
            addresses.add(event.address)
            yield event
        elif event.address in addresses:
            addresses.remove(event.address)
            yield event
