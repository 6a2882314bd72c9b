"""Autograd's memory, without autograd: a forward pass written down as operations, and what lives at every moment of it.

A `Tape` lists operations in the order a model's code runs them. Each says which tensors it reads, which it makes, which
it keeps for backward, and what its backward makes. `forward` and `backward` then replay PyTorch's rules and return the
live bytes at every moment:

- a tensor lives until its last reader in forward has run, or, when kept for backward, until the backward of its keepers;
- the backward of an operation holds the incoming gradient, what was kept, the gradients it makes and its own temporaries at once;
- a gradient that reaches a tensor twice is added in place (torch/csrc/autograd/input_buffer.cpp);
- a checkpointed part keeps its input only, and in backward is run again up to the last tensor that backward needs
  (torch.utils.checkpoint, non-reentrant, early stop).

Bytes are not numbers here but vectors over `BASIS`, so that one replay serves every batch, length and number of chunks.
Parts that repeat are replayed once. `tests/step/test_steps.py` replays every layer one by one and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

from .instants import Stage
from .roles import Purpose, Role
from .selection import Kinds
from .workspaces import Spans, Workspace

ITEMSIZE = {"complex64": 8, "float32": 4, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1, "uint8": 1}

# What bytes can grow with: b sequences, s tokens each, c tokens in an MLP chunk, k in a loss chunk,
# r = s rounded up to 128 (the rows of a flash-attention workspace), p = whole tens of the b s tokens.
BASIS = ("", "bs", "bc", "bk", "bss", "ss", "s", "br", "p")
Vector = tuple[int, ...]
ZERO: Vector = (0,) * len(BASIS)
_SYMBOLS = frozenset("bsckrp")


def add(u: Vector, v: Vector) -> Vector:
    return tuple(map(int.__add__, u, v))


@lru_cache(maxsize=4096)
def axes_of(shape: str) -> tuple[int, tuple[str, ...]]:
    """(index into BASIS, the axes whose sizes do not change) of a shape such as "b s d"."""
    axes = shape.split()
    symbols = "".join(sorted((a for a in axes if a in _SYMBOLS), key="bckprs".index))
    return BASIS.index(symbols), tuple(a for a in axes if a not in _SYMBOLS)


class Label(NamedTuple):
    """Label that tells tensors apart in a listing."""

    name: str
    shape: str
    dtype: str
    basis: int
    bytes: int
    role: Purpose | None = None


Alive = tuple[tuple[Label, int], ...]  # tensors, and how many of each


class Tensor:
    """A tensor of a step. `shape` names its axes, e.g. "b s I"; `bytes` are per unit of BASIS[basis].

    A view shares the `storage` of another tensor. `cached`: a cast weight that autocast keeps until the end of forward.
    `gradient_of`: of a gradient that comes and goes under objects of its own, whose it is.
    """

    __slots__ = ("basis", "bytes", "cached", "dtype", "gradient_of", "name", "role", "shape", "storage")

    def __init__(
        self,
        name: str,
        shape: str,
        dtype: str,
        basis: int,
        bytes: int,
        base: Tensor | None = None,
        *,
        role: Purpose | None = None,
        cached: bool = False,
        gradient_of: Tensor | Weight | None = None,
    ):
        self.name, self.shape, self.dtype, self.basis, self.bytes = name, shape, dtype, basis, bytes
        self.storage: Tensor = base.storage if base is not None else self
        self.cached, self.role, self.gradient_of = cached, role, gradient_of

    @property
    def identity(self) -> object:
        """What stays the same of it between its coming and its going, which two objects may stand for."""
        return self if self.gradient_of is None else (self.gradient_of, self.dtype)

    @property
    def label(self) -> Label:
        return Label(self.name, self.shape, self.dtype, self.basis, self.bytes, self.role)


@dataclass(frozen=True, eq=False, repr=False)
class Weight:
    """A parameter: shape in numbers, and the share of it that one token uses (below 1 for routed experts)."""

    name: str  # within its layer, or within the model
    shape: tuple[int, ...]
    active: tuple[int, int] = (1, 1)  # numerator, denominator
    kinds: Kinds = frozenset()
    trained: bool = True  # False: frozen, it gets no gradient

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


Receiver = Tensor | Weight
"""What gets a gradient."""


class ForGradients(NamedTuple):
    """What an operation keeps and makes for gradients that are wanted: `autograd.py` chooses of it, and leaves none."""

    keeps: tuple[tuple[Tensor, Receiver], ...] = ()  # (tensor, whose gradient it is kept for)
    back_temps: tuple[tuple[Tensor, Receiver], ...] = ()
    all: bool = False  # its backward makes all of `grads`, those that nobody wants as well


NONE = ForGradients()


class WeightWorkspace(NamedTuple):
    """A kernel's workspace while it makes the gradient of a weight; tokens: those that it grows with, as BASIS calls them."""

    weight: Weight
    kernel: Workspace
    tokens: str


class Joined(NamedTuple):
    """A weight whose gradient waited for the one of another use (tied embeddings), and is added to it here.

    is_view: of a matrix product's, transposed; adding to it makes a new tensor.
    """

    weight: Weight
    is_view: bool


