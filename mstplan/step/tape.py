"""Autograd's memory, without autograd: a forward pass written down as operations, and what lives at every moment of it.

A `Tape` lists operations in the order a model's code runs them. Each says which tensors it reads, which it makes, which
it keeps for backward, and what its backward makes. `forward` and `backward` then replay PyTorch's rules and return the
live bytes at every moment:

- a tensor lives until its last reader in forward has run, or, when kept for backward, until the backward of its keepers;
- the backward of an operation holds the incoming gradient, what was kept, the gradients it makes and its own temporaries at once;
- a gradient that reaches a tensor twice is added in place (torch/csrc/autograd/input_buffer.cpp);
- a checkpointed part keeps its input only, and in backward is run again up to the last tensor that backward needs
  (torch.utils.checkpoint, non-reentrant, early stop), or whole, by a backward of its own (reentrant).

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
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary, ref

from .instants import Stage
from .roles import Purpose, Role
from .selection import Kinds, WeightKind
from .simulation import Stream
from .workspaces import Spans, Workspace

if TYPE_CHECKING:
    from .zero import Reducer
    from .zero3 import Reducer3, Visitor

ITEMSIZE = {
    "complex64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int8": 1,
    "int64": 8,
    "int32": 4,
    "bool": 1,
    "uint8": 1,
}

# What bytes can grow with: b sequences, s tokens each, c tokens in an MLP chunk, k in a loss chunk,
# r = s rounded up to 128 (the rows of a flash-attention workspace), p = whole tens of the b s tokens, x, y and z chunks of
# `MIXER_CHUNKS` tokens, begun ones included, u and v one more than y and z, w = s, or `MOST_CHOSEN` where that is less,
# q those of s that a card norms, where several share them out.
BASIS = (
    "",
    *["bs", "bc", "bk", "bss", "ss", "s", "br", "p", "b", "bx", "by", "bz", "bu", "bv", "buu", "bvv", "bsw", "bq"],
)
MOST_CHOSEN = 2048
"""Keys that a query sees of those before it, where an indexer chooses them (DeepSeek-V3.2)."""
MIXER_CHUNKS = {"x": 64, "y": 128, "z": 256}
"""Tokens of a chunk of what mixes them otherwise than by attention, by the axis that counts chunks."""
Vector = tuple[int, ...]
ZERO: Vector = (0,) * len(BASIS)
_SYMBOLS = tuple("bckprswxyzuvq")  # in the order in which `BASIS` has them


def add(u: Vector, v: Vector) -> Vector:
    return tuple(map(int.__add__, u, v))


@lru_cache(maxsize=4096)
def axes_of(shape: str) -> tuple[int, tuple[str, ...]]:
    """(index into BASIS, the axes whose sizes do not change) of a shape such as "b s d"."""
    axes = shape.split()
    symbols = "".join(sorted((a for a in axes if a in _SYMBOLS), key=_SYMBOLS.index))
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
    `gradient_of`: of a gradient that comes and goes under objects of its own, whose it is. `stream`: that it is allocated on. `is_part`: of a DTensor,
    whose gradients autograd sums up in a new tensor (isTensorSubclassLike in torch/csrc/autograd/input_buffer.cpp).
    """

    __slots__ = (
        *("basis", "bytes", "cached", "dtype", "gradient_of", "is_part", "name", "role", "shape", "storage", "stream"),
    )

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
        stream: Stream = Stream.COMPUTE,
        is_part: bool = False,
    ):
        self.name, self.shape, self.dtype, self.basis, self.bytes = name, shape, dtype, basis, bytes
        self.storage: Tensor = base.storage if base is not None else self
        self.cached, self.role, self.gradient_of, self.stream = cached, role, gradient_of, stream
        self.is_part = is_part

    @property
    def identity(self) -> object:
        """What stays the same of it between its coming and its going, which two objects may stand for."""
        return self if self.gradient_of is None else (self.gradient_of, self.name, self.dtype)

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
    dtype: str = ""  # its own, where the step's weights have another
    quantised: str = ""  # nf4, fp4 or int8
    double_quantised: bool = False
    packed_in: str = "uint8"  # of 4 bits: the dtype that their bytes pass for (bnb_4bit_quant_storage)
    packed_over: int = 1  # cards that have these bytes in shards
    is_adapter: bool = False
    place: int = 0  # among those of its layer, as its modules are registered; those of one place lie as they are used
    spread_over: int = 1  # cards that share out the experts of which this is one card's part

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


Receiver = Tensor | Weight
"""What gets a gradient."""


@dataclass(frozen=True, eq=False, repr=False)
class Call:
    """A call of one of the model's modules, where hooks on modules run (zero3.py). weights: the module's own, not those of modules in it.

    in_backward: a gradient comes to what it returns; passes_on: and one of what it was given is made of that. gathers_itself: it runs when the module
    has returned, and has its weights gathered without hooks (train/zero.py). apart: FSDP2 has its weights as a group of their own. is_leaf: hooks are on the
    module alone, of those in it none, whose weights are then among its own, and whose gradients wait until its backward is over
    (deepspeed/utils/z3_leaf_module.py).
    """

    weights: tuple[Weight, ...] = ()
    in_backward: bool = True
    passes_on: bool = True
    gathers_itself: bool = False
    apart: bool = False
    is_leaf: bool = False


class ForGradients(NamedTuple):
    """What an operation keeps and makes for gradients that are wanted: `autograd.py` chooses of it, and leaves none."""

    keeps: tuple[tuple[Tensor, Receiver], ...] = ()  # (tensor, whose gradient it is kept for)
    back_temps: tuple[tuple[Tensor, Receiver], ...] = ()
    late_temps: tuple[tuple[Tensor, Receiver], ...] = ()
    all: bool = False  # its backward makes all of `grads`, those that nobody wants as well


NONE = ForGradients()


class WeightWorkspace(NamedTuple):
    """A kernel's workspace while it makes the gradient of a weight; tokens: those that it grows with, as BASIS calls them."""

    weight: Weight
    kernel: Workspace
    tokens: str


class Buffer(NamedTuple):
    """A tensor of an operation that grows with tokens by steps, which is there while it runs; tokens: as of `WeightWorkspace`.

    forward, backward: whether while its forward runs, and while its backward does.
    """

    kernel: Workspace
    tokens: str
    backward: bool = False
    forward: bool = True


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
    graph_holds: tuple[Tensor, ...] = ()  # what a graph that a variable holds here keeps, where autograd records
    recorded: tuple[Tensor, ...] = ()  # what it makes for its backward, and only where autograd records
    unrecorded: tuple[Tensor, ...] = ()  # what a variable is left with elsewhere
    escapes: tuple[Tensor, ...] = ()  # what its node holds by itself, past checkpoints, until the whole graph goes
    weights: tuple[Weight, ...] = ()
    workspaces: tuple[WeightWorkspace, ...] = ()
    buffers: tuple[Buffer, ...] = ()
    reuses: tuple[
        tuple[Receiver, Tensor], ...
    ] = ()  # (input or weight, what is kept and becomes its gradient, in place)
    flops: tuple[tuple[int, int], ...] = ()  # (basis, operations) of its forward; of several, the least holds
    cast: bool = False  # its weights are used through autocast's bf16 copies
    transposes: bool = False  # its weights, of which autograd saves views
    product: bool = False  # of its weights as they are: their gradients can go into a sum (mstplan/train/grad_sums.py)
    adds_bias: bool = False  # in the product itself, by cuBLASLt
    joins_gradients: bool = (
        False  # its backward joins those of all that it makes: zeros stand in for one that never comes
    )
    takes_gradient: bool = False  # the incoming gradient becomes its weight's
    defers: bool = False  # its weight's gradient waits for the weight's other use
    joins: Joined | None = None
    kernel: str = ""  # the attention kernel whose arithmetic this is
    selected: bool = False  # a selective checkpoint keeps what it makes, and does not run it again
    part: Part | None = None  # this operation is a part with a tape of its own
    stage: Stage | None = None  # of the step that it belongs to; None within a part
    fetched: tuple[Tensor, ...] | None = (
        None  # come back from the host for its backward (saved_tensors.py); None: none ever left
    )
    on_host: tuple[Tensor, ...] = ()  # what it puts there, until backward is through with the layer
    leaves_host: tuple[Tensor, ...] = ()  # what is there until it is done
    fetched_alone: bool = False  # they go when its backward is done; else when the next one's is that any come back for
    begins: tuple[Call, ...] = ()  # of modules, whose first operation it is, outermost first
    ends: tuple[Call, ...] = ()  # whose last, innermost first
    # of modules that begin with operations of no gradient: it is their first that makes one of what they were given
    passes_back: tuple[Call, ...] = ()
    apart: Apart | None = None  # its weights are a flat tensor of their own, within a layer
    gathers: Group | None = None  # of a layer that is written out, and that no backward comes to: its first operation
    lets_go: Group | None = None  # the same, with its last operation

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
        return self.part.group if self.part is not None else self.gathers

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer of the step, or several that are checkpointed together."""
        return self.part is not None and self.stage is not None and self.stage.is_layer

    @property
    def is_tower_layer(self) -> bool:
        """Whether it is a layer of a tower."""
        return self.part is not None and self.stage is Stage.EMBEDDING and not self.part.chunked

    @property
    def where(self) -> str:
        """Text that its inner operations' names begin with: nothing for a layer, which the instant tells already."""
        return "" if self.is_layer else self.name


