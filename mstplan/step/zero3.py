"""DeepSpeed's ZeRO-3 in closed form: what of weights, gradients and optimizer a GPU holds, and when.

Each weight is flat, padded to a multiple of the GPUs, and each GPU has a part of it (partition_parameters.py). What is made when is
deepspeed/runtime/zero of DeepSpeed 0.19.8, with contiguous_gradients and reduce_scatter as they come, and gradients summed in the weights' dtype
(no data_types.grad_accum_dtype):

- what stays (stage3.py): parts of all weights in bf16, and of those that are trained in fp32, with the optimizer's states and gradients in bf16
  (grad_partitions_flat_buffer), and a bucket of reduce_bucket_size values, however many gradients there are. overlap_comm, as it comes, makes no second one;
- weights of up to param_persistence_threshold values are whole from one step to the next (mark_persistent_parameters). Let go for the optimizer's step;
- hooks on modules gather their weights before a call and before its backward, and let go of them afterwards (parameter_offload.py). The order in which modules
  are called is known from the first micro-batch; from it weights of those to come are gathered ahead: at each module, also at one without weights, up to
  prefetch_bucket_size values, while less than max_live_parameters are there. What is used again within max_reuse_distance values stays
  (partitioned_param_coordinator.py). One weight is gathered into a tensor of its own, several into a buffer, of which each is copied when the
  first of them is used; the buffer goes when the last is (AllGatherCoalescedHandle);
- the backward of the embedding gathers its weight as well, and no hook lets go of that before all of backward is over (release_backward_leftovers), nor
  of those of any module whose input gets no gradient;
- frozen weights that are gathered as a checkpoint runs a layer again go when the module is done whose backward had begun last (ds_recompute_parameters);
- a gradient is copied into the bucket and let go; one that is larger than the bucket stays as it is instead. A gradient that no longer fits in has the bucket
  reduced first: its gradients' parts are put in the order of the GPUs, in a copy, but for a single one that is no multiple of them (reduce_scatter_coalesced);
- the optimizer's step: each part of a gradient in fp64 for its norm, one after the other (get_grad_norm_direct); then for every sub-group, of
  sub_group_size values and the weight that begins there, the gradients' parts flat, and in fp32, and the optimizer's own temporaries (step).

With the optimizer in CPU RAM (offload_optimizer) the GPU has no fp32 weights, states or gradients: of what was reduced each part comes back from
there, is added to, and in the last micro-batch is there in fp64, for its norm, and in fp32, to be copied. With the weights there as well
(offload_param) each part comes to the GPU to be gathered.

On a GPU gathering and reducing have streams of their own (overlap_comm, as it comes), whose memory the allocator keeps apart: what hooks gather, and what
comes of a bucket that is reduced, is theirs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..errors import RecipeError
from .cuda import pinned_bytes
from .optimizers import OPTIMIZERS, optimizer_memory
from .optimizers.base import bytes_of
from .roles import Purpose, Role
from .simulation import Stream
from .storage import packed_rows
from .tape import Call, Op, Tensor, Weight
from .zero import BF16, FP32, FP64, Ledger, Reducer, flat_tensor

if TYPE_CHECKING:
    from ..spec.model import Model
    from .recipe import Recipe

NORM_BUFFER = 250_000_000
"""Values of a gradient whose norm is made at once, where that goes to CPU RAM (_constant_buffered_norm2)."""
PERSISTENT = "whole weights that persist"
PARTS, FROZEN_PARTS = "parts of all weights", "parts of frozen weights"


class Visitor(Protocol):
    """Who is told of the calls of modules as a step is replayed."""

    def before_forward(self, op: Op, ledger: Ledger) -> None: ...

    def after_forward(self, op: Op, ledger: Ledger, keep: bool, recomputing: bool) -> None: ...

    def before_backward(self, op: Op, ledger: Ledger) -> None: ...

    def release_saved(self, op: Op, ledger: Ledger) -> None: ...

    def after_backward(self, op: Op, ledger: Ledger) -> None: ...

    def finish(self, ledger: Ledger) -> None: ...


class Hook(Enum):
    """What a hook on a module does with its weights."""

    FETCH = "before the module's call, and before its backward"
    RELEASE = "after them"
    GATHER = "where the loss in pieces uses its weights, when the module has returned"
    LET_GO = "of what it gathered"
    LEAVE = "of a module that is not told when its backward is over: when all of it is"


Param = tuple[Op | None, Weight]
"""A weight of one layer, which has its Weight in common with layers that are alike; None: of no layer."""


Module = tuple[Op | None, Call]
"""A module of one layer, by its call; None: of no layer."""


class Visit(NamedTuple):
    """in_backward: the hook runs as its backward begins, or ends. owner: of a call in a layer that is run again, the module whose backward had begun
    last, to which DeepSpeed assigns frozen weights that are gathered again (ds_recompute_parameters)."""

    hook: Hook
    call: Call
    layer: Op | None
    in_backward: bool = False
    owner: Module | None = None

    @property
    def module(self) -> Module:
        return self.layer, self.call

    @property
    def params(self) -> list[Param]:
        return [(self.layer, weight) for weight in self.call.weights]


class _Walk:
    """Turns operations into visits of modules, in order."""

    def __init__(self) -> None:
        self.layer: Op | None = None
        self.active: dict[Module, None] = {}  # whose backward has begun, in that order

    def visit(self, visit: Visit, ledger: Ledger) -> None:
        raise NotImplementedError

    def _visit(self, call: Call, *hooks: Hook, ledger: Ledger) -> None:
        owner = next(reversed(self.active), None)
        for hook in hooks:
            self.visit(Visit(hook, call, self.layer, owner=owner), ledger)

    def before_forward(self, op: Op, ledger: Ledger) -> None:
        for call in op.begins:
            self._visit(call, Hook.FETCH, *((Hook.RELEASE, Hook.GATHER) if call.gathers_itself else ()), ledger=ledger)
        if op.is_layer:
            self.layer = op

    def after_forward(self, op: Op, ledger: Ledger, keep: bool, recomputing: bool) -> None:
        """keep: autograd records."""
        if op.is_layer:
            self.layer = None
        for call in op.ends:
            self._visit(call, Hook.LET_GO if call.gathers_itself else Hook.RELEASE, ledger=ledger)

    def before_backward(self, op: Op, ledger: Ledger) -> None:
        for call in reversed(op.ends):
            if call.in_backward:
                self.active[self.layer, call] = None
                hook = Hook.GATHER if call.gathers_itself else Hook.FETCH
                self.visit(Visit(hook, call, self.layer, in_backward=True), ledger)
        if op.is_layer:
            self.layer = op

    def release_saved(self, op: Op, ledger: Ledger) -> None:
        """What autograd saved for an operation's backward goes."""

    def after_backward(self, op: Op, ledger: Ledger) -> None:
        if op.is_layer:
            self.layer = None
        gives = bool(op.part.wanted if op.part is not None else op.grads)  # a gradient to what it reads
        for call in reversed((*op.passes_back, *op.begins)):
            if call.in_backward and call.passes_on and gives:
                self.active.pop((self.layer, call))
                self.visit(Visit(Hook.RELEASE, call, self.layer, in_backward=True), ledger)

    def finish(self, ledger: Ledger) -> None:
        while self.active:
            (layer, call), _ = self.active.popitem()
            self.visit(Visit(Hook.LEAVE, call, layer, in_backward=True), ledger)