@dataclass(frozen=True, eq=False, repr=False)
class Op:
    """An operation of the forward pass, and what its backward keeps and makes. What few have is in `for_gradients`, `joins`, `part`."""

    name: str  # for people: nothing is found by it
    reads: tuple[Tensor, ...]
    makes: tuple[Tensor, ...]
    keeps: tuple[Tensor, ...] = ()  # for its backward
    temps: tuple[Tensor, ...] = ()  # only while it runs
    grads: tuple[tuple[Tensor, Tensor | None], ...] = ()  # (input, its gradient); None: passes the incoming one on
    back_temps: tuple[Tensor, ...] = ()
    late_temps: tuple[Tensor, ...] = ()  # alive in its backward only while what it kept still is (see Rules.recomputed)
    for_gradients: ForGradients = NONE
    holds: tuple[Tensor, ...] = ()  # variables that the code still holds here, though it reads them no more
    weights: tuple[Weight, ...] = ()
    workspaces: tuple[WeightWorkspace, ...] = ()
    flops: tuple[tuple[int, int], ...] = ()  # (basis, operations) of its forward; of several, the least holds
    cast: bool = False  # its weights are used through autocast's bf16 copies
    product: bool = False  # of its weights as they are: their gradients can go into a sum (mstplan/train/grad_sums.py)
    adds_bias: bool = False  # in the product itself, by cuBLASLt
    defers: bool = False  # its weight's gradient waits for the weight's other use
    joins: Joined | None = None
    part: Part | None = None  # this operation is a part with a tape of its own
    stage: Stage | None = None  # of the step that it belongs to; None within a part

    @property
    def trained(self) -> tuple[Weight, ...]:
        """Weights of its own that get gradients."""
        return tuple(weight for weight in self.weights if weight.trained)

    @property
    def fetches(self) -> bool:
        """Whether its backward begins with an input that comes back from the host."""
        return self.part is not None and self.part.offload and self.part.records

    @property
    def interior(self) -> bool:
        """Whether its moments lie between its neighbours'."""
        return self.part is not None and self.part.interior

    @property
    def group(self) -> Group | None:
        """Weights that are gathered for it."""
        return self.part.group if self.part is not None else None

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer of the step, or several that are checkpointed together."""
        return self.stage is not None and self.stage.is_layer

    @property
    def where(self) -> str:
        """Text that its inner operations' names begin with: nothing for a layer, which the instant tells already."""
        return "" if self.is_layer else self.name


@dataclass(frozen=True, eq=False, repr=False)
class Group:
    """Weights that FSDP2 gathers and scatters together (`sharding.py`), and what it makes for them."""

    gathered: Tensor
    buffer: Tensor  # of the all-gather
    copy_in: Tensor | None  # the shards in the dtype that is gathered, where that is another one
    gradients: tuple[Tensor, ...]  # whole
    scatter: Tensor  # the reduce-scatter's input
    shards: Tensor  # its output, the gradients' shards
    last_gradient: Tensor | None  # of the gradients, one that a variable holds until all is done
    stay: bool  # until the optimizer's step; else they are added to ones that exist, or used at once
    temporaries: Tensor  # of the optimizer, where it steps in backward


@dataclass(frozen=True, eq=False, repr=False)
class Part:
    """A stretch of the forward pass that is replayed as one operation.

    recompute: keeps its input only, and runs again in backward (checkpointing).
    chunked: its tape is one piece of the sequence; output and, in backward, the input's gradient are held whole while
        the pieces run one after the other.
    sums: fp32 sums of the weights' gradients over the pieces, where there are several.
    offload: the input it would keep lives in CPU RAM.
    in_forward: gradients are made in the forward pass already (the chunked loss), so that nothing else is kept.
    arguments: tensors it is given beside its input, which are kept for its backward as well.
    records, wants_input: whether backward comes to it at all, and whether its input's gradient is wanted (`autograd.py`).
    interior: neighbours on both sides run the same part: its moments lie between theirs.
    group: its weights are gathered for it.
    """

    tape: Tape
    recompute: bool = False
    chunked: bool = False
    sums: tuple[Tensor, ...] = ()
    in_forward: bool = False
    offload: bool = False
    arguments: tuple[Tensor, ...] = ()
    records: bool = True
    wants_input: bool = True
    interior: bool = False
    group: Group | None = None

    @property
    def trained(self) -> tuple[Weight, ...]:
        """Weights of its own that get gradients."""
        return tuple(weight for op in self.tape.ops for weight in op.trained)


@dataclass(frozen=True, eq=False, repr=False)
class Tape:
    """A forward pass, written down: it changes no more. Without a `source` it begins with what no operation made."""

    dims: Mapping[str, int]
    ops: tuple[Op, ...]
    output: Tensor
    source: Tensor | None = None  # the tensor that comes in and stays the caller's
    group: Group | None = None  # of the weights that are outside of parts with a group; gathered throughout
    in_transfer: Tensor | None = (
        None  # an offloaded input: in backward, of the part before the one at hand; of the last part in the loss
    )


class TapeWriter:
    """A tape while it is written. dims: sizes of the axes that do not change.

    role: of the tensors that are made from now on; stage: of the operations. `build_tape` gives the tape.
    """

    def __init__(self, dims: dict[str, int], stage: Stage | None = None):
        self.dims, self.stage = dims, stage
        self.role: Purpose | None = None
        self.ops: list[Op] = []
        self.source: Tensor | None = None
        self.output: Tensor | None = None

    def build_tape(self) -> Tape:
        assert self.output is not None
        return Tape(MappingProxyType(dict(self.dims)), tuple(self.ops), self.output, self.source)

    def new(self, name: str, shape: str, dtype: str, base: Tensor | None = None, *, cached: bool = False) -> Tensor:
        """base: the tensor that it is a view of; cached: as of `Tensor`."""
        return tensor_of(self.dims, name, shape, dtype, base, role=self.role, cached=cached)

    def grad(self, tensor: Tensor) -> Tensor:
        return _like_grad(tensor)

    def view(self, tensor: Tensor, name: str, shape: str) -> Tensor:
        return self.new(name, shape, tensor.dtype, tensor)

    def op(self, name: str, reads: Iterable[Tensor], *makes: Tensor, **more: object) -> Tensor:
        return self.add(Op(name, tuple(reads), makes, stage=self.stage, **more))  # type: ignore[arg-type]

    def add(self, op: Op) -> Tensor:
        """Append an operation; its output is the tape's."""
        self.ops.append(op)
        self.output = op.makes[0]
        return op.makes[0]

    def hold(self, *tensors: Tensor) -> None:
        """Variables of the code at hand that live at least until the latest operation is done."""
        self.ops[-1] = replace(self.ops[-1], holds=self.ops[-1].holds + tensors)

    @contextmanager
    def assign_role(self, role: Purpose | None) -> Iterator[None]:
        """Give what is made inside that role."""
        before, self.role = self.role, role
        try:
            yield
        finally:
            self.role = before


