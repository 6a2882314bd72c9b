"""A step whose saved tensors are kept in CPU RAM, as TRL's activation_offloading keeps them (trl/models/activation_offloading.py).

Autograd hands every tensor that it saves to a hook, in the order in which operations save, parameters too. What the hook does
with the n-th of them:

- a parameter, or less than 1,024 bytes: it stays;
- a tensor in memory that an earlier one lies in, if that one was seen within the last five or stayed itself: it stays, until backward is done with it;
- else it is copied to CPU RAM. What lies in memory in another order than its axes, or is a part of something, is copied on the device first. The
  tensor, or that copy, stays until the next one is copied of those that come five or more later.

In backward an operation's tensors come back when it begins. They stay until the next operation that any come back for is done.
What forward's last five left is there until the first such operation is done, and comes back if it is needed after that. The head's own
tensors stay. So what several operations save, one after the other, never leaves: a norm's input in fp32, what Q, K and V
or gate and up are made of, attention's output.

A checkpoint saves its input, and what it drops is not seen here. cos and sin, which all layers save, stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from .instants import Stage
from .roles import Role
from .selection import WeightKind
from .tape import BASIS, ITEMSIZE, Op, Tape, Tensor, kept_by

IN_FLIGHT = 5
"""max_fwd_stash_size."""
SMALLEST = 1024
"""min_offload_size, in bytes."""


class Offloaded(NamedTuple):
    """A step's tape, its layers written out, and what lies in CPU RAM at the end of its forward pass."""

    tape: Tape
    on_host: tuple[Tensor, ...]


def offload_saved(tape: Tape) -> Offloaded:
    """The tape of a step (`autograd.record_step`) with its saved tensors on the host."""
    given = {tensor for op in tape.ops if op.part is not None for tensor in op.part.arguments}
    hook = _Hook(given)
    for op in _written_out(tape):
        hook.see(op)
    return Offloaded(replace(tape, ops=tuple(hook.close())), tuple(hook.on_host))


# ---- layers written out ---------------------------------------------------------------------------------------------


def _written_out(tape: Tape) -> Iterator[Op]:
    """Operations one by one, those of layers that are not checkpointed too, each layer with tensors of its own."""
    for op in tape.ops:
        part = op.part
        if part is None or part.recompute or part.chunked or part.in_forward:
            yield op
            continue
        tensors: dict[Tensor, Tensor] = dict(zip(part.tape.sources, op.reads, strict=True))
        tensors |= zip(part.tape.outputs, op.makes, strict=False)
        for n, inner in enumerate(part.tape.ops):
            made = _renamed(inner, tensors, op.stage)
            kept = part.arguments if n == 0 and part.records else ()
            held = op.reads[:1] if n == len(part.tape.ops) - 1 else ()  # by the caller
            yield replace(made, keeps=(*made.keeps, *kept), holds=(*made.holds, *kept, *held))


def _renamed(op: Op, tensors: dict[Tensor, Tensor], stage: Stage | None) -> Op:
    """An operation on a layer's own tensors: `tensors` by those of the layer that stands for all alike."""

    def own(tensor: Tensor) -> Tensor:
        if tensor not in tensors:
            base = own(tensor.storage) if tensor.storage is not tensor else None
            made = Tensor(
                tensor.name,
                tensor.shape,
                tensor.dtype,
                tensor.basis,
                tensor.bytes,
                base,
                role=tensor.role,
                cached=tensor.cached,
            )
            tensors[tensor] = made
        return tensors[tensor]

    def all_own(several: Iterable[Tensor]) -> tuple[Tensor, ...]:
        return tuple(map(own, several))

    part = op.part
    if part is not None:
        part = replace(part, arguments=all_own(part.arguments), wanted=all_own(part.wanted))
    return replace(
        op,
        reads=all_own(op.reads),
        makes=all_own(op.makes),
        keeps=all_own(op.keeps),
        holds=all_own(op.holds),
        grads=tuple((own(tensor), gradient) for tensor, gradient in op.grads),
        part=part,
        stage=stage,
    )


# ---- the hook -------------------------------------------------------------------------------------------------------


class _Sent(NamedTuple):
    """A tensor that was copied to CPU RAM: what stays of it on the device for a while, and what is known by its memory."""

    here: Tensor
    memory: Tensor