@dataclass(frozen=True, eq=False, repr=False)
class Group:
    """Weights that FSDP2 gathers and scatters together (`sharding.py`), and what it makes for them."""

    gathered: Tensor
    buffer: Tensor  # of the all-gather
    copy_in: Tensor | None  # shards as they are gathered, of those that stay in another dtype
    from_host: tuple[tuple[Tensor, Tensor | None], ...]  # the same of shards in CPU RAM, one by one; and as each came
    gradients: tuple[Tensor, ...]  # whole, of what is trained; none: nothing is scattered
    accumulated: tuple[
        Tensor, ...
    ]  # the same in the dtype in which they are kept between micro-batches; none: in their own
    scatter: Tensor  # the reduce-scatter's input
    reduced: Tensor | None  # its output, where the gradients' shards are in another dtype
    shards: Tensor  # the gradients' shards
    last_gradient: Tensor | None  # of the gradients, one that a variable holds until all is done
    stay: bool  # until the optimizer's step; else they are added to ones that exist, used at once, or go to CPU RAM
    all_reduced: bool  # what was scattered is summed over replicas, and held until all of backward is over
    temporaries: Tensor  # of the optimizer, where it steps in backward
    flat: Flat | None = None  # FSDP1's, whose weights are one tensor
    # gradients that are whole where cards split the weight, and this card's part, a copy
    cut: tuple[tuple[Tensor, Tensor], ...] = ()
    experts: Group | None = None  # of weights inside of its own, which are a group apart
    alone: bool = False  # of one card: weights are copied from shards that are whole, without a buffer


@dataclass(frozen=True, eq=False, repr=False)
class Flat:
    """What FSDP1 makes of the gradients of a group (`fsdp.py`); where it is frozen, nothing."""

    shard: Weight  # of its weights, as it is kept
    gradient: Tensor  # of all its weights, joined
    cast: Tensor | None  # the same in the dtype in which it is summed
    padded: Tensor | None  # the same, where cards do not divide its numbers
    prefetched: bool  # before the backward of the group after it
    pieces: tuple[Weight, ...] = ()  # of its weights that lie in the shard, where the optimizer steps these


@dataclass(frozen=True, eq=False, repr=False)
class Apart:
    """A matrix of an adapter, which FSDP1 has in a flat tensor of its own within the layer's (peft's fsdp_auto_wrap_policy).

    ahead: what ran before it, which its backward gathers first where groups are prefetched: of the layer's first, the layer before, if backward
    comes to that. last: the layer's last.
    """

    group: Group
    ahead: Group | None
    last: bool


@dataclass(frozen=True, eq=False, repr=False)
class Part:
    """A stretch of the forward pass that is replayed as one operation: its tape's sources and outputs are what the operation reads and makes.

    recompute: keeps its inputs only, and runs again in backward (checkpointing). reentrant: whole, in a function of autograd's that holds what
        comes of it, and the gradient that came in, until a backward of its own is over (CheckpointFunction in torch/utils/checkpoint.py).
    chunked: its tape is one piece of the sequence; outputs and, in backward, the inputs' gradients are held whole while
        the pieces run one after the other.
    sums: fp32 sums of the weights' gradients over the pieces, where there are several.
    copies, gradient_copies: of a piece of the inputs and of the outputs' gradients, where that is no view of the whole.
    offload: the input it would keep lives in CPU RAM.
    in_forward: gradients are made in the forward pass already (the chunked loss), so that nothing else is kept.
    arguments: tensors it is given beside its input, which are kept for its backward as well.
    lingering: of these, what is held until backward is through with all layers, as `lingering_of` its tape is.
    records, wanted: whether backward comes to it at all, and of what the operation reads that whose gradient is wanted (`autograd.py`).
    interior: neighbours on both sides run the same part: its moments lie between theirs.
    group: its weights are gathered for it.
    packed: what it keeps of its input is in its operation's `keeps` (saved_tensors.py).
    hooked: FSDP1's hook on its input holds that and its gradient until backward is over (register_multi_grad_hook; `fsdp.py`).
    """

    tape: Tape
    recompute: bool = False
    reentrant: bool = False
    chunked: bool = False
    sums: tuple[Tensor, ...] = ()
    copies: tuple[Tensor, ...] = ()
    gradient_copies: tuple[Tensor, ...] = ()
    in_forward: bool = False
    offload: bool = False
    arguments: tuple[Tensor, ...] = ()
    lingering: tuple[Tensor, ...] = ()
    records: bool = True
    wanted: tuple[Tensor, ...] = ()
    interior: bool = False
    group: Group | None = None
    packed: bool = False
    hooked: bool = False

    @property
    def trained(self) -> tuple[Weight, ...]:
        """Weights of its own that get gradients."""
        return tuple(weight for op in self.tape.ops for weight in op.trained)


@dataclass(frozen=True, eq=False, repr=False)
class Tape:
    """A forward pass, written down: it changes no more. Without a source it begins with what no operation made."""

    dims: Mapping[str, int]
    ops: tuple[Op, ...]
    outputs: tuple[Tensor, ...]
    sources: tuple[Tensor, ...] = ()  # tensors that come in and stay the caller's
    held: tuple[Tensor, ...] = ()  # until the whole graph goes
    returned: tuple[Tensor, ...] = ()  # of a layer, beside its output
    group: Group | None = None  # of the weights that are outside of parts with a group; gathered throughout
    first_group: Group | None = (
        None  # of the embedding, where that has one of its own, and `group` begins after the layers
    )
    around: Group | None = None  # of a layer in which experts are a group apart: that of all else
    in_transfer: Tensor | None = (
        None  # an offloaded input: in backward, of the part before the one at hand; of the last part in the loss
    )
    first_in_transfer: Tensor | None = None  # that of the first part, where its dtype is another

    @property
    def output(self) -> Tensor:
        """The only one, or the first."""
        return self.outputs[0]

    @property
    def source(self) -> Tensor | None:
        return self.sources[0] if self.sources else None


