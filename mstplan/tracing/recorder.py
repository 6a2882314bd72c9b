"""Records what a step allocates and releases, operation by operation: a dispatch mode.

A storage counts from the operation that makes it until Python lets go of its last tensor. Autograd adds gradients in place,
but under any dispatch mode out of place (aten::isTensorSubclassLike in torch/csrc/autograd/input_buffer.cpp). The recorder
undoes that: a sum whose first summand is let go at once takes that one's place. So do gradients written onto zeros.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from ..step.instants import Pass
from ..train.checkpoint import Checkpoints
from . import values
from .recording import Category, Place, Recording, Storage


class ModuleLabel(NamedTuple):
    """What is known of a module before it runs."""

    path: str
    category: Category
    unit: int | None  # None: outside of all layers
    is_layer: bool = False


Results = deque[tuple[torch.Tensor, ...]]
"""Of kernels, in the order in which they ran."""
MakeTemporary = Callable[..., tuple[str, torch.Tensor | None]]
"""Of an operation's arguments, what its kernel makes, and for what."""
ROOT = ModuleLabel("", Category.OTHER, None)
IN_HOOK = ModuleLabel("", Category.STATES, None)  # an optimizer that steps in backward, as soon as a gradient is there

ONTO_ZEROS = {torch.ops.aten.index_put, torch.ops.aten.index_add, torch.ops.aten.scatter, torch.ops.aten.scatter_add}
"""What gradients of picked entries are made by, from zeros made just before: in place, but under a dispatch mode not
(areAnyTensorSubclassLike in torch/csrc/autograd/FunctionsManual.cpp)."""