def tensor_of(
    dims: Mapping[str, int],
    name: str,
    shape: str,
    dtype: str,
    base: Tensor | None = None,
    *,
    role: Purpose | None = None,
    cached: bool = False,
) -> Tensor:
    """A tensor whose bytes follow from its shape; base: the one that it is a view of."""
    basis, axes = axes_of(shape)
    size = ITEMSIZE[dtype]
    for axis in axes:
        size *= int(axis) if axis.isdigit() else dims[axis]
    return Tensor(name, shape, dtype, basis, size, base, role=role, cached=cached)


def _like_grad(tensor: Tensor, gradient_of: Tensor | None = None) -> Tensor:
    name = "grad of " + tensor.name
    return Tensor(
        name, tensor.shape, tensor.dtype, tensor.basis, tensor.bytes, role=tensor.role, gradient_of=gradient_of
    )


def grad_of(tensor: Tensor) -> Tensor:
    """The gradient of a tensor: the same one whenever asked."""
    return _like_grad(tensor, tensor)


class Moment(NamedTuple):
    """Live bytes at one moment, relative to where the replay began."""

    live: Vector
    operation: str  # its name, for people
    alive: Alive  # when detail was asked for
    stage: Stage | None = None  # of the step
    has_workspace: bool = False  # of a kernel, while it makes a weight's gradient


class Happening(Enum):
    """What happens to a tensor in a replay."""

    ALLOCATED = 1
    RELEASED = -1
    RENAMED = 0


class Repeat(NamedTuple):
    """What is done once for every piece of the sequence. basis: of what is alike in a piece, "bc" or "bk"."""

    basis: int
    events: tuple[Event, ...]


class Change(NamedTuple):
    """A tensor comes, goes, or is from now on known as another."""

    happening: Happening
    tensor: Tensor
    other: Tensor | None = None


Event = Change | Repeat


class Replay(NamedTuple):
    moments: tuple[Moment, ...]
    net: Vector  # live bytes at the end
    alive: Alive  # behind `net`, when detail was asked for
    cached: tuple[Tensor, ...] = ()  # the part of `net` that autocast's cache lets go at the end of forward
    events: tuple[Event, ...] = ()  # when they were asked for


class Rules(NamedTuple):
    """Rules of a replay: how weights' gradients are treated, and how much is written down.

    gradients: "kept" until the optimizer's step, "added" to ones that exist already (accumulation), or "used" at once
    (optimizer in backward), with `temporaries` bytes per element for the optimizer while it steps one weight.
    """

    gradients: str = "kept"
    dtype: str = "bfloat16"  # of weights and their gradients
    cast: bool = False  # weights are cast to bf16 where they are used, so gradients arrive in bf16 first
    temporaries: int = 0
    detail: bool = False  # list the tensors behind every moment
    events: bool = False  # write down what comes and goes, in order, and no moments
    every_moment: bool = False  # keep moments that can never be the largest, and replay repeated parts anew
    recomputed: bool = (
        False  # checkpoint hands kept tensors out for the function only: they are gone when gradients are cast
    )
    in_place: bool = True  # False: as under fake tensors, where autograd adds gradients out of place
    summing: bool = (
        False  # gradients are summed over pieces, and those of matrix products are never there by themselves
    )
    spans: Spans | None = None  # of the tokens, for workspaces of kernels; None: without them


class _Ledger:
    """A running sum of live bytes and its moments."""

    __slots__ = ("alive", "events", "live", "moments", "rules", "stage")

    def __init__(self, rules: Rules):
        self.live = [0] * len(BASIS)
        self.moments: list[Moment] = []
        self.alive: dict[Label, int] = {}
        self.events: list[Event] = []
        self.rules = rules
        self.stage: Stage | None = None

    def put(self, tensor: Tensor) -> None:
        self._count(tensor, 1)
        if self.rules.events:
            self.events.append(Change(Happening.ALLOCATED, tensor))

    def drop(self, tensor: Tensor) -> None:
        self._count(tensor, -1)
        if self.rules.events:
            self.events.append(Change(Happening.RELEASED, tensor))

    def _count(self, tensor: Tensor, count: int) -> None:
        self.live[tensor.basis] += count * tensor.bytes
        if self.rules.detail:
            label = tensor.label
            self.alive[label] = self.alive.get(label, 0) + count

    def rename(self, tensor: Tensor, other: Tensor) -> None:
        """List a tensor as another from now on: the same memory, which stays where it is."""
        self._count(tensor, -1)
        self._count(other, 1)
        if self.rules.events:
            self.events.append(Change(Happening.RENAMED, tensor, other))

    def mark(self, operation: str, has_workspace: bool = False) -> None:
        if self.rules.events:
            return
        alive = tuple(self.alive.items())
        self.moments.append(Moment(tuple(self.live), operation, alive, self.stage, has_workspace))

    def splice(self, replay: Replay, where: str = "", *, moments: bool = True) -> None:
        """Take over what another replay found, begun from here."""
        base = tuple(self.live)
        alive_before = tuple(self.alive.items())
        for live, operation, alive, _, has_workspace in replay.moments if moments else ():
            listed = merged(alive_before, alive) if self.rules.detail else ()
            self.moments.append(Moment(add(base, live), _within(where, operation), listed, self.stage, has_workspace))
        self.live = list(add(base, replay.net))
        self.events += replay.events
        if self.rules.detail:
            self.alive = dict(merged(alive_before, replay.alive))

    def repeat(self, basis: int, start: int) -> None:
        """Have what was written down since `start` happen for every piece."""
        if self.rules.events:
            self.events[start:] = [Repeat(basis, tuple(self.events[start:]))]

    def replay(self, cached: Iterable[Tensor] = ()) -> Replay:
        alive = tuple(self.alive.items())
        return Replay(tuple(self.moments), tuple(self.live), alive, tuple(cached), tuple(self.events))