class TapeWriter:
    """A tape while it is written. dims: sizes of the axes that do not change.

    role: of the tensors that are made from now on; parts: whether they are those of DTensors; stage: of the operations. `build_tape` gives the tape.
    """

    def __init__(self, dims: dict[str, int], stage: Stage | None = None):
        self.dims, self.stage = dims, stage
        self.role: Purpose | None = None
        self.parts = False
        self.ops: list[Op] = []
        self.sources: list[Tensor] = []
        self.outputs: tuple[Tensor, ...] = ()

    def build_tape(self) -> Tape:
        assert self.outputs
        return Tape(MappingProxyType(dict(self.dims)), tuple(self.ops), self.outputs, tuple(self.sources))

    def new(self, name: str, shape: str, dtype: str, base: Tensor | None = None, *, cached: bool = False) -> Tensor:
        """base: the tensor that it is a view of; cached: as of `Tensor`."""
        return tensor_of(self.dims, name, shape, dtype, base, role=self.role, cached=cached, is_part=self.parts)

    def grad(self, tensor: Tensor) -> Tensor:
        return _like_grad(tensor)

    def view(self, tensor: Tensor, name: str, shape: str) -> Tensor:
        return self.new(name, shape, tensor.dtype, tensor)

    def op(self, name: str, reads: Iterable[Tensor], *makes: Tensor, **more: object) -> Tensor:
        return self.add(Op(name, tuple(reads), makes, stage=self.stage, **more))  # type: ignore[arg-type]

    def add(self, op: Op) -> Tensor:
        """Append an operation; its output is the tape's."""
        self.ops.append(op)
        self.outputs = op.makes[:1]
        return op.makes[0]

    def hold(self, *tensors: Tensor) -> None:
        """Variables of the code at hand that live at least until the latest operation is done."""
        self.ops[-1] = replace(self.ops[-1], holds=self.ops[-1].holds + tensors)

    def hold_graph(self, *tensors: Tensor) -> None:
        """The same of what a graph keeps that a variable holds."""
        self.ops[-1] = replace(self.ops[-1], graph_holds=tensors)

    def hold_since(self, start: int, *tensors: Tensor) -> None:
        """The same of every operation written since there were so many."""
        self.ops[start:] = [replace(op, holds=op.holds + tensors) for op in self.ops[start:]]

    def name_kernel(self, kernel: str, start: int, selected: bool) -> None:
        """Say of what was written since `start` whose arithmetic it is, and whether a selective checkpoint keeps its results."""
        self.ops[start:] = [
            replace(op, kernel=kernel, selected=selected) if op.flops else op for op in self.ops[start:]
        ]

    @contextmanager
    def call(
        self,
        in_backward: bool = True,
        *,
        passes_on: bool = True,
        gathers_itself: bool = False,
        apart: bool = False,
        is_leaf: bool = False,
        weights: tuple[Weight, ...] = (),
    ) -> Iterator[list[Weight]]:
        """Write inside what a module does when it is called. weights: its own, where they are in parts; else those used inside. Gives a list for those of
        modules in it that it reads itself, which ZeRO-3 gathers for both (register_external_parameter)."""
        start = len(self.ops)
        external: list[Weight] = []
        yield external
        if len(self.ops) == start:
            return
        if is_leaf:
            self.ops[start:] = [replace(op, begins=(), ends=(), passes_back=()) for op in self.ops[start:]]
        of_others = {weight for op in self.ops[start:] for call in op.begins for weight in call.weights}
        own = dict.fromkeys(weight for op in self.ops[start:] for weight in op.weights if weight not in of_others)
        weights = weights or tuple(dict.fromkeys((*own, *external)))
        call = Call(weights, in_backward, passes_on, gathers_itself, apart, is_leaf)
        self.ops[start] = replace(self.ops[start], begins=(call, *self.ops[start].begins))
        self.ops[-1] = replace(self.ops[-1], ends=(*self.ops[-1].ends, call))
        if not (self.ops[start].grads or self.ops[start].part):
            self._pass_back(call, start)

    def _pass_back(self, call: Call, start: int) -> None:
        """Mark the first operation since then whose backward makes a gradient of what the module was given."""
        made: set[Tensor] = set()
        for n, op in enumerate(self.ops[start:], start):
            if any(tensor not in made for tensor, _ in op.grads):
                self.ops[n] = replace(op, passes_back=(call, *op.passes_back))
                return
            made.update(op.makes)

    @contextmanager
    def distributed(self) -> Iterator[None]:
        """Let tensors that are made inside be those of DTensors."""
        before, self.parts = self.parts, True
        try:
            yield
        finally:
            self.parts = before

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
    is_part: bool = False,
) -> Tensor:
    """A tensor whose bytes follow from its shape; base: the one that it is a view of."""
    basis, axes = axes_of(shape)
    size = ITEMSIZE[dtype]
    for axis in axes:
        size *= int(axis) if axis.isdigit() else dims[axis]
    return Tensor(name, shape, dtype, basis, size, base, role=role, cached=cached, is_part=is_part)


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

    gradients: "kept" until the optimizer's step, "added" to ones that exist already (accumulation), "used" at once
    (optimizer in backward), while whose step of a weight so many bytes are there as `bytes_to_step` says of it, or "reduced" as the
    reducer has it, who counts them: such a replay is not to be had again.
    """

    gradients: str = "kept"
    dtype: str = "bfloat16"  # of weights and their gradients
    cast: bool = False  # weights are cast to bf16 where they are used, so gradients arrive in bf16 first
    bytes_to_step: Callable[[Weight], int] | None = None
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
    cast_before: bool = False  # a piece before this one filled autocast's cache
    spans: Spans | None = None  # of the tokens, for workspaces of kernels; None: without them
    whole: str = ""  # which micro-batch it is where whole gradients stay between these: first, between, or last, which scatters them
    experts_there: bool = (
        False  # of a layer that is run again: its experts' weights, a group apart, are gathered already
    )
    selective: bool = False  # checkpoints keep what their selected operations made (torch's CachingTorchDispatchMode)
    reducer: Reducer | Reducer3 | None = None  # of ZeRO's gradients
    visitor: Visitor | None = (
        None  # of calls of modules, which gathers their weights; such a replay is not to be had again
    )

    def lists(self, op: Op) -> bool:
        """Whether moments of an operation are listed. Those of layers between their like are no larger; but with ZeRO what is gathered and reduced as one runs
        depends on what came before."""
        return self.every_moment or self.reducer is not None or not op.interior


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
        live = _of_one_sequence(moment.live)
        larger = next((i for i, other in enumerate(tried) if all(map(int.__ge__, other, live))), None)
        if larger is None:
            largest.append(moment)
            tried.append(live)
        elif larger:
            tried.insert(0, tried.pop(larger))
    return tuple(largest)


def _of_one_sequence(live: Vector) -> Vector:
    """A vector whose terms of the length alone have those of a batch added: of one sequence they count together, of more these count more."""
    terms = list(live)
    for of_length, of_batch in _SHARED_BY_SEQUENCES:
        terms[of_length] += terms[of_batch]
    return tuple(terms)


_SHARED_BY_SEQUENCES = tuple((BASIS.index(one), BASIS.index(each)) for one, each in (("s", "bs"), ("ss", "bss")))


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
        # buffers of layers that no backward comes to, with their place in the order
        self.for_nothing: list[tuple[int, Tensor]] = []
        self.scatter: Tensor | None = None
        self.all_reduced: list[Tensor] = []
        self.there = False  # of `_ExpertGroups`
        self.late: Group | None = None  # scattered when all is over, for no gradient of the layer's input tells when
        self.place_of_late = 0  # in the order

    def begin_forward(self) -> None:
        if self.rest is not None:
            self._gather_now(self.rest, "embedding", listed=True)

    def before_forward(self, op: Op, listed: bool) -> None:
        if op.group is not None:
            self._gather_now(op.group, op.where, listed)

    def after_forward(self, op: Op, stops: bool = False) -> None:
        """stops: the layer is run again no further."""
        over = op.lets_go if op.part is None else op.group
        if over is not None:
            self.ledger.drop(over.gathered)

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
        if self.buffer is None:  # another one was gathered ahead, for nothing
            self._gather(op.group, op.where, listed)
            self.buffer = op.group.buffer
        self.ledger.put(op.group.gathered)
        if listed:
            self.ledger.mark(_within(op.where, "copy out of the all-gather"))
        self._replace_buffer(None)
        if self.order:
            self._gather(self.order[-1], op.where, listed)
            self.buffer = self.order[-1].buffer

    def before_sums(self, op: Op) -> None:
        """Before the gradients that an operation has made are added to those that there are."""

    def after_backward(self, op: Op, listed: bool) -> None:
        if op.group is None:
            return
        if op.part is not None and not op.part.wanted:
            self.late, self.place_of_late = op.group, len(self.order)
        else:
            self._scatter(op.group, op.where, listed)

    def pass_over(self, op: Op) -> None:
        """No backward comes to an operation. What was gathered ahead for a layer stays until backward is over (finalize_backward)."""
        if op.group is None or not self.order:
            return
        self.order.pop()
        if self.buffer is not None:
            self.for_nothing.append((len(self.order), self.buffer))
            self.buffer = None

    def end_backward(self) -> None:
        """Layer by layer, in their order."""
        self._scatter_first()
        for place, buffer in self.for_nothing:
            if place < self.place_of_late:
                self.ledger.drop(buffer)
        if self.late is not None:
            self._scatter(self.late, "", listed=True)
        for place, buffer in self.for_nothing:
            if place >= self.place_of_late:
                self.ledger.drop(buffer)
        if self.scatter is not None:
            self.ledger.drop(self.scatter)
        for tensor in self.all_reduced:
            self.ledger.drop(tensor)

    def _scatter_first(self) -> None:
        """Scatter the group that the embedding is in."""
        if self.rest is not None:
            self._scatter(self.rest, "backward of embedding", listed=True)

    def _gather(self, group: Group, where: str, listed: bool) -> None:
        ledger = self.ledger
        for tensor, from_host in group.from_host:
            if from_host is not None:
                ledger.put(from_host)
            ledger.put(tensor)
            if from_host is not None:
                ledger.drop(from_host)
        if group.copy_in is not None:
            ledger.put(group.copy_in)
        ledger.put(group.buffer)
        if listed:
            ledger.mark(_within(where, "all-gather"))
        for tensor in (*(tensor for tensor, _ in group.from_host), *([group.copy_in] if group.copy_in else [])):
            ledger.drop(tensor)

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

    def _keep_whole(self, group: Group, where: str) -> None:
        """The end of a group's backward in a micro-batch before the last: its gradients stay, in the dtype that they are summed in
        (to_accumulated_grad_if_needed)."""
        ledger = self.ledger
        ledger.drop(group.gathered)
        for gradient, accumulated in zip(group.gradients, group.accumulated, strict=False):
            ledger.put(accumulated)
            ledger.mark(_within(where, "cast the gradient that stays"))
            ledger.drop(gradient)

    def _scatter(self, group: Group, where: str, listed: bool) -> None:
        ledger, whole = self.ledger, self.ledger.rules.whole
        if whole in ("between", "last") and group.accumulated:  # these are added to, in place
            for gradient in group.gradients:
                ledger.drop(gradient)
        if whole == "between" and group.accumulated:
            ledger.drop(group.gathered)
            return
        if whole in ("first", "between"):
            self._keep_whole(group, where)
            return
        for gradient, part in group.cut:
            ledger.put(part)
            ledger.mark(_within(where, "cut the gradient"))
            ledger.drop(gradient)
        parts = dict(group.cut)
        ledger.drop(group.gathered)
        if self.scatter is not None:
            ledger.drop(self.scatter)
            self.scatter = None
        if not group.gradients:
            return
        ledger.put(group.scatter)
        if listed:
            ledger.mark(_within(where, "copy in of the reduce-scatter"))
        for gradient in (whole and group.accumulated) or group.gradients:
            ledger.drop(parts.get(gradient, gradient))
        last_gradients = [group.last_gradient] if group.last_gradient is not None else []
        reduced = [group.reduced] if group.reduced is not None else []
        for tensor in (*last_gradients, *reduced, group.shards, group.temporaries):
            ledger.put(tensor)
        if listed:
            ledger.mark(_within(where, "reduce-scatter"))
        for tensor in (*last_gradients, group.temporaries):
            ledger.drop(tensor)
        output = group.shards if group.reduced is None else group.reduced
        for tensor in (*reduced, *(() if group.stay else (group.shards,))):
            if group.all_reduced and tensor is output:
                self.all_reduced.append(tensor)  # a variable of its own for each group (AllReduceState)
            else:
                ledger.drop(tensor)
        self.scatter = group.scatter


class _PlannedGroups(_Groups):
    """The same by transformers' own plan: embedding, layers, and final norm and head each have a group, and experts have one inside of their layer's. Those
    of a layer are replayed with it (`_ExpertGroups`)."""

    def __init__(self, tape: Tape, ledger: _Ledger):
        super().__init__(tape, ledger)
        assert tape.first_group is not None and self.rest is not None
        self.first, self.last = tape.first_group, self.rest
        self.order.insert(0, self.first)
        self.begun = False  # has the pass come to the last group?
        self.embeds = False  # has backward come to the embedding?
        self.first_layer = next(op.stage for op in tape.ops if op.group is not None)
        self.final_norm = next(op for op in tape.ops if op.stage is Stage.LOSS and op.grads)

    def begin_forward(self) -> None:
        self._gather_now(self.first, "embedding", listed=True)

    def before_forward(self, op: Op, listed: bool) -> None:
        if op.stage is Stage.LOSS and not self.begun:
            self._gather_now(self.last, op.name, listed=True)
            self.begun = True
        super().before_forward(op, listed)

    def after_forward(self, op: Op, stops: bool = False) -> None:
        super().after_forward(op, stops)
        if op.group is not None and op.group.experts is not None:
            self.buffer = None if op.group.experts.alone else op.group.experts.buffer
        elif op.group is None and op.stage is Stage.EMBEDDING and op.weights:
            self.ledger.drop(self.first.gathered)

    def begin_backward(self) -> None:
        return

    def before_backward(self, op: Op, listed: bool) -> None:
        with_head = any(WeightKind.HEAD in weight.kinds for weight in op.weights)
        # a head whose gradient is made in forward has no backward
        if not self.begun and (with_head or op.group is not None):
            self._gather(self.order[-1], "backward of the loss" if with_head else op.where, listed=True)
            self.buffer, self.begun = self.order[-1].buffer, True
        if op.group is None and op.stage is Stage.EMBEDDING and op.weights:
            self.embeds = True
            self.ledger.put(self.first.gathered)
            # of the first layer's backward it is the end where nothing more is run
            self.ledger.stage = op.stage if op.trained else self.first_layer
            self.ledger.mark("copy out of the all-gather")
            self.ledger.stage = op.stage
            self._replace_buffer(None)
        elif op.group is not None and op.group.experts is not None:
            self.order.pop()
            self.ledger.put(op.group.gathered)
            self._replace_buffer(None)
            if not op.group.experts.alone:
                self._gather(op.group.experts, op.where, listed)
        else:
            super().before_backward(op, listed)

    def after_backward(self, op: Op, listed: bool) -> None:
        if op.group is not None and op.group.experts is not None:
            self.buffer = self.order[-1].buffer
            keeps = self.ledger.rules.whole in ("first", "between") or not op.group.experts.gradients
            self.scatter = None if keeps else op.group.experts.scatter
        super().after_backward(op, listed)
        if op is self.final_norm:
            self._scatter(self.last, "", listed=True)

    def _scatter_first(self) -> None:
        """As long as no backward comes to the embedding, what was gathered for that stays until all is over."""
        if self.embeds:
            self._scatter(self.first, "backward of embedding", listed=True)
        elif self.buffer is not None:
            self.for_nothing.append((self.place_of_late, self.buffer))


class _ExpertGroups(_Groups):
    """The group of experts inside of a layer whose other weights are gathered around it. next_buffer: of the group that backward comes to after the layer;
    scattered: the reduce-scatter's input of the group before it; there: the weights are gathered already."""

    def __init__(
        self,
        tape: Tape,
        ledger: _Ledger,
        recomputing: bool,
        next_buffer: Tensor | None,
        scattered: Tensor | None,
    ):
        super().__init__(tape, ledger)
        assert tape.around is not None and tape.around.experts is not None
        self.around, self.group = tape.around, tape.around.experts
        self.recomputing, self.there = recomputing, recomputing and ledger.rules.experts_there
        self.next_buffer, self.scatter = next_buffer, scattered
        start = next(n for n, op in enumerate(tape.ops) if _begins_apart(op))
        self.ends_backward = next((op for op in tape.ops[start:] if op.grads), None)

    def before_forward(self, op: Op, listed: bool) -> None:
        if not _begins_apart(op) or self.there:
            return
        if not self.recomputing and not self.group.alone:
            self._gather(self.group, "", listed)
        self._copy_out()
        if not self.recomputing:
            self.ledger.drop(self.around.buffer)

    def after_forward(self, op: Op, stops: bool = False) -> None:
        if not any(call.apart for call in op.ends) or self.there:
            return
        if not self.recomputing:
            self.ledger.drop(self.group.gathered)
        elif not self.group.alone:
            # gathered for the layer's backward: it goes with the forward pass that begins and ends here
            self.ledger.drop(self.group.buffer)

    def before_backward(self, op: Op, listed: bool) -> None:
        if not any(call.apart for call in op.ends):
            return
        if not self.there:
            self._copy_out()
            if not self.group.alone:
                self.ledger.drop(self.group.buffer)
            self.there = True
        if self.next_buffer is not None:
            self.ledger.put(self.next_buffer)
            self.ledger.mark("all-gather")

    def before_sums(self, op: Op) -> None:
        if op is not self.ends_backward:
            return
        if self.ledger.rules.gradients == "added":
            for gradient in self.group.gradients:
                self.ledger.drop(gradient)
        self._scatter(self.group, "", listed=True)

    def after_backward(self, op: Op, listed: bool) -> None:
        return

    def end_backward(self) -> None:
        return

    def _copy_out(self) -> None:
        """Copy weights out of a buffer; or of one rank, one by one, out of what is kept: there a copy that was made for it stays until the
        next weight's is (wait_for_unshard's loop)."""
        ledger, copied = self.ledger, list[Tensor]()
        before: Tensor | None = None
        for kept, from_host in self.group.from_host if self.group.alone else ():
            for tensor in (from_host, kept):
                if tensor is not None:
                    ledger.put(tensor)
            ledger.mark("copy the weights of one rank")
            for tensor in (from_host, before):
                if tensor is not None:
                    ledger.drop(tensor)
            before = kept
            copied.append(Tensor(self.group.gathered.name, "", kept.dtype, 0, kept.bytes, role=Role.GATHERED))
            ledger.put(copied[-1])
            ledger.mark("copy the weights of one rank")
        for tensor in (*copied, *([before] if before is not None else [])):
            ledger.drop(tensor)
        ledger.put(self.group.gathered)
        ledger.mark("copy out of the all-gather")


