"""Attention whose queries, keys, values and results wait in CPU RAM: on the device they are there for one group of heads at a time.

Pieces of the sequence copy what they make of a layer's input to the host (`pieces.py`). For each group of heads queries, keys and values come
back, attention runs, and its result goes to the host, from where the pieces that follow take their part. What the kernel saves for backward
of the size of these is on the host as well, once; the rest of it (sums of rows, masks) stays. Backward is the same in reverse.

All copies run on the stream that computes, so that no memory is handed on before its copy is through. Pinned memory is reused by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .runtime import Runtime

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of queries, keys and values (b, heads, s, width): (b, s, heads, width)."""


class _Graph(NamedTuple):
    """What autograd recorded of one group's attention, by edges, which hold no tensors: of the result, and of what wants gradients."""

    result: GradientEdge
    inputs: list[GradientEdge]


class Graphs:
    """Graphs of attention that backward comes to next. A checkpoint's backward goes through the nodes of its first run, with what the
    second run saves; so graphs are found by a saved tensor, which stands for the one that was recorded along with it."""

    def __init__(self) -> None:
        self._by_storage: dict[int, _Graph] = {}
        self.records = True  # False: in the first run of a checkpoint, whose graph nobody comes to

    def begin_layer(self, checkpointed: bool, again: bool) -> None:
        """A layer runs, within a checkpoint, for the second time."""
        self.records = again or not checkpointed
        if again:
            self._by_storage.clear()

    def keep(self, handle: torch.Tensor, graph: _Graph) -> None:
        self._by_storage[handle.untyped_storage()._cdata] = graph

    def take(self, handle: torch.Tensor) -> _Graph:
        return self._by_storage.pop(handle.untyped_storage()._cdata)


def attend_from_host(
    attend: Attend, graphs: Graphs, runtime: Runtime, device: torch.device, made: Sequence[torch.Tensor]
) -> torch.Tensor:
    """attend(*made), differentiable. made: queries, keys, values, on the host, as the result is; `device` is where attention runs."""
    out: torch.Tensor = _Attention.apply(attend, graphs, runtime, device, *made)
    return out


class _Attention(torch.autograd.Function):
    """Keeps the graph of `attend`, whose backward is run in this one's."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, attend: Attend, graphs: Graphs, runtime: Runtime, device: torch.device, *made: torch.Tensor
    ) -> torch.Tensor:
        ctx.graphs, ctx.runtime, ctx.device, ctx.stream = graphs, runtime, device, _current_stream(device)
        ctx.wanted = ctx.needs_input_grad[4:]
        handle = torch.empty(0)
        ctx.save_for_backward(handle)
        records = graphs.records and any(ctx.wanted)
        sent = _Sent(runtime, {tensor.shape[-1] for tensor in made})
        with torch.set_grad_enabled(records):
            inputs = [
                _Arrival.apply(_anchor(wants), sent, tensor, device)
                for tensor, wants in zip(made, ctx.wanted, strict=True)
            ]
            with torch.autograd.graph.saved_tensors_hooks(sent.pack, lambda kept: _unpack(kept, runtime, device)):
                result = attend(*inputs)
        if records:
            wanted = [tensor for tensor, wants in zip(inputs, ctx.wanted, strict=True) if wants]
            graphs.keep(handle, _Graph(get_gradient_edge(result), list(map(get_gradient_edge, wanted))))
        return sent.copy_of(result.detach())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (handle,) = ctx.saved_tensors
        graph = ctx.graphs.take(handle)
        with ctx.stream:
            arrived = ctx.runtime.to_device(gradient, ctx.device)
            found = list(torch.autograd.grad([graph.result], graph.inputs, [arrived]))
            del graph, arrived
            on_host = [ctx.runtime.to_host(found.pop(0)) if wants else None for wants in ctx.wanted]
        return (None, None, None, None, *on_host)


def _current_stream(device: torch.device) -> AbstractContextManager[Any]:
    """What backward runs on, too: other threads of autograd have streams of their own."""
    if device.type == "cpu":
        return nullcontext()
    stream: AbstractContextManager[Any] = torch.accelerator.current_stream(device)
    return stream


def _anchor(wants_gradient: bool) -> torch.Tensor:
    """What a graph begins with that no tensor of size is held by."""
    return torch.empty(0, requires_grad=wants_gradient)


class _Arrival(torch.autograd.Function):
    """A tensor that comes from the host. Its gradient is taken at the edge to this, which never runs."""

    @staticmethod
    def forward(_ctx: Any, _anchor: torch.Tensor, sent: _Sent, on_host: torch.Tensor, device: torch.device) -> Any:  # type: ignore[override]
        tensor = sent.runtime.to_device(on_host, device)
        sent.know(tensor, on_host)
        return tensor


class _Kept(NamedTuple):
    """A saved tensor on the host: its memory there, and how it lies in it."""

    memory: torch.Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def view(self) -> torch.Tensor:
        return self.memory.as_strided(self.size, self.stride, self.offset)


def _unpack(kept: Any, runtime: Runtime, device: torch.device) -> Any:
    return runtime.to_device(kept.view(), device) if isinstance(kept, _Kept) else kept


class _Sent:
    """What of one group's attention is on the host, while it runs. widths: of heads, by which what is as large as queries is told."""

    def __init__(self, runtime: Runtime, widths: set[int]):
        self.runtime, self.widths = runtime, widths
        self.memories: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by storage: who lies in it, and the copy

    def know(self, tensor: torch.Tensor, on_host: torch.Tensor) -> None:
        """Note that all of a tensor's memory is on the host, laid out alike, if that is so."""
        fills = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
        if fills and tensor.stride() == on_host.stride():
            self.memories[tensor.untyped_storage()._cdata] = tensor.detach(), on_host

    def pack(self, tensor: torch.Tensor) -> Any:
        """A saved tensor, on the host if it is as large as queries are."""
        if tensor.dim() != 4 or tensor.shape[-1] not in self.widths or not tensor.is_floating_point():
            return tensor
        _, on_host = self.memories.get(tensor.untyped_storage()._cdata, (None, None))
        if on_host is not None:
            return _Kept(on_host, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        on_host = self.runtime.to_host(tensor)
        self.know(tensor, on_host)
        return _Kept(on_host, tensor.size(), on_host.stride(), 0)

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the host, copied unless it is there. Nothing is known afterwards."""
        kept = self.pack(tensor)
        self.memories.clear()
        return kept.view() if isinstance(kept, _Kept) else self.runtime.to_host(tensor)