def _within(where: str, operation: str) -> str:
    return f"{where}: {operation}" if where else operation


def merged(*alive: Iterable[tuple[Label, int]]) -> Alive:
    counts: dict[Label, int] = {}
    for group in alive:
        for label, count in group:
            counts[label] = counts.get(label, 0) + count
    return tuple((label, count) for label, count in counts.items() if count)


def undominated(moments: Sequence[Moment]) -> tuple[Moment, ...]:
    """The moments that can be the largest for some batch, length and chunks: none exceeded by another in every term, or by a mix of two
    that differ from it in the constant and in tokens only, as layers one after the other do."""
    largest: list[Moment] = []
    tried: list[Vector] = []  # the same, those first that exceeded others last: neighbours are exceeded by the same one
    alike: dict[Vector, list[Moment]] = {}
    for moment in moments:
        alike.setdefault(moment.live[2:], []).append(moment)
    for moment in sorted(
        (m for group in alike.values() for m in _corners(group)), key=lambda m: sum(m.live), reverse=True
    ):
        live = moment.live
        larger = next((i for i, other in enumerate(tried) if all(map(int.__ge__, other, live))), None)
        if larger is None:
            largest.append(moment)
            tried.append(live)
        elif larger:
            tried.insert(0, tried.pop(larger))
    return tuple(largest)


def _corners(moments: Sequence[Moment]) -> list[Moment]:
    """Moments that are the largest for some weights of the first two terms: the corners of their convex hull, upwards."""
    if len(moments) < 3:
        return list(moments)
    corners: list[Moment] = []
    for moment in sorted(moments, key=lambda m: m.live[:2], reverse=True):
        x, y = moment.live[:2]
        if corners and y <= corners[-1].live[1]:
            continue
        while len(corners) > 1:
            (ax, ay), (bx, by) = corners[-2].live[:2], corners[-1].live[:2]
            if (bx - ax) * (y - ay) > (by - ay) * (x - ax):
                break
            corners.pop()
        corners.append(moment)
    return corners


class _Groups:
    """Tensors that FSDP2 holds beside a tape's own: in forward and in backward, before and after each part with a group."""

    def __init__(self, tape: Tape, ledger: _Ledger):
        self.rest, self.ledger = tape.group, ledger
        self.order = [op.group for op in tape.ops if op.group is not None]
        self.buffer: Tensor | None = None
        self.scatter: Tensor | None = None

    def begin_forward(self) -> None:
        if self.rest is not None:
            self._gather_now(self.rest, "embedding", listed=True)

    def before_forward(self, op: Op, listed: bool) -> None:
        if op.group is not None:
            self._gather_now(op.group, op.where, listed)

    def after_forward(self, op: Op) -> None:
        if op.group is not None:
            self.ledger.drop(op.group.gathered)

    def end_forward(self) -> None:
        self._replace_buffer(None)

    def begin_backward(self) -> None:
        if self.rest is not None and self.order:
            self._gather(self.order[-1], "backward of the loss", listed=True)
            self.buffer = self.order[-1].buffer

    def before_backward(self, op: Op, listed: bool) -> None:
        if op.group is None:
            return
        self.order.pop()
        self.ledger.put(op.group.gathered)
        if listed:
            self.ledger.mark(_within(op.where, "copy out of the all-gather"))
        self._replace_buffer(None)
        if self.order:
            self._gather(self.order[-1], op.where, listed)
            self.buffer = self.order[-1].buffer

    def after_backward(self, op: Op, listed: bool) -> None:
        if op.group is not None:
            self._scatter(op.group, op.where, listed)

    def end_backward(self) -> None:
        if self.rest is not None:
            self._scatter(self.rest, "backward of embedding", listed=True)
        if self.scatter is not None:
            self.ledger.drop(self.scatter)

    def _gather(self, group: Group, where: str, listed: bool) -> None:
        copies = [group.copy_in] if group.copy_in is not None else []
        for tensor in (*copies, group.buffer):
            self.ledger.put(tensor)
        if listed:
            self.ledger.mark(_within(where, "all-gather"))
        for tensor in copies:
            self.ledger.drop(tensor)

    def _gather_now(self, group: Group, where: str, listed: bool) -> None:
        """Gather a group in forward: the buffer of the group before stays until this one's is copied out (a variable of wait_for_unshard)."""
        self._gather(group, where, listed)
        self.ledger.put(group.gathered)
        if listed:
            self.ledger.mark(_within(where, "copy out of the all-gather"))
        self._replace_buffer(group.buffer)

    def _replace_buffer(self, buffer: Tensor | None) -> None:
        if self.buffer is not None:
            self.ledger.drop(self.buffer)
        self.buffer = buffer

    def _scatter(self, group: Group, where: str, listed: bool) -> None:
        ledger = self.ledger
        ledger.drop(group.gathered)
        if self.scatter is not None:
            ledger.drop(self.scatter)
        ledger.put(group.scatter)
        if listed:
            ledger.mark(_within(where, "copy in of the reduce-scatter"))
        for gradient in group.gradients:
            ledger.drop(gradient)
        last_gradients = [group.last_gradient] if group.last_gradient is not None else []
        for tensor in (*last_gradients, group.shards, group.temporaries):
            ledger.put(tensor)
        if listed:
            ledger.mark(_within(where, "reduce-scatter"))
        for tensor in last_gradients:
            ledger.drop(tensor)
        ledger.drop(group.temporaries)
        if not group.stay:
            ledger.drop(group.shards)
        self.scatter = group.scatter