class _Hook:
    """What happens to the tensors that operations save, in order."""

    def __init__(self, given: set[Tensor]) -> None:
        self.given = given  # to all layers, so that it stays
        self.ops: list[Op] = []
        self.number = 0  # of tensors seen
        self.in_flight: dict[int, _Sent] = {}
        self.latest: dict[Tensor, int] = {}  # by memory, the number of the tensor that was last seen there
        self.sent: dict[int, list[tuple[int, Tensor]]] = {}  # by place of the operation: numbers, and tensors
        self.on_host: list[Tensor] = []

    def see(self, op: Op) -> None:
        """An operation saves what it is given before it runs, and its results after."""
        if op.flops and any(WeightKind.HEAD in weight.kinds for weight in op.weights):
            self.ops.append(op)
            return
        made = {tensor.storage for tensor in op.makes}
        saved = [tensor for tensor in kept_by(op) if tensor not in self.given]
        if _looks_up_tokens(op):
            saved.append(Tensor("token ids", "b s", "int64", BASIS.index("bs"), ITEMSIZE["int64"], role=Role.BATCH))
        sent: list[tuple[int, Tensor]] = []
        stay = [tensor for tensor in kept_by(op) if tensor in self.given and op.part is None]
        self.on_host += [tensor for tensor in stay if tensor not in self.on_host]  # sent once, in vain
        stay += [tensor for tensor in saved if tensor.storage not in made and self._stays(tensor, op, sent)]
        self.number += _parameters(op)
        place = len(self.ops)
        self.ops.append(op)
        stay += [tensor for tensor in saved if tensor.storage in made and self._stays(tensor, op, sent)]
        part = replace(op.part, packed=True) if op.part is not None else None
        self.ops[place] = replace(self.ops[place], keeps=tuple(stay), part=part)
        if sent:
            self.sent[place] = sent

    def _stays(self, tensor: Tensor, op: Op, sent: list[tuple[int, Tensor]]) -> bool:
        """Whether a tensor that an operation saves stays on the device; else it is among those that are sent."""
        self.number += 1
        tensor = min(tensor, tensor.storage, key=lambda t: t.bytes)  # of one head repeated for all, the one
        memory = tensor if tensor.storage is not tensor and tensor.bytes < tensor.storage.bytes else tensor.storage
        if memory in self.latest:
            self.latest[memory] = self.number
            return True
        if tensor.basis == 0 and tensor.bytes < SMALLEST:
            return True
        here = tensor
        if _is_copied_first(tensor, op):
            here = Tensor(
                tensor.name + ", copied", tensor.shape, tensor.dtype, tensor.basis, tensor.bytes, role=tensor.role
            )
            self.ops.append(Op("copy of " + tensor.name, (tensor,), (here,), stage=op.stage))
        self._release()
        self.in_flight[self.number] = _Sent(here, memory)
        self.latest[memory] = self.number
        sent.append((self.number, tensor))
        self.on_host.append(tensor)
        return False

    def _release(self) -> None:
        """Let go of what was sent five or more before: the latest operation is the last that it lives through."""
        for number in [n for n in self.in_flight if n <= self.number - IN_FLIGHT]:
            sent = self.in_flight.pop(number)
            self.ops[-1] = replace(self.ops[-1], holds=(*self.ops[-1].holds, sent.here))
            if self.latest.get(sent.memory) == number:
                del self.latest[sent.memory]

    def close(self) -> list[Op]:
        """The operations, with what comes back for the backward of each."""
        left, first = dict(self.in_flight), True
        for place in sorted(self.sent, reverse=True):
            op = self.ops[place]
            if first:  # what is left of forward stays until this is done
                here = tuple(sent.here for sent in left.values())
                op = replace(op, keeps=(*op.keeps, *here))
            back = [tensor for number, tensor in self.sent[place] if not first or number not in left]
            self.ops[place] = replace(op, fetched=tuple(map(_come_back, back)))
            first = False
        return self.ops


def _come_back(tensor: Tensor) -> Tensor:
    name = tensor.name + ", back from CPU RAM"
    return Tensor(name, tensor.shape, tensor.dtype, tensor.basis, tensor.bytes, role=tensor.role)


def _looks_up_tokens(op: Op) -> bool:
    return bool(op.trained) and not op.reads and WeightKind.EMBEDDINGS in op.weights[0].kinds


def _parameters(op: Op) -> int:
    """Parameters that an operation saves: for the gradient of what it multiplies them with."""
    if op.flops:
        return int(bool(op.weights and op.grads and not op.cast))
    return len(op.weights) if op.grads else 0


def _is_copied_first(tensor: Tensor, op: Op) -> bool:
    """Whether it is no contiguous piece of memory from its start: a part of another tensor; heads of projections, which attention takes
    turned; a weight's copy, which a product takes transposed."""
    if op.kernel and tensor.shape.split()[-2] in ("H", "G"):
        return True
    return tensor.storage is not tensor or (op.cast and tensor.basis == 0)