def _begins_apart(op: Op) -> bool:
    """Whether it is the first operation of a module whose weights are a group apart."""
    return any(call.apart for call in op.begins)


class _FlatGroups(_Groups):
    """The same under FSDP1: weights are views of a flat tensor that is gathered as it is, and so is no buffer; in backward the group before is
    gathered first where it is prefetched (_prefetch_handle). The gradients of a group wait for each other, and are joined (the backward of torch.split).

    A frozen layer's weights go when its input has its gradient, after what the layer before it gathers for that (_post_backward_reshard_only_hook);
    where no gradient comes to its input, and those of the rest, when backward is over (_catch_all_reshard)."""

    def __init__(self, tape: Tape, ledger: _Ledger):
        super().__init__(tape, ledger)
        self.order = [op.group for op in tape.ops if op.group is not None and op.part is not None and op.part.records]
        self.done: Group | None = None  # a frozen layer whose input has its gradient

    def pass_over(self, op: Op) -> None:
        """Only layers that backward comes to are gathered ahead."""

    def before_backward(self, op: Op, listed: bool) -> None:
        if op.group is None or op.part is None:
            return
        group = self.order.pop()
        last = next((inner.apart.group for inner in reversed(op.part.tape.ops) if inner.apart is not None), None)
        if not self.prefetches:
            self._gather(group, op.where, listed)
        elif last is not None:
            self._gather(last, op.where, listed)
        elif self.order:
            self._gather(self.order[-1], op.where, listed)
        self._let_done_go()

    def after_backward(self, op: Op, listed: bool) -> None:
        if op.group is None or op.group.gradients:
            super().after_backward(op, listed)
        elif op.part is not None and op.part.wanted:
            self.done = op.group
            if not self.order:
                self._let_done_go()
        else:
            self.late = op.group

    def end_backward(self) -> None:
        self._let_done_go()
        super().end_backward()

    def _let_done_go(self) -> None:
        if self.done is not None:
            self.ledger.drop(self.done.gathered)
        self.done = None

    @property
    def prefetches(self) -> bool:
        return self.rest is not None and self.rest.flat is not None and self.rest.flat.prefetched

    def begin_backward(self) -> None:
        if self.prefetches and self.order:
            self._gather(self.order[-1], "backward of the loss", listed=True)

    def _gather(self, group: Group, where: str, listed: bool) -> None:
        ledger = self.ledger
        cast = [group.copy_in] if group.copy_in is not None else []
        for tensor in (*cast, group.gathered):
            ledger.put(tensor)
        if listed:
            ledger.mark(_within(where, "all-gather"))
        for tensor in cast:
            ledger.drop(tensor)

    def _gather_now(self, group: Group, where: str, listed: bool) -> None:
        self._gather(group, where, listed)

    def _scatter(self, group: Group, where: str, listed: bool) -> None:
        """The end of a group's backward (_post_backward_hook). Its gradients of a micro-batch before the last stay, in the dtype they have."""
        ledger, whole, flat = self.ledger, self.ledger.rules.whole, group.flat
        assert flat is not None
        if not group.gradients:
            ledger.drop(group.gathered)
            return
        ledger.put(flat.gradient)
        if listed:
            ledger.mark(_within(where, "join gradients"))
        for gradient in group.gradients:
            ledger.drop(gradient)
        ledger.drop(group.gathered)
        if whole == "between":
            ledger.drop(flat.gradient)  # added to the one that is there
        if whole in ("first", "between"):
            return
        made = [each for each in (flat.cast, flat.padded, group.reduced) if each is not None]
        for tensor in (*made, group.shards):
            ledger.put(tensor)
        if listed:
            ledger.mark(_within(where, "reduce-scatter"))
        added = (flat.gradient,) if whole else ()  # to the one that is there; autograd has it until the hook is over
        for tensor in (*made, flat.gradient, *added, *(() if group.stay else (group.shards,))):
            ledger.drop(tensor)