def forward(tape: Tape, rules: Rules, *, keep: bool, recomputing: bool = False, prune: bool = True) -> Replay:
    """Replay the forward pass. keep: autograd records; recomputing: stop at the last tensor that backward needs;
    prune: of the moments, only those that can be the largest."""
    return _memo(tape, ("forward", rules, keep, recomputing, prune), lambda: _forward(tape, rules, keep, recomputing))


def backward(
    tape: Tape,
    rules: Rules,
    *,
    recompute: bool = False,
    fetch: bool = False,
    owns_incoming: bool = True,
    prune: bool = True,
    end_of: Tape | None = None,
) -> Replay:
    """Replay the backward pass; the incoming gradient is alive already, and let go here if `owns_incoming`.

    recompute: the forward pass is run again first, when backward comes to the first operation that kept something.
    fetch: from an input that comes from the host for that, and goes when nothing of the layer keeps it.
    end_of: the tape that is run again in that way, and that this one is the end of.
    """
    key = ("backward", rules, recompute, fetch, owns_incoming, ref(end_of) if end_of is not None else None, prune)
    return _memo(tape, key, lambda: _backward(tape, rules, tape if recompute else end_of, fetch, owns_incoming))


def _memo(tape: Tape, key: tuple[object, ...], replay: Callable[[], Replay]) -> Replay:
    rules, prune = key[1], key[-1]
    assert isinstance(rules, Rules)
    if rules.every_moment:
        return replay()
    memo = _REPLAYS.setdefault(tape, {})
    if key not in memo:
        result = replay()
        memo[key] = result._replace(moments=undominated(result.moments)) if prune else result
    return memo[key]


_REPLAYS: WeakKeyDictionary[Tape, dict[tuple[object, ...], Replay]] = WeakKeyDictionary()
"""Replays of each tape, as long as that is there."""


def kept_by(op: Op) -> tuple[Tensor, ...]:
    """Tensors saved for backward that live outside the operation's own part."""
    part = op.part
    if part is None:
        return op.keeps
    if part.in_forward or not part.records:
        return ()
    source = part.tape.source
    keeps_source = not part.offload and (
        part.recompute or part.chunked or any(t.storage is source for o in part.tape.ops for t in kept_by(o))
    )
    return (op.reads[0], *part.arguments) if keeps_source else part.arguments


def _holds_for_backward(op: Op) -> bool:
    return bool(kept_by(op)) or (op.part is not None and op.part.records and not op.part.recompute)


def _forward(tape: Tape, rules: Rules, keep: bool, recomputing: bool) -> Replay:
    ledger = _Ledger(rules)
    mine: dict[Tensor, None] = {}  # as a set, in order
    cached: list[Tensor] = []
    uses: dict[Tensor, int] = {}
    for op in tape.ops:
        for tensor in (*op.reads, *op.holds):
            uses[tensor.storage] = uses.get(tensor.storage, 0) + 1
    if not recomputing:
        uses[tape.output.storage] = uses.get(tape.output.storage, 0) + 1
    last = max((i for i, op in enumerate(tape.ops) if _holds_for_backward(op)), default=-1) if recomputing else None
    saved = {tensor.storage for op in tape.ops for tensor in kept_by(op)} if keep else set()
    groups = _Groups(tape, ledger)
    ledger.stage = tape.ops[0].stage
    groups.begin_forward()

    transferring = None
    for i, op in enumerate(tape.ops):
        ledger.stage = op.stage
        if rules.events and op.stage is Stage.LOSS and transferring is None and tape.in_transfer is not None:
            transferring = tape.in_transfer  # of the last layer, on its way to the host
            ledger.put(transferring)
        groups.before_forward(op, rules.every_moment or not op.interior)
        stop = i == last
        makes = [t for t in op.makes if t.storage is t and (not stop or t in op.keeps)]
        if op.part is not None:
            cached += _part_forward(op, ledger, rules, keep, stop)
            mine.update(dict.fromkeys(makes))
        else:
            mine.update(dict.fromkeys(makes))
            for tensor in makes:
                ledger.put(tensor)
                if tensor.cached and tensor not in saved:
                    cached.append(tensor)
            temps = op.temps if not stop else ()
            for tensor in temps:
                ledger.put(tensor)
            ledger.mark(op.name)
            for tensor in temps:
                ledger.drop(tensor)
        groups.after_forward(op)
        if stop:
            break
        for tensor in (*op.reads, *op.holds):
            uses[tensor.storage] -= 1
        for tensor in dict.fromkeys(t.storage for t in (*op.reads, *op.holds, *op.makes)):
            if not uses.get(tensor) and tensor in mine and tensor not in saved and not tensor.cached:
                del mine[tensor]
                ledger.drop(tensor)
    groups.end_forward()
    if transferring is not None:
        ledger.drop(transferring)
    if recomputing:  # the stopped forward's variables go; what backward needs stays
        for tensor in mine:
            if tensor not in saved:
                ledger.drop(tensor)
    return ledger.replay(cached)


