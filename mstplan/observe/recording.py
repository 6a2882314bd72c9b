"""What a step allocates and releases, in order, and for what: read off every operation by a dispatch mode.

A storage counts from the operation that makes it until Python lets go of its last tensor. Each is labelled with the
operation, the module that ran, the phase, the shape and the dtype of the tensor it was made for.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Made(NamedTuple):
    """A storage: bytes, and the tensor that it was made for."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    operation: str
    module: str  # its path in the model; in backward that of the module whose forward made the node
    phase: str
    backward: bool  # was it made by autograd, as opposed to a forward pass or a recomputation?


class Recording:
    """events: (index into `made`, +1 allocated or -1 released), in order. phases: (name, index of its first event)."""

    def __init__(self) -> None:
        self.made: list[Made] = []
        self.events: list[tuple[int, int]] = []
        self.phases: list[tuple[str, int]] = []

    def live(self) -> Iterator[int]:
        """Bytes alive after each event."""
        total = 0
        for index, sign in self.events:
            total += sign * self.made[index].bytes
            yield total

    def peak(self, phase: str | None = None) -> tuple[int, int]:
        """(bytes, index of the event) of the largest moment, of one phase or of all."""
        best, at = 0, 0
        names = self._phase_of_events()
        for n, (total, name) in enumerate(zip(self.live(), names, strict=True)):
            if (phase is None or name == phase) and total > best:
                best, at = total, n
        return best, at

    def alive_at(self, event: int) -> list[Made]:
        """The storages alive after an event, largest first."""
        alive: set[int] = set()
        for index, sign in self.events[: event + 1]:
            (alive.add if sign > 0 else alive.discard)(index)
        return sorted((self.made[i] for i in alive), key=lambda made: -made.bytes)

    def _phase_of_events(self) -> Iterator[str]:
        starts = [start for _, start in self.phases]
        for n in range(len(self.events)):
            where = bisect_right(starts, n) - 1
            yield self.phases[where][0] if where >= 0 else ""


class Recorder(TorchDispatchMode):
    """Records into `recording` from when it is entered; `phase(name)` begins a phase of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self._known: dict[int, int] = {}  # storage: index into made
        self._phase = ""
        self._stack: list[str] = [""]
        self._forward_of: list[tuple[int, str]] = []  # autograd's sequence numbers and the module whose forward they are of
        self._names: dict[nn.Module, str] = {}

    def phase(self, name: str) -> None:
        self._phase = name
        self.recording.phases.append((name, len(self.recording.events)))

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._see(value, func)
        return out

    def _see(self, tensor: torch.Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        node = torch._C._current_autograd_node()
        module = self._stack[-1] if node is None or len(self._stack) > 1 else self._module_of(node)
        made = Made(
            storage.nbytes(), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), str(func), module, self._phase, node is not None,
        )  # fmt: skip
        self._known[key] = len(self.recording.made)
        self.recording.events.append((len(self.recording.made), 1))
        self.recording.made.append(made)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.recording.events.append((self._known.pop(key), -1))

    def _module_of(self, node: Any) -> str:
        at = bisect_right(self._forward_of, (node._sequence_nr(), "\U0010ffff")) - 1
        return self._forward_of[at][1] if at >= 0 else ""

    @contextmanager
    def modules_of(self, model: nn.Module) -> Iterator[None]:
        """Within the context the forward passes of the model's modules label what they, and autograd after them, make."""
        self._names = {module: name for name, module in model.named_modules()}

        def enter(module: nn.Module, _inputs: Any) -> None:
            self._stack.append(self._names.get(module, self._stack[-1]))
            self._mark()

        def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            self._stack.pop()
            self._mark()

        handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _mark(self) -> None:
        self._forward_of.append((torch._C._autograd._get_sequence_nr(), self._stack[-1]))