class _FlatMatrices(_FlatGroups):
    """Those of a layer's adapters, each gathered while it runs, in forward and where a checkpoint runs it again, and in backward.

    again: a checkpoint has the layer run again. In backward the last one is there, for the layer's prefetched it; run again, it goes as the others
    do, unless it is what the layer is run again for: then it stays, and the one before it goes, which it prefetched."""

    def __init__(self, tape: Tape, ledger: _Ledger, again: bool, backward: bool):
        super().__init__(tape, ledger)
        aparts = [op.apart for op in tape.ops if op.apart is not None]
        self.flat = aparts[-1].group.flat
        asks = [op for op in tape.ops if again and holds_for_backward(op)]
        self.is_asked = bool(asks) and asks[-1].apart is aparts[-1]
        self.gathered: set[Group] = set()
        if self.prefetches and (self.is_asked or again != backward):
            self.gathered.add(aparts[-1].group)
        if again and not backward and self.is_asked:
            self.gathered.update(each.group for each in (aparts[-2:] if self.prefetches else aparts[-1:]))

    @property
    def prefetches(self) -> bool:
        return self.flat is not None and self.flat.prefetched

    def before_forward(self, op: Op, listed: bool) -> None:
        if op.apart is not None and op.apart.group not in self.gathered:
            self._gather(op.apart.group, op.name, listed=True)

    def after_forward(self, op: Op, stops: bool = False) -> None:
        if op.apart is not None and not stops:
            self.ledger.drop(op.apart.group.gathered)

    def before_backward(self, op: Op, listed: bool) -> None:
        if op.apart is None:
            return
        if op.apart.group not in self.gathered:
            self._gather(op.apart.group, op.name, listed=True)
        if self.prefetches and op.apart.ahead is not None:
            self._gather(op.apart.ahead, op.name, listed=True)
            if not (op.apart.last and self.is_asked):
                self.gathered.add(op.apart.ahead)

    def after_backward(self, op: Op, listed: bool) -> None:
        if op.apart is not None:
            self._scatter(op.apart.group, op.name, listed=True)


def _groups_of(tape: Tape, ledger: _Ledger, *, again: bool, backward: bool, outer: Outer | None = None) -> _Groups:
    """again: of a layer that a checkpoint runs again."""
    outer = outer or NOTHING
    if tape.around is not None:
        return _ExpertGroups(tape, ledger, again and not backward, outer.next_buffer, outer.scattered)
    if tape.first_group is not None:
        return _PlannedGroups(tape, ledger)
    if any(op.apart is not None for op in tape.ops):
        return _FlatMatrices(tape, ledger, again, backward)
    is_flat = tape.group is not None and tape.group.flat is not None
    return _FlatGroups(tape, ledger) if is_flat else _Groups(tape, ledger)


def forward(tape: Tape, rules: Rules, *, keep: bool, recomputing: bool = False, prune: bool = True) -> Replay:
    """Replay the forward pass. keep: autograd records; recomputing: stop at the last tensor that backward needs;
    prune: of the moments, only those that can be the largest."""
    rules = rules._replace(reducer=None)
    return _memo(tape, ("forward", rules, keep, recomputing, prune), lambda: _forward(tape, rules, keep, recomputing))


def finish_reducing(rules: Rules) -> Replay:
    """What becomes of gradients when backward is over; nothing where nobody reduces them."""
    ledger = _Ledger(rules)
    ledger.stage = Stage.EMBEDDING
    if rules.reducer is not None:
        rules.reducer.finish(ledger)
    if rules.visitor is not None:
        rules.visitor.finish(ledger)
    return ledger.replay()


class Outer(NamedTuple):
    """Gradients that a part of a tape shares with what is around it. shares: the incoming one is somebody else's, too, and stays. adds: of
    these inputs, by number, there is one already, which the part's own are added to as they come. outputs: those that one comes in of; None: all.
    next_buffer, scattered: as of `_ExpertGroups`."""

    shares: bool = False
    adds: tuple[int, ...] = ()
    outputs: tuple[int, ...] | None = None
    next_buffer: Tensor | None = None
    scattered: Tensor | None = None


NOTHING = Outer()


def backward(
    tape: Tape,
    rules: Rules,
    *,
    recompute: bool = False,
    fetch: bool = False,
    in_pieces: bool = False,
    prune: bool = True,
    end_of: Tape | None = None,
    guests: tuple[Tensor, ...] = (),
    outer: Outer = NOTHING,
) -> Replay:
    """Replay the backward pass; the incoming gradient is alive already.

    in_pieces: of a piece, whose incoming gradients are parts of the caller's, and whose inputs' gradients are copied into the caller's.
    recompute: the forward pass is run again first, when backward comes to the first operation that kept something.
    fetch: from an input that comes from the host for that, and goes when nothing of the layer keeps it.
    end_of: the tape that is run again in that way, and that this one is the end of.
    guests: tensors that came back for what was before (saved_tensors.py); they go when the first operation of what is run again is done.
    outer: what the caller holds of gradients.
    """
    end = ref(end_of) if end_of is not None else None
    key = ("backward", rules, recompute, fetch, in_pieces, end, guests, outer, prune)
    again = tape if recompute else end_of
    return _memo(tape, key, lambda: _backward(tape, rules, again, fetch, in_pieces, guests, outer))


def _memo(tape: Tape, key: tuple[object, ...], replay: Callable[[], Replay]) -> Replay:
    rules, prune = key[1], key[-1]
    assert isinstance(rules, Rules)
    if rules.every_moment:
        return replay()
    if rules.reducer is not None or rules.visitor is not None:
        result = replay()
        return result._replace(moments=undominated(result.moments)) if prune else result
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
    if part.packed:
        return (*op.keeps, *part.arguments)
    if part.recompute or part.chunked:
        return (*(op.reads[1:] if part.offload else op.reads), *part.arguments)
    inside = {tensor.storage for each in part.tape.ops for tensor in kept_by(each)}
    kept = (read for read, source in zip(op.reads, part.tape.sources, strict=True) if source.storage in inside)
    return (*kept, *part.arguments)


def lent_by(op: Op, keep: bool) -> tuple[Tensor, ...]:
    """Tensors that a part makes beside its first output and keeps for its own backward: nobody else holds them longer."""
    part = op.part
    if part is None or len(part.tape.outputs) == 1 or part.recompute or part.chunked or not (keep and part.records):
        return ()
    inside = {tensor.storage for each in part.tape.ops for tensor in kept_by(each)}
    outputs = zip(op.makes[1:], part.tape.outputs[1:], strict=False)
    return tuple(made for made, output in outputs if output.storage in inside)


def lingering_of(tape: Tape, fetched: bool = False) -> tuple[Tensor, ...]:
    """Of a layer that a checkpoint runs again, what it made beside its first output, and what autograd keeps of all that came of: whom that is
    for holds on to it until backward is through with all layers. fetched: its input came back from the host, and is its own, too."""
    own = {tensor for op in tape.ops for tensor in op.makes}.union(tape.sources[:1] if fetched else ())
    return tuple(tensor for tensor in _kept_for_others(tape) if tensor in own)


def input_lingers(tape: Tape) -> bool:
    """Whether the layer's input is of what autograd keeps so."""
    return tape.sources[0].storage in _kept_for_others(tape)


def _kept_for_others(tape: Tape) -> dict[Tensor, None]:
    """A tape's outputs beside the first, and what is kept of all that they came of."""
    outputs = [tensor.storage for tensor in tape.outputs[1:]]
    needed, kept = set(outputs), dict.fromkeys(outputs)
    for op in reversed(tape.ops if outputs else ()):
        if not needed.isdisjoint(tensor.storage for tensor in op.makes):
            needed.update(tensor.storage for tensor in op.reads)
            kept |= dict.fromkeys(tensor.storage for tensor in (*op.keeps, *(t for t, _ in op.for_gradients.keeps)))
    return kept