def _part_forward(op: Op, ledger: _Ledger, rules: Rules, keep: bool, stop: bool) -> tuple[Tensor, ...]:
    """Replay a part inside a forward pass; its output is alive afterwards. Returns what autocast's cache holds of it."""
    part = op.part
    assert part is not None
    if stop and part.recompute:
        return ()  # its input is all that backward needs
    if part.in_forward:
        _loss_in_forward(op, part, ledger, rules)
        return ()
    keep_inside = keep and part.records and not part.recompute
    inner = forward(part.tape, rules, keep=keep_inside, recomputing=stop and not part.chunked)
    if not part.chunked:
        ledger.splice(inner, op.where, moments=rules.every_moment or not op.interior)
        if not stop:
            ledger.rename(part.tape.output, op.makes[0])
    else:
        ledger.put(op.makes[0])
        start = len(ledger.events)
        ledger.splice(_widened(inner, part.tape.output) if keep_inside else inner, op.where)
        ledger.drop(part.tape.output)  # copied into the whole
        ledger.repeat(part.tape.output.basis, start)
        if stop:
            ledger.drop(op.makes[0])
    return inner.cached


def _widened(inner: Replay, output: Tensor) -> Replay:
    """The last piece of a forward whose pieces all keep their intermediates: those of the others are alive as well."""
    chunk, tokens = BASIS.index("bc"), BASIS.index("bs")

    def widen(label: Label) -> Label:
        return label._replace(shape=label.shape.replace("c", "s", 1), basis=tokens)

    piece_net = add(inner.net, tuple(-n for n in count_bytes(output)))
    others = tuple(piece_net[chunk] * ((n == tokens) - (n == chunk)) for n in range(len(BASIS)))
    piece_tensors = tuple((t, n) for t, n in inner.alive if t != output.label and t.basis == chunk)
    alive = merged([(widen(t), n) for t, n in piece_tensors], [(t, -n) for t, n in piece_tensors])
    moments = tuple(
        m._replace(
            live=tuple(max(0, n) for n in add(m.live, others)),
            alive=tuple((t, n) for t, n in merged(m.alive, alive) if n > 0),
            stage=None,
        )
        for m in inner.moments
    )
    return Replay(moments, add(inner.net, others), merged(inner.alive, alive), inner.cached, inner.events)


def _loss_in_forward(op: Op, part: Part, ledger: _Ledger, rules: Rules) -> None:
    """Loss and gradients piece by piece: the gradient of the hidden states is whole, the head's is summed."""
    assert part.tape.source is not None
    if part.wants_input:
        ledger.put(grad_of(op.reads[0]))
    inner = rules._replace(gradients="kept", summing=bool(part.sums))
    for tensor in part.sums:
        ledger.put(tensor)
    start = len(ledger.events)
    ledger.splice(forward(part.tape, inner, keep=True), op.where)
    ledger.put(grad_of(part.tape.output))
    ledger.splice(backward(part.tape, inner), op.where)
    if part.sums:
        _added_to_sums(part, ledger, rules)
    if part.wants_input:
        ledger.drop(grad_of(part.tape.source))  # copied into the whole
    ledger.drop(part.tape.output)
    ledger.repeat(part.tape.source.basis, start)
    ledger.put(op.makes[0])
    for weight, gradient_sum in zip(part.trained, part.sums, strict=False):
        _sum_to_gradient(weight, gradient_sum, ledger, rules)


def _run_again(tape: Tape, rules: Rules, fetch: bool, ledger: _Ledger) -> None:
    if fetch and tape.source is not None:
        ledger.put(tape.source)
    ledger.splice(forward(tape, rules, keep=True, recomputing=True))
    if fetch and tape.source is not None and not any(t.storage is tape.source for op in tape.ops for t in kept_by(op)):
        ledger.drop(tape.source)