class Record(_Walk):
    """Visits of a micro-batch, as DeepSpeed takes them down in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.visits: list[Visit] = []

    def visit(self, visit: Visit, ledger: Ledger) -> None:
        self.visits.append(visit)


class Change(NamedTuple):
    """A tensor comes or goes. param: the weight that goes, for its module is over."""

    comes: bool
    tensor: Tensor
    param: Param | None = None


class Gathering(_Walk):
    """What is gathered and let go, visit by visit of a micro-batch.

    Where a checkpoint runs a layer again, it holds detached tensors of what autograd saves, trained weights as well (torch.utils.checkpoint): what was
    gathered for them lives until their backward, though DeepSpeed lets go of it, and gathers it anew. Frozen ones it holds as they are, and so nothing of
    what was gathered for them. Of experts autograd itself saves a view, which holds what was gathered in any case. Of 4-bit weights bitsandbytes'
    product holds a view by itself (autograd/_functions.py, MatMul4Bit: ctx.tensors), past checkpoints that are not reentrant: until the graph goes.
    """

    def __init__(self, planned: Sequence[tuple[Visit, Sequence[Change]]], reducer: Reducer3):
        super().__init__()
        self.planned = iter(planned)
        self.reducer = reducer
        self.saved: dict[Param, list[Tensor]] = {}  # what is held so, of each weight that a checkpoint saves
        self.escaping: set[Param] = set()  # weights of which what is there now stays with the graph
        self.escaped: list[Tensor] = []

    def after_forward(self, op: Op, ledger: Ledger, keep: bool, recomputing: bool) -> None:
        if keep and (op.grads or op.trained):
            held = [weight for weight in op.weights if op.transposes or (recomputing and weight.trained)]
            self.saved.update({(self.layer, weight): [] for weight in held})
        if op.grads and not recomputing and self.reducer.zero.recipe.checkpoint != "reentrant":
            self.escaping.update((self.layer, weight) for weight in op.weights if weight.quantised)
        super().after_forward(op, ledger, keep, recomputing)

    def release_saved(self, op: Op, ledger: Ledger) -> None:
        for weight in op.weights:
            for tensor in self.saved.pop((self.layer, weight), ()):
                ledger.drop(tensor)

    def visit(self, visit: Visit, ledger: Ledger) -> None:
        expected, changes = next(self.planned)
        assert visit == expected, "modules are called in another order than before"
        if visit.call.is_leaf and visit.in_backward and visit.hook is not Hook.FETCH:
            self.reducer.finish_leaf(ledger)
        grown = False
        for comes, tensor, param in changes:
            if grown and not comes:
                ledger.mark("gather weights")
            grown = comes
            if comes:
                ledger.put(tensor)
            elif param in self.saved:
                self.saved[param].append(tensor)
            elif param in self.escaping:
                self.escaping.remove(param)
                self.escaped.append(tensor)
            else:
                ledger.drop(tensor)
        if grown:
            ledger.mark("gather weights")

    def finish(self, ledger: Ledger) -> None:
        super().finish(ledger)
        for tensor in self.escaped:
            ledger.drop(tensor)


class _Handle:
    """An all-gather under way."""

    def __init__(self, buffer: Tensor, params: Sequence[Param], from_host: Sequence[Tensor]):
        self.buffer, self.params, self.from_host = buffer, params, from_host
        self.waiting = len(params)
        self.is_copied = False


def _places(weights: Sequence[Weight], queue: Iterable[tuple[Param, int]]) -> dict[Param, tuple[int, int]]:
    """By which weights come before others in the model (ds_id): of a layer by its number, of none before all layers or after them."""
    last = {weight: n for n, weight in enumerate(weights)}
    params = dict.fromkeys(param for param, _ in queue)
    layers = {layer: n for n, layer in enumerate(dict.fromkeys(layer for layer, _ in params if layer is not None))}
    first = min((last[weight] for layer, weight in params if layer is not None), default=0)

    def number(param: Param) -> int:
        layer, weight = param
        if layer is not None:
            return layers[layer]
        return -1 if last[weight] < first else len(layers)

    return {param: (number(param), last[param[1]]) for param in params}


def values_of(weight: Weight) -> int:
    """Values of a weight as DeepSpeed finds it: of 4 bits so many as its bytes pass for."""
    return packed_rows(weight) if weight.quantised else weight.numel


def _inside(visits: Iterable[Visit]) -> dict[Module, list[Param]]:
    """Weights of each module and of those in it (iter_params, recurse=True), by what its forward calls. What it reads of another's is listed twice."""
    inside: dict[Module, dict[tuple[Param, bool], None]] = {}
    running: list[Module] = []
    for visit in takewhile(lambda visit: not visit.in_backward, visits):  # layers that are run again may stop half way
        if visit.hook not in (Hook.FETCH, Hook.RELEASE):
            continue
        if visit.hook is Hook.RELEASE:
            running.pop()
            continue
        running.append(visit.module)
        inside.setdefault(visit.module, {})
        for module in running:
            is_own = module is running[-1]
            inside[module].update(dict.fromkeys((param, is_own) for param in visit.params))
    return {module: [param for param, _ in params] for module, params in inside.items()}