def holds_for_backward(op: Op) -> bool:
    """Whether something is saved for backward when it runs: also a weight, which a checkpoint packs as it does any tensor. Quantised ones are
    no saved tensors (bitsandbytes autograd/_functions.py, MatMul4Bit: ctx.tensors)."""
    if op.part is not None:
        return bool(kept_by(op)) or (op.part.records and not op.part.recompute)
    saves_weight = bool(op.weights) and not any(weight.quantised for weight in op.weights)
    multiplies = saves_weight and any(gradient is not None for _, gradient in op.grads)
    return bool(op.keeps) or multiplies


def _used_by(op: Op, keep: bool) -> tuple[Tensor, ...]:
    """Tensors that are alive for an operation beside what it makes."""
    return (*op.reads, *op.holds, *(op.graph_holds if keep else ()))


def _forward(tape: Tape, rules: Rules, keep: bool, recomputing: bool) -> Replay:
    ledger = _Ledger(rules)
    mine: dict[Tensor, None] = {}  # as a set, in order
    cached: list[Tensor] = []
    uses: dict[Tensor, int] = {}
    selected, between = _selected(tape) if rules.selective else (set[Tensor](), set[Tensor]())
    ops = [op for op in tape.ops if not (recomputing and between.issuperset(op.makes))] if between else tape.ops
    for op in ops:
        for tensor in _used_by(op, keep):
            uses[tensor.storage] = uses.get(tensor.storage, 0) + 1
    for tensor in tape.outputs if not recomputing else ():
        uses[tensor.storage] = uses.get(tensor.storage, 0) + 1
    last = max((i for i, op in enumerate(ops) if holds_for_backward(op)), default=-1) if recomputing else None
    saved = {tensor.storage for tensor in (*tape.held, *(t for op in tape.ops for t in kept_by(op)))} if keep else set()
    saved.update(lingering_of(tape) if recomputing else ())
    there: set[Tensor] = set()  # what the first run left
    if rules.selective:
        saved, there = (saved, selected) if recomputing else (saved | (set() if keep else selected), there)
    groups = _groups_of(tape, ledger, again=recomputing, backward=False)
    ledger.stage = tape.ops[0].stage
    begun = False  # what a model is given may be cast before

    if rules.cast_before:
        casts = [tensor for op in tape.ops for tensor in op.makes if tensor.cached and tensor not in saved]
        there = there.union(casts)
        for tensor in casts:
            ledger.put(tensor)
    transferring = None
    for i, op in enumerate(ops):
        ledger.stage = op.stage
        if rules.events and op.stage is Stage.LOSS and transferring is None and tape.in_transfer is not None:
            transferring = tape.in_transfer  # of the last layer, on its way to the host
            ledger.put(transferring)
        if not begun and (op.weights or op.part is not None):
            groups.begin_forward()
            begun = True
        groups.before_forward(op, rules.lists(op))
        if rules.visitor is not None:
            rules.visitor.before_forward(op, ledger)
        stop = i == last
        made = (*op.makes, *(op.recorded if keep else op.unrecorded))
        makes = [t for t in made if t.storage is t and (not stop or t in op.keeps)]
        if op.part is not None:
            cached += _part_forward(op, ledger, rules, keep, stop)
            lent = lent_by(op, keep)
            mine.update(dict.fromkeys(tensor for tensor in makes if tensor not in lent))
        else:
            mine.update(dict.fromkeys(makes))
            for tensor in makes:
                if tensor not in there:
                    ledger.put(tensor)
                if tensor.cached and tensor not in saved:
                    cached.append(tensor)
            temps = (*op.temps, *_list_buffers(op, rules)) if not stop and there.isdisjoint(makes) else ()
            for tensor in temps:
                ledger.put(tensor)
            ledger.mark(op.name)
            for tensor in temps:
                ledger.drop(tensor)
        groups.after_forward(op, stop)
        if stop:
            break
        if rules.visitor is not None:
            rules.visitor.after_forward(op, ledger, keep, recomputing)
        for tensor in _used_by(op, keep):
            uses[tensor.storage] -= 1
        for tensor in dict.fromkeys(t.storage for t in (*_used_by(op, keep), *op.makes)):
            if not uses.get(tensor) and tensor in mine and tensor not in saved and not tensor.cached:
                del mine[tensor]
                ledger.drop(tensor)
    groups.end_forward()
    if transferring is not None:
        ledger.drop(transferring)
    if recomputing:  # the stopped forward's variables and autocast's cache go; what backward needs stays
        of_parts = [tensor for tensor in cached if tensor not in mine]  # as often as layers that are alike
        for tensor in (*mine, *of_parts):
            if tensor not in saved:
                ledger.drop(tensor)
        cached = []
    return ledger.replay(cached)


def _selected(tape: Tape) -> tuple[set[Tensor], set[Tensor]]:
    """What a selective checkpoint keeps; and what one of its operations makes for the next, which goes, and is not made again either."""
    ops = [op for op in tape.ops if op.selected]
    made = {tensor.storage for op in ops for tensor in op.makes}
    between = made & {t.storage for op in ops for t in op.reads} - {t.storage for op in ops for t in op.keeps}
    return made - between, between


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
    if part.chunked:  # a module that is called for each piece is one to its hooks (train/zero.py)
        rules = rules._replace(visitor=None)
    if not part.records:  # nothing that is saved holds what a selective checkpoint keeps
        rules = rules._replace(selective=False)
    if part.chunked and not keep_inside and not rules.events:
        rules = rules._replace(cast_before=True)
    inner = forward(part.tape, rules, keep=keep_inside, recomputing=stop and not part.chunked)
    if not part.chunked:
        ledger.splice(inner, op.where, moments=rules.lists(op))
        if not stop:
            lent, outputs = lent_by(op, keep), part.tape.outputs
            for output, made in zip(outputs, op.makes, strict=False):
                if made not in lent:
                    ledger.rename(output.storage, made)
            for tensor in op.makes[len(outputs) :]:
                ledger.put(tensor)
    else:
        start = len(ledger.events)
        for tensor in op.makes if not rules.events else ():
            ledger.put(tensor)
        for tensor in part.copies:
            ledger.put(tensor)
        ledger.splice(_widened(inner, part.tape.output) if keep_inside else inner, op.where)
        for tensor in part.copies:
            ledger.drop(tensor)
        for tensor in op.makes if rules.events else ():  # when the first piece is there
            ledger.put(tensor)
        _drop_outputs(part.tape, ledger)  # copied into the whole
        ledger.repeat(part.tape.output.basis, start)
        for tensor in op.makes if stop else ():
            ledger.drop(tensor)
    return inner.cached


def _drop_outputs(tape: Tape, ledger: _Ledger) -> None:
    """Let go of what a tape made, of which there may be views."""
    for storage in dict.fromkeys(tensor.storage for tensor in tape.outputs):
        ledger.drop(storage)


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
    for tensor in part.wanted:
        ledger.put(grad_of(tensor))
    inner = rules._replace(gradients="kept", summing=bool(part.sums), visitor=None)
    for tensor in part.sums if not rules.events else ():  # in order, the first piece makes them
        ledger.put(tensor)
    start = len(ledger.events)
    ledger.splice(forward(part.tape, inner, keep=True), op.where)
    ledger.put(grad_of(part.tape.output))
    ledger.splice(backward(part.tape, inner, in_pieces=True), op.where)
    ledger.drop(grad_of(part.tape.output))
    if part.sums:
        _added_to_sums(part, ledger, rules)
    ledger.drop(part.tape.output)
    ledger.repeat(part.tape.sources[0].basis, start)
    ledger.put(op.makes[0])
    for weight, gradient_sum in zip(part.trained, part.sums, strict=False):
        _sum_to_gradient(weight, gradient_sum, ledger, rules)


def _run_again(tape: Tape, rules: Rules, fetch: bool, ledger: _Ledger) -> None:
    if fetch and tape.source is not None:
        ledger.put(tape.source)
    ledger.splice(forward(tape, rules, keep=True, recomputing=True))
    if fetch and tape.source is not None and not any(t.storage is tape.source for op in tape.ops for t in kept_by(op)):
        ledger.drop(tape.source)