def _backward(tape: Tape, rules: Rules, again: Tape | None, fetch: bool, owns_incoming: bool) -> Replay:
    rules = rules._replace(recomputed=rules.recomputed or again is not None)
    ledger = _Ledger(rules)
    keepers: dict[Tensor, int] = {}
    own_storages = {tensor for op in tape.ops for tensor in op.makes if tensor.storage is tensor}
    all_saved = [kept_by(op) for op in tape.ops]
    for saved in all_saved:
        for tensor in saved:
            keepers[tensor.storage] = keepers.get(tensor.storage, 0) + 1
    incoming = grad_of(tape.output)
    pending: dict[Tensor, Tensor] = {tape.output: incoming}
    holders = {incoming: 1 if owns_incoming else 2}

    def let_go(gradient: Tensor) -> None:
        holders[gradient] -= 1
        if holders[gradient] == 0:
            ledger.drop(gradient)

    def release(saved: Iterable[Tensor]) -> None:
        for tensor in saved:
            keepers[tensor.storage] -= 1
            if keepers[tensor.storage] == 0 and tensor.storage in own_storages:
                ledger.drop(tensor.storage)

    def arrive(tensor: Tensor, gradient: Tensor) -> None:
        earlier = pending.get(tensor)
        if earlier is None:
            pending[tensor] = gradient
        elif rules.in_place and holders[earlier] == 1:
            let_go(gradient)
        else:
            gradient_sum = grad_of(tensor)
            holders[gradient_sum] = 1
            ledger.put(gradient_sum)
            ledger.mark("add gradients of " + tensor.name)
            let_go(earlier)
            let_go(gradient)
            pending[tensor] = gradient_sum

    groups = _Groups(tape, ledger)
    ledger.stage = tape.ops[-1].stage
    groups.begin_backward()
    if tape.in_transfer is not None:
        ledger.put(tape.in_transfer)
    fetched_last = next((op for op in tape.ops if tape.in_transfer is not None and op.fetches), None)
    for op, kept in zip(reversed(tape.ops), reversed(all_saved), strict=True):
        saved = kept
        ledger.stage = op.stage
        if op is fetched_last and tape.in_transfer is not None:
            ledger.drop(tape.in_transfer)
        incoming_gradients = [pending.pop(tensor) for tensor in op.makes if tensor in pending]
        if not incoming_gradients:
            continue
        groups.before_backward(op, rules.every_moment or not op.interior)
        end_of = None
        if again is not None and _holds_for_backward(op):
            if fetch and again is tape and tape.source is not None:
                own_storages.add(tape.source)
            if op.part is not None and not (op.part.recompute or op.part.chunked):
                end_of = again  # the first operation that kept something is in there
            else:
                _run_again(again, rules, fetch, ledger)
            again = None
        arrivals: list[tuple[Tensor, Tensor]] = []
        if op.part is not None:
            ledger.rename(incoming_gradients[0], grad_of(op.makes[0]))  # which the part knows it by
            _part_backward(op, op.part, ledger, rules, end_of, fetch)
            if op.part.wants_input:
                input_gradient = grad_of(op.reads[0])
                holders[input_gradient] = 1
                arrivals.append((op.reads[0], input_gradient))
            holders[incoming_gradients[0]] -= 1
            if holders[incoming_gradients[0]]:  # the part let go of it, but somebody else holds it too
                ledger.put(incoming_gradients[0])
        else:
            for tensor, gradient_made in op.grads:
                gradient = gradient_made if gradient_made is not None else incoming_gradients[0]
                holders[gradient] = holders.get(gradient, 0) + 1
                if gradient_made is not None:
                    ledger.put(gradient)
                arrivals.append((tensor, gradient))
            if op.grads or op.trained:
                saved = _weights_backward(op, ledger, rules, saved, release)
            for gradient in incoming_gradients:
                let_go(gradient)
        release(saved)
        if op.joins is not None and op.joins.weight.trained:
            _join(op.joins, ledger, rules)
        if op.part is None:
            for weight in op.trained:
                _accumulate(weight, op, ledger, rules)
        for tensor, gradient in arrivals:
            arrive(tensor, gradient)
        groups.after_backward(op, rules.every_moment or not op.interior)
    groups.end_backward()
    if (
        tape.source is not None and tape.source in pending
    ):  # handed on under another name, maybe: to the caller it is the input's
        ledger.rename(pending[tape.source], grad_of(tape.source))
    return ledger.replay()


def _part_backward(op: Op, part: Part, ledger: _Ledger, rules: Rules, end_of: Tape | None, fetch: bool) -> None:
    """Replay the backward of a part: it lets go of the incoming gradient and leaves the one of its input.

    end_of: a tape that the part is the end of, and that is to be run again first; fetch: from an input on the host.
    """
    assert part.tape.source is not None
    if part.in_forward:
        ledger.mark(
            "backward of " + op.name
        )  # gradients made in forward are there until they are added to ones that exist
        ledger.drop(grad_of(op.makes[0]))
        for weight in part.trained:
            _accumulate(weight, op, ledger, rules)
        return
    if not part.chunked:
        moments = rules.every_moment or not op.interior
        ledger.rename(grad_of(op.makes[0]), grad_of(part.tape.output))
        replay = backward(
            part.tape, rules, recompute=part.recompute, fetch=fetch if end_of else part.offload, end_of=end_of
        )
        ledger.splice(replay, op.where, moments=moments)
        if part.wants_input:
            ledger.rename(grad_of(part.tape.source), grad_of(op.reads[0]))
        return
    if part.wants_input:
        ledger.put(grad_of(op.reads[0]))
    for tensor in part.sums:
        ledger.put(tensor)
    inner = rules._replace(
        gradients="kept" if part.sums else rules.gradients, recomputed=False, summing=bool(part.sums)
    )
    start = len(ledger.events)
    if part.recompute:  # by an autograd function of its own, which holds the output meanwhile
        ledger.splice(forward(part.tape, inner, keep=True), op.where)
    ledger.splice(backward(part.tape, inner, owns_incoming=False), op.where)
    if part.recompute:
        ledger.drop(part.tape.output)
    if part.sums:
        _added_to_sums(part, ledger, rules)
    if not part.recompute and not rules.events:
        ledger.splice(_widened_end(part.tape, inner))
    if part.wants_input:
        ledger.drop(grad_of(part.tape.source))  # copied into the whole
    ledger.repeat(part.tape.output.basis, start)
    for weight, gradient_sum in zip(part.trained, part.sums, strict=False):
        _sum_to_gradient(weight, gradient_sum, ledger, rules)
    ledger.drop(grad_of(op.makes[0]))
    for weight, _ in zip(part.trained, part.sums, strict=False):
        _reach(weight, weight_gradient(weight, rules.dtype), ledger, rules)


def _widened_end(tape: Tape, rules: Rules) -> Replay:
    """Release of what the pieces before the last one kept."""
    last_piece = forward(tape, rules, keep=True)
    wide = _widened(last_piece, tape.output)
    net = add(last_piece.net, tuple(-n for n in wide.net))
    return Replay((), net, merged(last_piece.alive, [(t, -n) for t, n in wide.alive]))


def _added_to_sums(part: Part, ledger: _Ledger, rules: Rules) -> None:
    """A piece's gradients of the weights come back together at its end, and go into the sums."""
    for op in part.tape.ops:
        for weight in () if op.product else op.trained:
            ledger.drop(weight_gradient(weight, rules.dtype))


def used_dtype(rules: Rules, cast: bool = True) -> str:
    """The dtype in which an operation uses its weights, and makes their gradients."""
    return "bfloat16" if rules.cast and cast else rules.dtype