class _Ahead:
    """What weights modules have that are called from a step on. Sizes are in values."""

    def __init__(self, modules: Iterable[Sequence[Param]]):
        """modules: weights of those, in the order of their calls."""
        self.traversed = [0]
        self.uses: dict[Param, list[int]] = defaultdict(list)
        for step, params in enumerate(modules):
            self.traversed.append(self.traversed[-1] + sum(values_of(weight) for _, weight in params))
            for param in dict.fromkeys(params):
                self.uses[param].append(step)

    def is_used(self, param: Param, step: int, distance: int) -> bool:
        """Whether a weight is used from a step on, before so many values are."""
        uses = self.uses[param]
        later = bisect_left(uses, step)
        return later < len(uses) and self.traversed[uses[later]] - self.traversed[step] < distance


class Coordinator:
    """Follows PartitionedParameterCoordinator through a micro-batch. Sizes are in values."""

    def __init__(self, zero: Zero3, visits: Sequence[Visit], kept: Mapping[int, frozenset[Param]] | None, whole: bool):
        """kept: what visits let go of, by their number, where that was found before (an lru_cache has it); whole: what persists is there."""
        self.zero, self.visits, self.whole = zero, visits, whole
        self.kept = dict(kept or {})
        fetches = [visit for visit in visits if visit.hook is Hook.FETCH]
        places = {weight: n for n, weight in enumerate(zero.weights)}
        self.queue = [
            (param, step)
            for step, visit in enumerate(fetches)
            for param in sorted(visit.params, key=lambda param: places[param[1]])
        ]
        self.places = _places(zero.weights, self.queue)
        # of modules to come a leaf is told the weights of all in them, and any other module those of their own: none of a leaf's
        inside = _inside(visits)
        self.ahead = {
            True: _Ahead(inside[visit.module] for visit in fetches),
            False: _Ahead([] if visit.call.is_leaf else visit.params for visit in fetches),
        }
        self.next = 0  # place in the queue
        self.step = 0  # modules fetched for so far
        self.live = 0  # values that are gathered
        self.fetched_for: dict[Param, int] = {}  # the latest step
        self.there: dict[Param, Tensor] = {}
        self.under_way: dict[Param, _Handle] = {}
        self.active: dict[Param, set[Module]] = defaultdict(set)
        self.again: dict[Module, list[Param]] = defaultdict(
            list
        )  # frozen weights gathered as layers are run again, by the module that lets go of them
        self.own: list[Param] = []  # gathered without hooks
        self.changes: list[Change] = []

    def plan(self) -> list[tuple[Visit, tuple[Change, ...]]]:
        planned = []
        for number, visit in enumerate(self.visits):
            self.changes = []
            if visit.hook is Hook.FETCH:
                self._fetch(visit)
            elif visit.hook is Hook.GATHER:
                self._gather_itself(visit.params)
            elif visit.hook is Hook.LET_GO:
                self._let_go_itself(visit.params)
            else:
                self._release(visit, number)
            planned.append((visit, tuple(self.changes)))
        assert not self.under_way and all(self._persists(param) for param in self.there)
        return planned

    def _persists(self, param: Param) -> bool:
        return values_of(param[1]) <= self.zero.threshold

    def _is_whole(self, param: Param) -> bool:
        return param in self.there or (self.whole and self._persists(param))

    def _is_missing(self, param: Param) -> bool:
        return not self._is_whole(param) and param not in self.under_way

    def _put(self, tensor: Tensor) -> None:
        self.changes.append(Change(True, tensor))

    def _drop(self, tensor: Tensor) -> None:
        self.changes.append(Change(False, tensor))

    def _fetch(self, visit: Visit) -> None:
        params = visit.params
        self._gather([param for param in params if self._is_missing(param)])
        for param in params:
            self.active[param].add(visit.module)
            if visit.owner is not None and not param[1].trained:
                self.again[visit.owner].append(param)
                self.active[param].add(visit.owner)
        self._wait([self.under_way.pop(param) for param in params if param in self.under_way])
        self._skip({param for param in params if self.fetched_for.get(param, -1) < self.step})
        self._prefetch()
        self.step += 1

    def _skip(self, params: set[Param]) -> None:
        """Take what is fetched now off the queue, unless that was done ahead."""
        skipped: set[Param] = set()
        while len(skipped) < len(params):
            param, step = self.queue[self.next]
            self.next += 1
            self.fetched_for[param] = step
            skipped.add(param)
        assert skipped == params

    def _prefetch(self) -> None:
        most = min(self.zero.max_live - self.live, self.zero.prefetch)
        params: list[Param] = []
        size = 0
        while self.next < len(self.queue) and size < most:
            param, step = self.queue[self.next]
            self.next += 1
            self.fetched_for[param] = max(self.fetched_for.get(param, -1), step)
            if self._is_missing(param) and param not in params:
                params.append(param)
                size += values_of(param[1])
        self._gather(params)

    def _gather(self, asked: Sequence[Param]) -> None:
        if not asked:
            return
        params = sorted(asked, key=self.places.__getitem__)
        self.live += sum(values_of(weight) for _, weight in params)
        shares = [self.zero.share(weight) for _, weight in params]
        name = "gathered weight" if len(params) == 1 else "all-gather buffer"
        buffer = flat_tensor(name, "bfloat16", self.zero.ranks * sum(shares), Role.GATHERED, Stream.GATHER)
        self._put(buffer)
        from_host = [flat_tensor(SHARD_FROM_HOST, "bfloat16", share, Role.GATHERED, Stream.GATHER) for share in shares]
        if not self.zero.recipe.weights_on_host:
            from_host = []
        for tensor in from_host:
            self._put(tensor)
        if len(params) > 1:  # copied into the buffer
            for tensor in from_host:
                self._drop(tensor)
        handle = _Handle(buffer, params, from_host if len(params) == 1 else ())
        self.under_way.update(dict.fromkeys(params, handle))

    def _wait(self, handles: Sequence[_Handle]) -> None:
        """Weights of all-gathers are used, one for each time that a handle is named. DeepSpeed has them in a set, in an order of chance: this is the one
        that holds most."""
        for handle in handles:
            handle.waiting -= 1
            if len(handle.params) == 1:
                self.there[handle.params[0]] = handle.buffer
            elif not handle.is_copied:
                self._copy(handle)
        for handle in dict.fromkeys(handles):
            for tensor in handle.from_host:  # which the call of a single one holds on to
                self._drop(tensor)
            if handle.is_copied and not handle.waiting:
                self._drop(handle.buffer)

    def _copy(self, handle: _Handle) -> None:
        handle.is_copied = True
        for param in handle.params:
            self.there[param] = flat_tensor(
                "gathered weight", "bfloat16", values_of(param[1]), Role.GATHERED, Stream.GATHER
            )
            self._put(self.there[param])

    def _gather_itself(self, params: Iterable[Param]) -> None:
        """Gather what is not there, each into a tensor of its own, at once (_allgather_params_coalesced)."""
        for param in params:
            if self._is_missing(param):
                size = self.zero.ranks * self.zero.share(param[1])
                self.there[param] = flat_tensor("gathered weight", "bfloat16", size, Role.GATHERED)
                self.own.append(param)
                self._put(self.there[param])

    def _let_go_itself(self, params: Iterable[Param]) -> None:
        for param in params:
            if param in self.own:
                self._drop(self.there.pop(param))

    def _release(self, visit: Visit, number: int) -> None:
        going = self.kept.get(number)
        if going is None:
            going = self.kept[number] = frozenset(param for param in visit.params if self._goes(param, visit))
        again = self.again.pop(visit.module, []) if visit.in_backward else []
        going = going.union(param for param in again if not self._persists(param))
        for param in dict.fromkeys((*visit.params, *again)):
            self.active[param].discard(visit.module)
            if param in going and param in self.there and not self.active[param]:
                self.changes.append(Change(False, self.there.pop(param), param))
                self.live -= values_of(param[1])

    def _goes(self, param: Param, visit: Visit) -> bool:
        """Whether a weight is let go (__params_to_release): it is not used again soon, nor was that use passed over when weights were gathered ahead."""
        if self._persists(param):
            return False
        if visit.hook is Hook.LEAVE:
            return True
        if self.fetched_for.get(param, -1) > self.step:
            return False
        return not self.ahead[visit.call.is_leaf].is_used(param, self.step, self.zero.recipe.max_reuse_distance)