def _backward(
    tape: Tape,
    rules: Rules,
    again: Tape | None,
    fetch: bool,
    in_pieces: bool,
    guests: tuple[Tensor, ...],
    outer: Outer,
) -> Replay:
    rules = rules._replace(recomputed=rules.recomputed or again is not None)
    ledger = _Ledger(rules)
    keepers: dict[Tensor, int] = {}
    own_storages = {tensor for op in tape.ops for tensor in (*op.makes, *op.recorded) if tensor.storage is tensor}
    own_storages.difference_update(tensor for op in tape.ops for tensor in lent_by(op, keep=True))
    all_saved = [kept_by(op) for op in tape.ops]
    for saved in (tape.held, *all_saved):
        for tensor in saved:
            keepers[tensor.storage] = keepers.get(tensor.storage, 0) + 1
    given = range(len(tape.outputs)) if outer.outputs is None else outer.outputs
    pending = {tape.outputs[n]: grad_of(tape.outputs[n]) for n in given}
    holders = dict.fromkeys(pending.values(), 2 if in_pieces or outer.shares else 1)
    for n in outer.adds:
        pending[tape.sources[n]] = grad_of(tape.sources[n])
        holders[pending[tape.sources[n]]] = 1

    def let_go(gradient: Tensor) -> None:
        holders[gradient] -= 1
        if holders[gradient] == 0:
            ledger.drop(gradient)

    def release(saved: Iterable[Tensor]) -> None:
        for tensor in saved:
            keepers[tensor.storage] -= 1
            if keepers[tensor.storage] == 0 and tensor.storage in own_storages:
                ledger.drop(tensor.storage)

    lingering: list[Tensor] = []  # of parts that were run again
    lingering_arguments = tuple(tensor for op in tape.ops if op.part is not None for tensor in op.part.lingering)
    lingering_arguments += tuple(op.reads[0] for op in tape.ops if op.part is not None and op.part.hooked)
    hooked_gradients: list[Tensor] = []
    for tensor in lingering_arguments:
        keepers[tensor.storage] = keepers.get(tensor.storage, 0) + 1
    first_part = next((op for op in tape.ops if op.is_layer), None)
    for tensor in lingering_of(tape, fetch) if again is tape else ():
        keepers[tensor.storage] = keepers.get(tensor.storage, 0) + 1

    def leave() -> None:
        """Let go of what lingers."""
        nonlocal lingering, lingering_arguments
        for tensor in lingering:
            ledger.drop(tensor)
        release(lingering_arguments)
        for gradient in hooked_gradients:
            let_go(gradient)
        hooked_gradients.clear()
        lingering, lingering_arguments = [], ()

    def arrive(tensor: Tensor, gradient: Tensor) -> None:
        earlier = pending.get(tensor)
        if earlier is None:
            pending[tensor] = gradient
        elif rules.in_place and not tensor.is_part and holders[earlier] == 1:
            let_go(gradient)
        else:
            gradient_sum = grad_of(tensor)
            holders[gradient_sum] = 1
            ledger.put(gradient_sum)
            ledger.mark("add gradients of " + tensor.name)
            let_go(earlier)
            let_go(gradient)
            pending[tensor] = gradient_sum

    fetched: tuple[Tensor, ...] = ()  # for the operation before, see saved_tensors.py

    def fetch_for(op: Op) -> tuple[Tensor, ...]:
        """Let tensors come back for an operation. Returns those that go when it is done."""
        nonlocal fetched
        if op.fetched is None:
            return ()
        if op.fetched_alone:
            for tensor in op.fetched:
                ledger.put(tensor)
            return op.fetched
        before, fetched = fetched, op.fetched
        for tensor in fetched:
            ledger.put(tensor)
        return before

    groups = _groups_of(tape, ledger, again=again is not None, backward=True, outer=outer)
    ledger.stage = tape.ops[-1].stage
    groups.begin_backward()
    moving = tape.in_transfer
    if moving is not None:
        ledger.put(moving)
    fetching = [op for op in tape.ops if moving is not None and op.fetches]
    used_again = _used_again(tape)
    for op, kept in zip(reversed(tape.ops), reversed(all_saved), strict=True):
        saved = kept
        incoming = {tensor: pending.pop(tensor) for tensor in op.makes if tensor in pending}
        if not incoming:
            groups.pass_over(op)
            continue
        ledger.stage = op.stage
        groups.before_backward(op, rules.lists(op))
        if rules.visitor is not None:
            rules.visitor.before_backward(op, ledger)
        if op in fetching[:1] and moving is not None:
            ledger.drop(moving)
        elif op in fetching[1:2] and moving is not None and tape.first_in_transfer is not None:
            ledger.drop(moving)
            moving = tape.first_in_transfer
            ledger.put(moving)
        end_of: Tape | None = None
        leaving: tuple[Tensor, ...] = ()
        if again is not None and holds_for_backward(op):
            leaving, guests = guests, ()
            if fetch and again is tape and tape.source is not None:
                own_storages.add(tape.source)
            if op.part is not None and not (op.part.recompute or op.part.chunked):
                end_of = again  # the first operation that kept something is in there
            else:
                _run_again(again, rules._replace(experts_there=groups.there), fetch, ledger)
                groups.there = True
            again = None
        arrivals: list[tuple[Tensor, Tensor]] = []
        outdated = fetch_for(op)
        if op.part is not None:
            for tensor, gradient in incoming.items():
                ledger.rename(gradient, grad_of(tensor))  # which the part knows it by
            inside = outdated if op.part.recompute and not op.part.chunked else ()
            outer = NOTHING
            if not op.part.chunked:
                shared = any(holders[gradient] > 1 for gradient in incoming.values())
                adds = tuple(
                    n
                    for n, tensor in enumerate(op.reads)
                    if rules.in_place and tensor in op.part.wanted and holders.get(pending.get(tensor, tensor)) == 1
                )
                outer = Outer(shared, adds, tuple(n for n, tensor in enumerate(op.makes) if tensor in incoming))
            if op.group is not None and op.group.experts is not None:
                outer = outer._replace(next_buffer=groups.order[-1].buffer, scattered=groups.scatter)
            for n in outer.adds:
                ledger.rename(pending.pop(op.reads[n]), grad_of(op.reads[n]))
            _part_backward(op, op.part, tuple(incoming), ledger, rules, end_of, fetch, inside, outer, used_again)
            outdated = outdated if not inside else ()
            for tensor in op.part.wanted:
                input_gradient = grad_of(tensor)
                holders[input_gradient] = 1
                if op.part.hooked:
                    holders[input_gradient] += 1
                    hooked_gradients.append(input_gradient)
                arrivals.append((tensor, input_gradient))
            if op.part.recompute and not op.part.chunked:
                lingering += lingering_of(op.part.tape, op.part.offload)
            if op is first_part:
                leave()
            for gradient in incoming.values():
                holders[gradient] -= 1
                if outer.shares:
                    ledger.rename(grad_of(op.part.tape.output), gradient)
                    if not holders[gradient]:  # whoever shared it left meanwhile
                        ledger.drop(gradient)
                elif holders[gradient]:  # the part let go of it, but somebody else holds it too
                    ledger.put(gradient)
        else:
            reuses = dict(op.reuses)
            for tensor, gradient_made in op.grads:
                gradient = gradient_made if gradient_made is not None else next(iter(incoming.values()))
                holders[gradient] = holders.get(gradient, 0) + 1
                if tensor in reuses:
                    ledger.rename(reuses[tensor], gradient)
                elif gradient_made is not None:
                    ledger.put(gradient)
                arrivals.append((tensor, gradient))
            own_storages.difference_update(reuses.values())
            if op.grads or op.trained:
                taken = incoming.popitem()[1] if op.takes_gradient and op.trained else None
                saved = _weights_backward(op, ledger, rules, saved, release, taken)
            for gradient in incoming.values():
                let_go(gradient)
        release(saved)
        if rules.visitor is not None:
            rules.visitor.release_saved(op, ledger)
        for tensor in (*outdated, *leaving):
            ledger.drop(tensor)
        if op.joins is not None and op.joins.weight.trained:
            _join(op.joins, ledger, rules)
        if op.part is None:
            for weight in op.trained:
                _accumulate(weight, op, ledger, rules)
        if rules.visitor is not None:
            rules.visitor.after_backward(op, ledger)
        groups.before_sums(op)
        for tensor, gradient in arrivals:
            arrive(tensor, gradient)
        groups.after_backward(op, rules.lists(op))
    groups.end_backward()
    leave()
    release(tape.held)
    for tensor in fetched:
        ledger.drop(tensor)
    for tensor in tape.sources:
        if tensor in pending and in_pieces:
            let_go(pending[tensor])
        elif tensor in pending:  # handed on under another name, maybe: to the caller it is the input's
            ledger.rename(pending[tensor], grad_of(tensor))
    return ledger.replay()


def _part_backward(
    op: Op,
    part: Part,
    arrived: tuple[Tensor, ...],
    ledger: _Ledger,
    rules: Rules,
    end_of: Tape | None,
    fetch: bool,
    guests: tuple[Tensor, ...],
    outer: Outer,
    used_again: dict[Weight, int],
) -> None:
    """Replay the backward of a part: it lets go of the incoming gradients and leaves those of its inputs.

    arrived: what it made whose gradients come in; end_of: a tape that the part is the end of, and that is to be run again first; fetch:
    from an input on the host; guests, outer: see `backward`; used_again: of `_used_again`, counted down.
    """
    if part.in_forward:
        ledger.mark(
            "backward of " + op.name
        )  # gradients made in forward are there until they are added to ones that exist
        ledger.drop(grad_of(op.makes[0]))
        for weight in part.trained:
            _accumulate(weight, op, ledger, rules)
        return
    if not part.chunked:
        moments = rules.lists(op)
        for n in outer.outputs or ():
            ledger.rename(grad_of(op.makes[n]), grad_of(part.tape.outputs[n]))
        for n in outer.adds:
            ledger.rename(grad_of(op.reads[n]), grad_of(part.tape.sources[n]))
        if part.reentrant:
            _reentrant_backward(op, part, ledger, rules, moments, outer)
        else:
            replay = backward(
                part.tape,
                rules,
                recompute=part.recompute,
                fetch=fetch if end_of else part.offload,
                end_of=end_of,
                guests=guests,
                outer=outer,
            )
            ledger.splice(replay, op.where, moments=moments)
        for tensor, source in zip(op.reads, part.tape.sources, strict=True):
            if tensor in part.wanted:
                ledger.rename(grad_of(source), grad_of(tensor))
        return
    for tensor in (*map(grad_of, part.wanted), *(part.sums if not rules.events else ())):
        ledger.put(tensor)
    inner = rules._replace(
        gradients="kept" if part.sums else rules.gradients, recomputed=False, summing=bool(part.sums), visitor=None
    )
    start = len(ledger.events)
    for tensor in part.copies:
        ledger.put(tensor)
    if part.recompute:  # by an autograd function of its own, which holds the output meanwhile
        ledger.splice(forward(part.tape, inner, keep=True), op.where)
    for tensor in part.gradient_copies:
        ledger.put(tensor)
    ledger.splice(backward(part.tape, inner, in_pieces=True), op.where)
    if part.recompute:
        _drop_outputs(part.tape, ledger)
    for tensor in (*part.gradient_copies, *part.copies):
        ledger.drop(tensor)
    if part.sums:
        _added_to_sums(part, ledger, rules)
    if not part.recompute and not rules.events:
        ledger.splice(_widened_end(part.tape, inner))
    ledger.repeat(part.tape.output.basis, start)
    for weight, gradient_sum in zip(part.trained, part.sums, strict=False):
        _sum_to_gradient(weight, gradient_sum, ledger, rules)
    for tensor in arrived:
        ledger.drop(grad_of(tensor))
    for weight, _ in zip(part.trained, part.sums, strict=False):
        if weight in used_again:
            used_again[weight] -= 1
            if used_again[weight] > 0:
                continue
            _join(Joined(weight, is_view=False), ledger, rules)
        _reach(weight, weight_gradient(weight, weight.dtype or rules.dtype), ledger, rules)


