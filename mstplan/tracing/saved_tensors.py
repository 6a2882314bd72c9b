"""What TRL's activation_offloading (OffloadActivations in trl/models/activation_offloading.py, with streams) allocates and lets go of,
on fake tensors: `step/saved_tensors.py` says what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ..step.saved_tensors import IN_FLIGHT, SMALLEST
from .recorder import Recorder

Memory = tuple[int, int | torch.SymInt, torch.dtype]


class _Sent(NamedTuple):
    """A tensor on the host, and its size and strides on the device."""

    on_host: torch.Tensor
    size: torch.Size
    stride: tuple[int, ...]


class HostHooks:
    """One for a step. head: the module whose saved tensors stay."""

    def __init__(self, model: nn.Module, head: nn.Module, recorder: Recorder):
        self.recorder, self.head = recorder, head
        self.parameters = {weight.untyped_storage()._cdata for weight in model.parameters()}
        self.number = 0  # of tensors seen
        self.there: dict[int, torch.Tensor | _Sent] = {}
        self.in_flight: dict[int, torch.Tensor] = {}
        self.memories: dict[int, Memory] = {}
        self.latest: dict[Memory, int] = {}
        self.fetched: dict[int, torch.Tensor] = {}
        self.node: Any = None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Within the context, which holds a forward pass and its backward pass, saved tensors are kept on the host."""
        apart: list[Any] = []

        def enter(*_: Any) -> None:
            apart.append(saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor))
            apart[-1].__enter__()

        handles = [
            self.head.register_forward_pre_hook(enter),
            self.head.register_forward_hook(lambda *_: apart.pop().__exit__(), always_call=True),
        ]
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for table in (self.there, self.in_flight, self.memories, self.latest, self.fetched):
                table.clear()

    def _pack(self, tensor: torch.Tensor) -> int:
        self.number += 1
        number, storage = self.number, tensor.untyped_storage()
        index = self.recorder.storage_index(tensor)  # which no later storage at the same address has
        memory = (index if index is not None else -storage._cdata, tensor.storage_offset(), tensor.dtype)
        stays = memory in self.latest
        if stays:
            self._know(number, memory)
        if stays or tensor.numel() * tensor.itemsize < SMALLEST or storage._cdata in self.parameters:
            self.there[number] = tensor
            return number
        broadcast = 0 in tensor.stride()
        if not broadcast and tensor.storage_offset() != 0:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        elif not broadcast:
            tensor = tensor.contiguous()
        for earlier in [n for n in self.in_flight if n <= number - IN_FLIGHT]:
            self._let_go(earlier)
        content = tensor.as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0) if broadcast else tensor
        self.there[number] = _Sent(self.recorder.empty_on_host(content, pinned=True), tensor.size(), tensor.stride())
        self.in_flight[number] = tensor
        self._know(number, memory)
        return number

    def _unpack(self, number: int) -> torch.Tensor:
        kept = self.there.pop(number)
        self._forget(number)
        return kept if isinstance(kept, torch.Tensor) else self._bring_back(number, kept)

    def _bring_back(self, number: int, sent: _Sent) -> torch.Tensor:
        """For the node at hand; what came back for the one before goes when it is done."""
        node: Any = torch._C._current_autograd_node()
        outdated: list[int] = []
        if node != self.node:
            self.node, outdated = node, list(self.fetched)
        if number in self.in_flight:
            tensor = self.in_flight[number]
        else:
            tensor = torch.empty_like(sent.on_host).as_strided(sent.size, sent.stride)
            self.fetched[number] = tensor
        node.register_hook(self._when_done(number, outdated, _uses(tensor)))
        return tensor

    def _when_done(self, number: int, outdated: list[int], uses: int) -> Callable[..., Any]:
        def hook(_outputs: Any, _inputs: Any) -> None:
            tensor = self.fetched.get(number)
            if tensor is not None and _uses(tensor) > uses:  # a view of it lives on
                del self.fetched[number]
            for earlier in list(self.in_flight):
                self._let_go(earlier)
            for earlier in outdated:
                self.fetched.pop(earlier, None)

        return hook

    def _know(self, number: int, memory: Memory) -> None:
        self.latest[memory], self.memories[number] = number, memory

    def _forget(self, number: int) -> None:
        memory = self.memories.pop(number, None)
        if memory is not None and self.latest.get(memory) == number:
            del self.latest[memory]

    def _let_go(self, number: int) -> None:
        del self.in_flight[number]
        self._forget(number)


def _uses(tensor: torch.Tensor) -> int:
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count