class Zero3:
    """A model's weights under a recipe of ZeRO-3's: the same for all lengths. Sizes are in values, but for what says bytes."""

    def __init__(self, recipe: Recipe, weights: Sequence[Weight], hidden: int):
        """weights: in the order in which the model has them."""
        self.recipe, self.weights = recipe, tuple(weights)
        self.trained = tuple(weight for weight in weights if weight.trained)
        self.ranks = recipe.gpus
        self.bucket = recipe.bucket_values(hidden)
        self.prefetch = recipe.prefetch_values(hidden)
        self.threshold = recipe.persistent_values(hidden)
        self.max_live = recipe.max_live_parameters
        shares = [self.share(weight) for weight in self.trained]
        self.partition = sum(shares)
        self.frozen = sum(self.share(weight) for weight in weights if not weight.trained)
        self.largest = max(shares)
        self.groups = sub_groups(shares, recipe.sub_group_size)
        self.steps = [Weight(f"sub-group {n}", (sum(group),), dtype="float32") for n, group in enumerate(self.groups)]
        persistent = [values for weight in weights if (values := values_of(weight)) <= self.threshold]
        self.persistent = flat_tensor(PERSISTENT, "bfloat16", sum(map(self._padded, persistent)), Role.GATHERED)
        self.visits: Sequence[Visit] = ()
        self.in_leaves: frozenset[Weight] = frozenset()
        self._planned: Sequence[tuple[Visit, Sequence[Change]]] = ()

    def share(self, weight: Weight) -> int:
        return -(-values_of(weight) // self.ranks)

    def _padded(self, numel: int) -> int:
        return -(-numel // self.ranks) * self.ranks

    @property
    def on_host(self) -> bool:
        return self.recipe.optimizer_on_host

    def learn(self, visits: Sequence[Visit]) -> None:
        """Plan what is gathered when, of the order in which modules are called."""
        self.visits = visits
        for visit in visits:
            if visit.hook is Hook.LEAVE and visit.call.is_leaf and any(weight.trained for weight in visit.call.weights):
                raise RecipeError(
                    "zero3 with experts trained in a lowest layer whose input gets no gradient fails in DeepSpeed 0.19.8, which reduces their gradients "
                    "before they are made.\nSet --input-gradients, or use --sharding fsdp."
                )
        self.in_leaves = frozenset(weight for visit in visits if visit.call.is_leaf for weight in visit.call.weights)
        # What is let go is settled in the first micro-batch after the one that was recorded; before a first step nothing persists yet.
        first = Coordinator(self, visits, None, whole=self.recipe.accumulation == 1)
        first.plan()
        self._planned = Coordinator(self, visits, first.kept, whole=True).plan()

    def visitor(self, reducer: Reducer | Reducer3) -> Visitor:
        """Who gathers weights in a micro-batch, and tells who reduces gradients when a leaf's backward is over."""
        assert isinstance(reducer, Reducer3)
        return Gathering(self._planned, reducer)

    def reducer(self, first: bool, last: bool) -> Reducer3:
        """What becomes of the gradients of a micro-batch of an optimizer step."""
        return Reducer3(self, first, last)

    def stays(self) -> list[Tensor]:
        """What is there before the first step."""
        parts = [] if self.recipe.weights_on_host else [self._parts(PARTS, "bfloat16", Role.WEIGHT)]
        if self.frozen:
            parts.append(flat_tensor(FROZEN_PARTS, "bfloat16", self.frozen, Role.WEIGHT))
        bucket = flat_tensor("bucket of gradients", "bfloat16", self.bucket, Role.REDUCED)
        persistent = [self.persistent] if self.persistent.bytes else []
        if self.on_host:
            return [*parts, *persistent, bucket]
        gradients = self._parts("parts of all gradients", "bfloat16", Role.WEIGHT_GRADIENT)
        return [
            *parts,
            *persistent,
            self._parts("fp32 parts of all weights", "float32", Role.WEIGHT),
            gradients,
            bucket,
        ]

    def away(self) -> list[Tensor]:
        """What of that is not there while the optimizer steps."""
        return [self.persistent] if self.persistent.bytes else []

    def _parts(self, name: str, dtype: str, role: Purpose) -> Tensor:
        return flat_tensor(name, dtype, self.partition, role)

    def gradients(self, between: bool) -> list[Tensor]:
        """Gradients beside what stays: none."""
        return []

    def step_moments(self) -> list[tuple[str, list[Tensor]]]:
        """What is there at moments of the optimizer's step, beside what stays and the optimizer's states."""
        persistent = ("gather what persists", self.away())
        if self.on_host:
            return [("step in CPU RAM", []), persistent]
        moments: list[tuple[str, list[Tensor]]] = [("norm of gradients", [_wide(self.largest)])]
        for group, stepped in zip(self.groups, self.steps, strict=True):
            fp32 = _fp32(stepped)
            moments.append(("cast gradients to fp32", [*_joined(group), fp32]))
            moments.append(("step", [fp32, *self._temporaries(stepped)]))
        return [*moments, persistent]

    def _temporaries(self, stepped: Weight) -> list[Tensor]:
        """The optimizer's, as it steps a sub-group."""
        made = optimizer_memory(self.recipe, [(stepped, 1)]).temporaries
        return [Tensor(held.name, "", held.dtype, 0, held.bytes, role=Role.UPDATE) for held in made]

    def follow_step(self, ledger: Ledger) -> None:
        """The optimizer's step in order, up to where it makes its own tensors for the last sub-group. What persists is left where it is."""
        wide = _wide(self.largest)
        ledger.put(wide)
        ledger.drop(wide)
        for n, (group, stepped) in enumerate(zip(self.groups, self.steps, strict=True)):
            joined, fp32 = _joined(group), _fp32(stepped)
            for tensor in (*joined, fp32):
                ledger.put(tensor)
            for tensor in joined:
                ledger.drop(tensor)
            if n == len(self.steps) - 1:
                return
            made = self._temporaries(stepped)
            for tensor in made:
                ledger.put(tensor)
            for tensor in (*made, fp32):
                ledger.drop(tensor)

    def host_bytes(self) -> int:
        """Bytes of CPU RAM of one process. Pinned (pin_memory as it comes): gradients of each sub-group in fp32, those of all in bf16, and the
        weights' parts. Not pinned: fp32 weights, the optimizer's states, and the bf16 copy of a sub-group that goes to the GPU."""
        recipe = self.recipe
        if not recipe.optimizer_on_host:
            return 0
        sizes = [stepped.numel for stepped in self.steps]
        pinned = [*(FP32 * size for size in sizes), BF16 * self.partition]
        copy = 0 if recipe.weights_on_host else BF16 * max(sizes)
        if recipe.weights_on_host:
            pinned.append(BF16 * self.partition)
        states = OPTIMIZERS[recipe.optimizer].memory(recipe, [(stepped, 1) for stepped in self.steps]).states
        return sum(map(pinned_bytes, pinned)) + FP32 * self.partition + copy + bytes_of(states)


class Reducer3:
    """Gradients of one micro-batch, from the first of its backward to the end."""

    def __init__(self, zero: Zero3, first: bool, last: bool):
        """first, last: of the micro-batches of an optimizer step."""
        self.zero, self.first, self.last = zero, first, last
        self.left: dict[Weight, list[int]] = defaultdict(list)
        for number, weight in enumerate(zero.trained):
            self.left[weight].append(number)
        self.inside: list[int] = []  # the bucket: numbers of weights
        self.values = 0
        self.large: Tensor | None = None  # the gradient that is in it, and too large for it
        self.waiting: list[tuple[Weight, Tensor]] = []  # gradients of a leaf's weights

    def arrive(self, weight: Weight, gradient: Tensor, ledger: Ledger) -> None:
        """A weight has its gradient."""
        if weight in self.zero.in_leaves:
            self.waiting.append((weight, gradient))
        else:
            self._take(weight, gradient, ledger)

    def finish_leaf(self, ledger: Ledger) -> None:
        """The backward of a leaf is over (reduce_leaf_module_grads)."""
        waiting, self.waiting = self.waiting, []
        for weight, gradient in sorted(waiting, key=lambda each: self.zero.weights.index(each[0])):
            self._take(weight, gradient, ledger)

    def _take(self, weight: Weight, gradient: Tensor, ledger: Ledger) -> None:
        if self.values + weight.numel > self.zero.bucket:
            self._reduce(ledger)
        self.inside.append(self.left[weight].pop())  # layers come last first
        self.values += weight.numel
        if self.values <= self.zero.bucket:
            ledger.drop(gradient)
        else:
            self.large = gradient

    def finish(self, ledger: Ledger) -> None:
        """Backward is over."""
        self._reduce(ledger)

    def _reduce(self, ledger: Ledger) -> None:
        """Reduce the bucket, and keep this GPU's parts of it."""
        if not self.inside:
            return
        weights = [self.zero.trained[number] for number in sorted(self.inside)]
        shares = [self.zero.share(weight) for weight in weights]
        is_view = len(weights) == 1 and weights[0].numel % self.zero.ranks == 0
        name = "gradients in the order of the GPUs"
        flat = (
            []
            if is_view
            else [flat_tensor(name, "bfloat16", self.zero.ranks * sum(shares), Role.REDUCED, Stream.REDUCE)]
        )
        for tensor in flat:
            ledger.put(tensor)
        ledger.mark("reduce the bucket of gradients")
        if self.zero.on_host:
            self._to_host(shares, ledger)
        for tensor in (*([self.large] if self.large is not None else []), *flat):
            ledger.drop(tensor)
        self.inside, self.values, self.large = [], 0, None

    def _to_host(self, shares: Iterable[int], ledger: Ledger) -> None:
        """Parts of gradients come back from CPU RAM and go there again (partition_grads), in the last micro-batch in fp32, after their norms."""
        held: Tensor | None = None
        for share in shares:
            if held is not None and self.first:
                ledger.drop(held)
            sum_of_part = flat_tensor(FROM_HOST, "bfloat16", share, Role.REDUCED, Stream.REDUCE)
            ledger.put(sum_of_part)
            ledger.mark("gradient from CPU RAM")
            if held is not None and not self.first:
                ledger.drop(held)  # a variable had it
            held = sum_of_part
            if self.last:
                fp32 = flat_tensor("part of a gradient, fp32", "float32", share, Role.REDUCED, Stream.REDUCE)
                for tensor in (_wide(min(share, NORM_BUFFER), Stream.REDUCE), fp32):
                    ledger.put(tensor)
                    ledger.mark("norm of a gradient")
                    ledger.drop(tensor)
        if held is not None:
            ledger.drop(held)


FROM_HOST = "part of a gradient, from CPU RAM"
SHARD_FROM_HOST = "part of a weight, from CPU RAM"


def sub_groups(shares: Iterable[int], size: int) -> list[list[int]]:
    """Parts of weights in the groups that are stepped one after the other (_create_fp16_sub_groups)."""
    groups: list[list[int]] = [[]]
    for share in shares:
        if groups[-1] and sum(groups[-1]) >= size:
            groups.append([])
        groups[-1].append(share)
    return groups


CHECKED = frozenset(
    (
        *("llama", "arcee", "cwm", "granite", "hyperclovax", "jais2", "hunyuan_v1_dense", "internlm3", "iquestcoder"),
        *("smollm3", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "vaultgemma", "olmo2"),
        *("olmo3", "starcoder2", "glm", "glm4", "ernie4_5", "helium", "exaone4", "cohere", "cohere2", "falcon"),
        *("seed_oss", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite"),
        *("gpt_oss", "olmoe", "flex_olmo", "granitemoe", "dots1", "exaone_moe", "mellum", "minimax_m2", "solar_open"),
    )
)
"""Families whose modules are known to be called in the order in which they are laid out (tests/tracing/test_calls.py)."""
LEAVES = frozenset(("mixtral", "qwen2_moe", "qwen3_moe"))
"""Of these, those whose experts with their router are one module to its hooks (deepspeed/runtime/zero/leaf_module_config.py)."""


def check_calls(model: Model, in_pieces: bool) -> None:
    """Check that the order in which a model's modules are called is known. in_pieces: MLPs run so. Raises RecipeError."""
    if model.model_type not in CHECKED:
        raise RecipeError(
            f"ZeRO-3 gathers weights ahead in the order of a model's modules, which is not known of {model.name} ({model.model_type}).\n"
            "Use --sharding fsdp, FSDP2, or zero2."
        )
    if in_pieces and model.experts is not None:
        raise RecipeError(
            f"zero3 with experts in pieces of the sequence is not planned, as {model.name} has them.\n"
            "Take the strategy checkpointing or chunked-loss (-s checkpointing,chunked-loss), or --sharding fsdp."
        )


def _wide(numel: int, stream: Stream = Stream.COMPUTE) -> Tensor:
    name = "one gradient in fp64, for its norm"
    return Tensor(name, "", "float64", 0, FP64 * numel, role=Role.UPDATE, stream=stream)


def _fp32(stepped: Weight) -> Tensor:
    return flat_tensor("gradients of the sub-group, fp32", "float32", stepped.numel, Role.UPDATE)


def _joined(group: Sequence[int]) -> list[Tensor]:
    """A copy of a sub-group's gradients where there are several (_flatten_dense_tensors)."""
    return (
        [flat_tensor("gradients of the sub-group, flat", "bfloat16", sum(group), Role.UPDATE)] if len(group) > 1 else []
    )