def _reentrant_backward(op: Op, part: Part, ledger: _Ledger, rules: Rules, moments: bool, outer: Outer) -> None:
    """Replay the backward of a part that is run again whole, and then backward by itself."""
    source = part.tape.source
    if part.offload and source is not None:
        ledger.put(source)
    again = forward(part.tape, rules, keep=True)
    ledger.splice(again, op.where, moments=moments)
    for tensor in again.cached:  # it leaves autocast before it goes backward
        ledger.drop(tensor)
    ledger.splice(backward(part.tape, rules, outer=outer._replace(shares=True)), op.where, moments=moments)
    _drop_outputs(part.tape, ledger)
    if part.offload and source is not None:
        ledger.drop(source)
    for n in outer.outputs or () if not outer.shares else ():
        ledger.drop(grad_of(part.tape.outputs[n]))


def _used_again(tape: Tape) -> dict[Weight, int]:
    """Weights that several parts in pieces of a layer train, and how many: the gradients of one part wait for the next part's, and are added
    to them before they reach the weight (torch/csrc/autograd/input_buffer.cpp). Packed parts are of several layers, each of one."""
    parts = [op.part for op in tape.ops if op.part is not None and op.part.sums and not op.part.packed]
    if len(parts) < 2:
        return {}
    counts: dict[Weight, int] = {}
    for part in parts:
        for weight in part.trained:
            counts[weight] = counts.get(weight, 0) + 1
    return {weight: count for weight, count in counts.items() if count > 1}


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
            if rules.events:
                ledger.put(_sum_of(weight, op))
            ledger.drop(weight_gradient(weight, weight.dtype or rules.dtype))


def used_dtype(weight: Weight, rules: Rules, cast: bool = True) -> str:
    """The dtype in which an operation uses a weight, and makes its gradient."""
    return "bfloat16" if rules.cast and cast else weight.dtype or rules.dtype


def _weights_backward(
    op: Op,
    ledger: _Ledger,
    rules: Rules,
    saved: tuple[Tensor, ...],
    release: Callable[[Iterable[Tensor]], None],
    taken: Tensor | None,
) -> tuple[Tensor, ...]:
    """Weights' gradients and temporaries come, these go. Returns what is still saved for the operation. Autograd sums a gradient over
    tokens when the function has returned (validate_outputs in torch/csrc/autograd/engine.cpp); what a checkpoint handed out is gone then.
    taken: the incoming gradient that becomes the weight's."""
    reuses = dict(op.reuses)
    for weight in op.trained:
        if rules.summing and op.product:
            if rules.events:
                ledger.put(_sum_of(weight, op))
            continue
        gradient = weight_gradient(weight, used_dtype(weight, rules, op.cast))
        if weight in reuses:
            ledger.rename(reuses[weight], gradient)
        elif taken is not None:
            ledger.rename(taken, gradient)
        else:
            ledger.put(gradient)
    temps = (*op.back_temps, *_list_buffers(op, rules, backward=True))
    workspace = _list_workspaces(op, rules)
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
    trained = ((kernel, tokens) for weight, kernel, tokens in op.workspaces if weight.trained)
    return [tensor for kernel, tokens in trained for tensor in _in_span(kernel, tokens, rules, Role.WORKSPACE)]


def _list_buffers(op: Op, rules: Rules, backward: bool = False) -> list[Tensor]:
    """What an operation takes beside, of a size that goes by steps."""
    buffers = (each for each in op.buffers if (each.backward if backward else each.forward))
    return [tensor for each in buffers for tensor in _in_span(each.kernel, each.tokens, rules, op.makes[0].role)]


def _in_span(kernel: Workspace, tokens: str, rules: Rules, role: Purpose | None) -> Iterator[Tensor]:
    for size in kernel.sizes(getattr(rules.spans, tokens)) if rules.spans is not None else ():
        shape = size.shape.replace("t", " ".join(tokens))
        basis = BASIS.index(tokens if size.unit == "t" else size.unit)
        yield Tensor(size.name, shape, size.dtype, basis, size.bytes, role=role)


def workspace_starts(tape: Tape) -> dict[str, set[int]]:
    """Numbers of tokens from which workspaces of its operations grow in another way; by which tokens, as BASIS calls them."""
    starts: dict[str, set[int]] = {}
    for op in tape.ops:
        for tokens, numbers in workspace_starts(op.part.tape).items() if op.part is not None else ():
            starts.setdefault(tokens, set()).update(numbers)
        workspaces = [(kernel, tokens) for _, kernel, tokens in op.workspaces]
        for kernel, tokens in workspaces + [(each.kernel, each.tokens) for each in op.buffers]:
            starts.setdefault(tokens, set()).update(kernel.starts())
    return starts


def _accumulate(weight: Weight, op: Op, ledger: _Ledger, rules: Rules) -> None:
    """A weight's gradient, just made in the dtype it was used in, reaches the parameter (unless it waits for another)."""
    gradient = weight_gradient(weight, weight.dtype or rules.dtype)
    if rules.cast and op.cast:
        ledger.put(gradient)
        ledger.mark(f"backward of {op.name}: cast the gradient of {weight.name}")
        ledger.drop(weight_gradient(weight, used_dtype(weight, rules)))
    if not op.defers:
        _reach(weight, gradient, ledger, rules)


def _join(joined: Joined, ledger: _Ledger, rules: Rules) -> None:
    """The gradient just made is added to the one that waited."""
    waited = weight_gradient(joined.weight, joined.weight.dtype or rules.dtype)
    if joined.is_view or not rules.in_place:
        ledger.put(waited)
        ledger.mark("add gradients of " + joined.weight.name)
        ledger.drop(waited)
    ledger.drop(waited)


def _sum_to_gradient(weight: Weight, gradient_sum: Tensor, ledger: _Ledger, rules: Rules) -> None:
    """A sum over pieces, in fp32, becomes the weight's gradient: itself, or a copy in the weight's dtype."""
    gradient = weight_gradient(weight, weight.dtype or rules.dtype)
    if gradient.dtype == "float32":
        ledger.rename(gradient_sum, gradient)
        return
    ledger.put(gradient)
    ledger.mark("cast the sum of the gradient of " + weight.name)
    ledger.drop(gradient_sum)


def _reach(weight: Weight, gradient: Tensor, ledger: _Ledger, rules: Rules) -> None:
    if rules.gradients == "reduced" and rules.reducer is not None:
        rules.reducer.arrive(weight, gradient, ledger)
        return
    if rules.gradients == "used":
        size = rules.bytes_to_step(weight) if rules.bytes_to_step is not None else 0
        temps = Tensor("optimizer temporaries of one weight", str(size), "uint8", 0, size, role=Role.UPDATE)
        ledger.put(temps)
        ledger.mark("optimizer step of " + weight.name)
        ledger.drop(temps)
    # experts shared out reach theirs when all of the module's backward is over: it made their weights local first (_use_local_dtensor_params)
    if rules.gradients != "kept" and weight.spread_over == 1:
        ledger.drop(gradient)


def sums_of(tape: Tape) -> tuple[Tensor, ...]:
    """fp32 sums of the gradients of a tape's trained weights, over several pieces."""
    return tuple(_sum_of(weight, op) for op in tape.ops for weight in op.trained)


def _sum_of(weight: Weight, op: Op) -> Tensor:
    """A sum of gradients, for what the operation is that uses the weight."""
    name, shape = f"sum of the gradient of {weight.name}", " ".join(map(str, weight.shape))
    size = weight.numel * ITEMSIZE["float32"]
    return Tensor(name, shape, "float32", 0, size, role=op.makes[0].role, gradient_of=weight)


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
            before = counts.get(weight, 0)
            in_pieces = op.part is not None and op.part.chunked  # of one layer, which may use a weight twice
            counts[weight] = max(before, n) if in_pieces else before + n
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