class Recorder(TorchDispatchMode):
    """Records into `recording` while it is entered; `labels`: of the modules, by module. `in_place`: add gradients as
    autograd does without a dispatch mode."""

    def __init__(self, labels: Mapping[nn.Module, ModuleLabel], units: int, in_place: bool = True):
        super().__init__()
        self.recording = Recording()
        self.labels, self.units, self.in_place = labels, units, in_place
        self._indices: dict[int, int] = {}  # storage: index into the recording's
        # FSDP enters streams on a CPU as on a GPU, where they are objects without use
        self._streams = {torch.cpu.current_stream(): 0}
        self._resident: set[int] = set()  # storages that were there before
        self._label_stack: list[ModuleLabel] = [ROOT]
        self._run, self._unit, self._latest_label = Pass.FORWARD, -1, ROOT
        self._forward_marks: list[
            tuple[int, ModuleLabel, int]
        ] = []  # autograd's sequence numbers, and whose forward they are of
        self._layer_labels = [label for label in labels.values() if label.is_layer]
        self.recomputing: Callable[[], int | None] = lambda: None  # the layer that a checkpoint runs again
        self.temporaries: Mapping[Any, MakeTemporary] = {}  # what kernels make for themselves beside their results
        self._purpose: tuple[str, Category | None] | None = None  # what a stand-in says it allocates for
        self._selection: tuple[Results, bool] | None = None  # of a selective checkpoint, and whether it is run again
        # the operation of DTensors that comes next for what is here of them: autograd adds none of these in place
        self._of_parts: Any = None
        self._pending_sum: tuple[int, int] | None = (
            None  # a sum of gradients just made: (its storage, that of its first summand)
        )

    def add_residents(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tensors that stay through all that is recorded, and are not part of it: weights, the optimizer's states."""
        for storage in [local_tensor(tensor).untyped_storage() for tensor in tensors]:
            self._resident.add(storage._cdata)
            weakref.finalize(
                storage, self._resident.discard, storage._cdata
            ).atexit = False  # its address may be another's then

    # ---- places -------------------------------------------------------------------------------------------------------

    def begin_pass(self, run: Pass) -> None:
        """A pass of the step begins: forward, backward or optimizer."""
        self._run, self._unit = run, -1 if run == Pass.FORWARD else self.units
        self._enter_place(Place(run, self._unit))

    def _enter_place(self, place: Place) -> None:
        if not self.recording.places or self.recording.places[-1][0] != place:
            self.recording.enter(place)

    def _locate_operation(self) -> ModuleLabel:
        """The module that the operation at hand is of; moves on to its place."""
        label = self._current_label()
        if self._run == Pass.FORWARD:
            self._enter_place(Place(Pass.FORWARD, self._unit))
        elif self._run == Pass.BACKWARD:
            layer = self.recomputing()
            if layer is not None:
                label = label if len(self._label_stack) > 1 else self._layer_labels[layer]
            elif len(self._label_stack) == 1:  # else one chunk's forward pass
                label = self._label_of_node(torch._C._current_autograd_node())
            unit = label.unit if label.unit is not None or layer is None else self._layer_labels[layer].unit
            self._unit = unit if unit is not None else self._unit
            self._latest_label = label
            self._enter_place(Place(Pass.RECOMPUTE if layer is not None else Pass.BACKWARD, self._unit))
        return label

    def _label_of_node(self, node: Any) -> ModuleLabel:
        """The module whose forward pass made a node of autograd's graph."""
        if node is None:  # autograd adds gradients
            return self._latest_label
        if "AccumulateGrad" in node.name():
            return IN_HOOK
        position = bisect_right(self._forward_marks, node._sequence_nr(), key=lambda mark: mark[0]) - 1
        _, label, unit = self._forward_marks[position]
        self._unit = min(self._unit, unit)  # backward never turns round
        return label

    def _current_label(self) -> ModuleLabel:
        """The module that runs a forward pass; what the model itself does after its layers is the loss. Between modules of a chunk
        that backward runs again it is the one whose backward that is."""
        label = (
            self._latest_label._replace(unit=None)
            if self._run == Pass.BACKWARD and len(self._label_stack) == 1
            else self._label_stack[-1]
        )
        return (
            label._replace(category=Category.LOSS)
            if label.category == Category.OTHER and self._unit == self.units
            else label
        )

    # ---- events -------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if of_dtensors(types):
            self._of_parts = func
            return NotImplemented  # it comes again for the shard that is here
        if func.namespace == "profiler":
            return func(*args, **(kwargs or {}))  # a name for what follows: it makes nothing, and is at no place
        label = self._locate_operation()
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].device  # what most calls are: the modes below would say the same
        try:
            out = values.run(func, args, kwargs or {})
        except values.UnknownValues as e:
            e.module = label.path
            raise
        self._pending_sum = None
        of_parts = func is self._of_parts
        if of_parts:
            self._of_parts = None
        if isinstance(out, torch.Tensor):
            self._record_storage(out, func, label)
            if self.in_place and not of_parts and self._run == Pass.BACKWARD and self._adds_in_place(func, args):
                self._pending_sum = (out.untyped_storage()._cdata, args[0].untyped_storage()._cdata)
        else:
            for value in tree_iter(out):
                if isinstance(value, torch.Tensor):
                    self._record_storage(value, func, label)
        if (make := self.temporaries.get(func.overloadpacket)) is not None:
            purpose, temporary = make(*args, **(kwargs or {}))
            if temporary is not None:
                with self.purpose(purpose, label.category):
                    self._record_storage(temporary, func, label)
        return out

    def _record_storage(self, tensor: torch.Tensor, func: Any, label: ModuleLabel) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._indices or key in self._resident or not storage.nbytes():
            return
        operation, category = self._purpose or (_operation_name(func), None)
        dtype = str(tensor.dtype).removeprefix("torch.")
        new_storage = Storage(
            storage.nbytes(),
            tuple(tensor.shape),
            dtype,
            operation,
            label.path,
            category or label.category,
            stream=self._streams.setdefault(torch.cpu.current_stream(), len(self._streams)),
        )
        self._indices[key] = self.recording.add(new_storage)
        weakref.finalize(storage, self._record_release, key).atexit = False

    def record_filled(self, tensor: torch.Tensor) -> None:
        """The storage of `tensor`, that was emptied, has memory again (FSDP2 fills and empties those of gathered weights)."""
        self._record_storage(tensor, None, self._locate_operation())

    def record_emptied(self, tensor: torch.Tensor) -> None:
        """The storage of `tensor` has no memory any more."""
        self._record_release(tensor.untyped_storage()._cdata)

    def close(self) -> Recording:
        """What was recorded; what is let go from now on is no part of it."""
        self._indices.clear()
        self.labels, self.recomputing = (
            {},
            lambda: None,
        )  # gradients that live on hold the recorder; it must not hold their model
        return self.recording

    def _record_release(self, key: int) -> None:
        index = self._indices.pop(key, None)
        if index is None:
            return
        if self._pending_sum is not None and self._pending_sum[1] == key and self._merge_sum(index):
            return
        self.recording.events.append((index, -1))

    def _adds_in_place(self, func: Any, args: Sequence[Any]) -> bool:
        """Would autograd put the result just made where the first operand is, if no dispatch mode was there?"""
        if len(self._label_stack) > 1:
            return False  # a module's code, run again
        if func is torch.ops.aten.add.Tensor:
            node = torch._C._current_autograd_node()  # in a hook of a weight's gradient an optimizer adds, not autograd
            return not (node is not None and "AccumulateGrad" in node.name()) and _owns_storage(args[0])
        return func.overloadpacket in ONTO_ZEROS and self.storage_index(args[0]) == len(self.recording.storages) - 2

    def _merge_sum(self, index: int) -> bool:
        """Let the sum that was just made be its first summand, `index`, with another value."""
        assert self._pending_sum is not None
        (key, _), self._pending_sum = self._pending_sum, None
        storages, events, newest = self.recording.storages, self.recording.events, len(self.recording.storages) - 1
        if (
            self._indices.get(key) != newest
            or events[-1] != (newest, 1)
            or storages[newest].bytes != storages[index].bytes
        ):
            return False
        events.pop()
        storages.pop()
        self._indices[key] = index
        return True

    # ---- what tensors are for ---------------------------------------------------------------------------------------------

    @contextmanager
    def purpose(self, operation: str, category: Category | None = Category.WORKSPACE) -> Iterator[None]:
        """What is made within the context is made for this, whatever operation makes it. category: None for the module's."""
        outer, self._purpose = self._purpose, (operation, category)
        try:
            yield
        finally:
            self._purpose = outer

    @contextmanager
    def select(self, results: Results, again: bool) -> Iterator[None]:
        """Within the context what kernels of attention make goes into `results`, or is taken from there: it is made again."""
        outer, self._selection = self._selection, (results, again)
        try:
            yield
        finally:
            self._selection = outer

    def kernel_results(self, make: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """What a stand-in for a kernel makes, or made when a selective checkpoint ran it first."""
        if self._selection is None:
            return make()
        results, again = self._selection
        if again:
            return results.popleft()
        made = make()
        results.append(tuple(tensor.detach() for tensor in made))  # which no graph hangs on
        return made

    def set_category(self, tensor: torch.Tensor, category: Category, host: bool = False) -> None:
        """A tensor that turns out to be a gradient, a layer's input, or a state, which a GPU's optimizer may keep in CPU RAM."""
        index = self._indices.get(local_tensor(tensor).untyped_storage()._cdata)
        if index is not None:
            self.recording.storages[index].category = category
            self.recording.storages[index].host |= host

    def _mark_gradient(self, weight: torch.Tensor) -> None:
        if weight.grad is not None:  # autograd may find that there is none
            self.set_category(weight.grad, Category.GRADIENTS)

    def storage_index(self, tensor: torch.Tensor) -> int | None:
        """Of the storage of a tensor in what was made."""
        return self._indices.get(tensor.untyped_storage()._cdata)

    def empty_on_host(self, like: torch.Tensor, pinned: bool, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """Stands in for the runtime's: fake tensors have one device, so what is on the host is noted here."""
        tensor = torch.empty_like(like) if sizes is None else like.new_empty(sizes)
        index = self._indices.get(tensor.untyped_storage()._cdata)
        if index is not None:
            self.recording.storages[index].host = True
        return tensor

    @contextmanager
    def watch_modules(self, model: nn.Module) -> Iterator[None]:
        """Within the context forward passes of the model's modules label what they, and autograd after them, make."""
        last_layers = [module for module, label in self.labels.items() if label.is_layer][-1:]
        if (checkpoints := checkpoints_of(model)) is not None:
            self.recomputing = lambda: checkpoints.recomputing

        def enter(module: nn.Module, inputs: Any) -> None:
            label = self.labels.get(module, self._label_stack[-1])
            self._label_stack.append(label)
            if label.unit is not None and self._run == Pass.FORWARD:
                self._unit = label.unit
            if label.is_layer and inputs and isinstance(inputs[0], torch.Tensor):
                self.set_category(inputs[0], Category.INPUTS)
            self._mark_forward()

        def leave(module: nn.Module, _inputs: Any, _output: Any) -> None:
            self._label_stack.pop()
            if self._run == Pass.FORWARD and last_layers and module is last_layers[0]:
                self._unit = self.units
            self._mark_forward()

        handles: list[Any] = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]
        handles += [
            w.register_post_accumulate_grad_hook(self._mark_gradient) for w in model.parameters() if w.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _mark_forward(self) -> None:
        self._forward_marks.append((torch._C._autograd._get_sequence_nr(), self._current_label(), self._unit))


def checkpoints_of(model: nn.Module) -> Checkpoints | None:
    """The checkpoints of a model that runs in mini-sequences, if it has any."""
    settings = next(
        (m._mstplan for m in model.modules() if isinstance(m, PreTrainedModel) and hasattr(m, "_mstplan")), None
    )
    return settings.checkpoints if settings is not None else None


def _owns_storage(summand: torch.Tensor) -> bool:
    """Would autograd add to it in place, if nothing else held it? A view has its base, which holds the same storage
    (can_accumulate_inplace in torch/csrc/autograd/input_buffer.cpp)."""
    return (
        not torch.is_grad_enabled() and not summand._is_view() and torch.ops.aten.is_non_overlapping_and_dense(summand)
    )


def of_dtensors(types: Iterable[type]) -> bool:
    """Whether an operation that is dispatched is of DTensors; it comes again for what is on this device."""
    return any(issubclass(kind, DTensor) for kind in types)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What is on this device of a tensor: all of it, or the shard of a distributed one."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _operation_name(func: Any) -> str:
    """aten.mm.default -> mm."""
    return str(func).removeprefix("aten.").removesuffix(".default")