def _weights_backward(
    op: Op, ledger: _Ledger, rules: Rules, saved: tuple[Tensor, ...], release: Callable[[Iterable[Tensor]], None]
) -> tuple[Tensor, ...]:
    """Weights' gradients and temporaries come, these go. Returns what is still saved for the operation. Autograd sums a gradient over
    tokens when the function has returned (validate_outputs in torch/csrc/autograd/engine.cpp); what a checkpoint handed out is gone then."""
    for weight in () if rules.summing and op.product else op.trained:
        ledger.put(weight_gradient(weight, used_dtype(rules, op.cast)))
    temps, workspace = op.back_temps, _list_workspaces(op, rules)
    if not rules.recomputed:
        temps += op.late_temps
    for tensor in temps:
        ledger.put(tensor)
    if rules.recomputed and workspace and saved:
        ledger.mark("backward of " + op.name)
        release(saved)
        saved = ()
    for tensor in workspace:
        ledger.put(tensor)
    ledger.mark("backward of " + op.name, bool(workspace))
    for tensor in (*temps, *workspace):
        ledger.drop(tensor)
    return saved


def _list_workspaces(op: Op, rules: Rules) -> list[Tensor]:
    """What kernels take for themselves in the backward of an operation."""
    tensors = []
    for weight, kernel, tokens in op.workspaces if rules.spans is not None else ():
        for size in kernel.sizes(getattr(rules.spans, tokens)) if weight.trained else ():
            shape = size.shape.replace("t", " ".join(tokens))
            basis = BASIS.index(tokens if size.unit == "t" else size.unit)
            tensors.append(Tensor(size.name, shape, size.dtype, basis, size.bytes, role=Role.WORKSPACE))
    return tensors


def workspace_starts(tape: Tape) -> dict[str, set[int]]:
    """Numbers of tokens from which workspaces of its operations grow in another way; by which tokens, as BASIS calls them."""
    starts: dict[str, set[int]] = {}
    for op in tape.ops:
        for tokens, numbers in workspace_starts(op.part.tape).items() if op.part is not None else ():
            starts.setdefault(tokens, set()).update(numbers)
        for each in op.workspaces:
            starts.setdefault(each.tokens, set()).update(each.kernel.starts())
    return starts


def _accumulate(weight: Weight, op: Op, ledger: _Ledger, rules: Rules) -> None:
    """A weight's gradient, just made in the dtype it was used in, reaches the parameter (unless it waits for another)."""
    gradient = weight_gradient(weight, rules.dtype)
    if rules.cast and op.cast:
        ledger.put(gradient)
        ledger.mark(f"backward of {op.name}: cast the gradient of {weight.name}")
        ledger.drop(weight_gradient(weight, used_dtype(rules)))
    if not op.defers:
        _reach(weight, gradient, ledger, rules)


def _join(joined: Joined, ledger: _Ledger, rules: Rules) -> None:
    """The gradient just made is added to the one that waited."""
    waited = weight_gradient(joined.weight, rules.dtype)
    if joined.is_view or not rules.in_place:
        ledger.put(waited)
        ledger.mark("add gradients of " + joined.weight.name)
        ledger.drop(waited)
    ledger.drop(waited)


def _sum_to_gradient(weight: Weight, gradient_sum: Tensor, ledger: _Ledger, rules: Rules) -> None:
    """A sum over pieces, in fp32, becomes the weight's gradient: itself, or a copy in the weight's dtype."""
    gradient = weight_gradient(weight, rules.dtype)
    if rules.dtype == "float32":
        ledger.rename(gradient_sum, gradient)
        return
    ledger.put(gradient)
    ledger.mark("cast the sum of the gradient of " + weight.name)
    ledger.drop(gradient_sum)


def _reach(weight: Weight, gradient: Tensor, ledger: _Ledger, rules: Rules) -> None:
    if rules.gradients == "used":
        size = rules.temporaries * weight.numel
        temps = Tensor(
            "optimizer temporaries of one weight",
            f"{weight.numel} {rules.temporaries}",
            "uint8",
            0,
            size,
            role=Role.UPDATE,
        )
        ledger.put(temps)
        ledger.mark("optimizer step of " + weight.name)
        ledger.drop(temps)
    if rules.gradients != "kept":
        ledger.drop(gradient)


def sums_of(tape: Tape) -> tuple[Tensor, ...]:
    """fp32 sums of the gradients of a tape's trained weights, over several pieces; for what the operation is that uses the weight."""
    return tuple(
        tensor_of(
            tape.dims,
            f"sum of the gradient of {weight.name}",
            " ".join(map(str, weight.shape)),
            "float32",
            role=op.makes[0].role,
        )
        for op in tape.ops
        for weight in op.trained
    )


def step_weights(ops: Sequence[Op]) -> list[tuple[Weight, int]]:
    """Weights, with how many layers have one like it; shared weights once."""
    counts: dict[Weight, int] = {}
    parts: dict[int, list[tuple[Weight, int]]] = {}
    for op in ops:
        rows = [(weight, 1) for weight in op.weights]
        if op.part is not None:
            inner = op.part.tape
            if id(inner) not in parts:
                parts[id(inner)] = step_weights(inner.ops)
            rows = parts[id(inner)]
        for weight, n in rows:
            counts[weight] = counts.get(weight, 0) + n
    for op in ops:
        if op.joins is not None:
            counts[op.joins.weight] = 1
    return list(counts.items())


def count_bytes(tensor: Tensor) -> Vector:
    """The bytes of one tensor."""
    return tuple(tensor.bytes if n == tensor.basis else 0 for n in range(len(BASIS)))


def weight_gradient(weight: Weight, dtype: str) -> Tensor:
    shape = " ".join(map(str, weight.shape))
    size = weight.numel * ITEMSIZE[dtype]
    return Tensor("gradient of " + weight.name, shape, dtype, 0, size, role=Role.WEIGHT_GRADIENT, gradient_of=weight)
