"""Layer inputs in CPU RAM: copied out on a side stream while the layer computes, fetched back before backward needs them.

On the device there are never more than two: in the forward pass the input of the running layer and that of the layer
before, until its copy is done; in the backward pass that of the running layer and the next one on its way. (Some models'
own code holds on to the first layer's input until its forward pass is over, and a loss that waits for its backward holds the
last layer's.)

Nothing here waits on the CPU: streams wait for each other's events. The memory of a tensor goes back to the compute stream
only after that stream has waited for the copy, so the caching allocator may hand it on at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import RecipeError
from ..units import format_gib
from .runtime import Runtime


class HostRooms:
    """Memory on the host that is free again, for the next step's layer inputs: allocating pinned memory takes longer than filling it."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._free: list[torch.Tensor] = []

    def take(self, like: torch.Tensor, pinned: bool) -> torch.Tensor:
        """Room for a tensor like `like`, maybe with more behind it. Of shorter rooms one goes for each that is made."""
        fitting = [n for n, r in enumerate(self._free) if r.dtype == like.dtype and r.numel() >= like.numel()]
        if fitting:
            return self._free.pop(min(fitting, key=lambda n: self._free[n].numel()))
        if self._free:
            self._free.pop()
        return self.runtime.empty_on_host(like, pinned)

    def give_back(self, room: torch.Tensor, pinned: bool) -> None:
        """Keep it for the next step, if it is pinned: other memory is had at once."""
        if pinned:
            self._free.append(room)

    def check(self, like: torch.Tensor, count: int) -> None:
        """Check that the host has room for so many tensors like `like`. Raises RecipeError."""
        free_bytes = self.runtime.free_on_host()
        wanted = count * like.numel() * like.itemsize - sum(room.numel() * room.itemsize for room in self._free)
        if free_bytes is not None and wanted > free_bytes:
            raise RecipeError(
                f"{count} layer inputs of {format_gib(like.numel() * like.itemsize)} do not fit in CPU RAM: {format_gib(free_bytes)} are free."
                "\nShorten the sequences, take fewer checkpoints (checkpoint='sqrt'), or leave offload out."
            )


class HostCopies:
    """The layer inputs of a model that are, or were, on the host. They live as long as the graph that needs them."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.rooms = runtime, HostRooms(runtime)
        self._checked = 0  # bytes of the largest layer input that the host was found to have room for
        self._latest: Callable[[], HostCopy | None] = _no_copy
        self._streams: dict[torch.device, Any] = {}

    def __deepcopy__(self, _memo: Any) -> HostCopies:
        return HostCopies(self.runtime)  # of another model

    @contextmanager
    def keep_on_host(self, index: int, count: int) -> Iterator[None]:
        """Within the context, what autograd saves is kept on the host; index: of the layer, 0 begins a forward pass; count: of layer
        inputs in one. Raises RecipeError when the host has no room for them."""

        def pack(tensor: torch.Tensor) -> HostCopy:
            if tensor.numel() * tensor.itemsize > self._checked:
                self.rooms.check(tensor, count)
                self._checked = tensor.numel() * tensor.itemsize
            previous = self._latest if index > 0 else _no_copy
            copy = HostCopy(tensor, previous, self._side_stream(tensor.device), self.rooms)
            if (latest := previous()) is not None:
                latest.release()
            self._latest = weakref.ref(copy)
            return copy

        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: pack(t) if t.numel() else t, lambda k: k.take() if isinstance(k, HostCopy) else k
        ):
            yield

    def _side_stream(self, device: torch.device) -> Any:
        if device.type == "cpu":
            return None
        if device not in self._streams:
            self._streams[device] = torch.Stream(device)
        return self._streams[device]


class HostCopy:
    """One tensor on the host. previous: gives that of the layer before, which backward wants next."""

    def __init__(
        self, tensor: torch.Tensor, previous: Callable[[], HostCopy | None], side_stream: Any, rooms: HostRooms
    ):
        self.previous, self.side_stream, self.device = previous, side_stream, tensor.device
        self.fetched: torch.Tensor | None = None
        self.rooms, self.room = rooms, rooms.take(tensor, pinned=side_stream is not None)
        same = self.room.shape == tensor.shape
        self.host_tensor = self.room if same else self.room.flatten()[: tensor.numel()].view(tensor.shape)
        self.source: torch.Tensor | None = tensor  # held until the copy is done
        self._copy(self.source, self.host_tensor)

    def release(self) -> None:
        """Let go of the tensor on the device; its memory is free once the compute stream is past the copy."""
        if self.source is not None:
            self._wait()
            self.source = None

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self.source is not None:  # it never left
            self.fetched, self.source = self.source, None
        if self.fetched is None:
            self.fetched = torch.empty_like(self.host_tensor, device=self.device)
            self._copy(self.host_tensor, self.fetched)

    def take(self) -> torch.Tensor:
        """The tensor, back on the device, for the recomputation of its layer; the one before is on its way then."""
        self.fetch()
        self._wait()
        assert self.fetched is not None
        tensor, self.fetched = self.fetched, None
        if (previous := self.previous()) is not None:
            previous.fetch()
        return tensor

    def __del__(self) -> None:
        if (
            self.fetched is not None
        ):  # fetched for nothing: its memory must not go to others before the copy has arrived
            self._wait()
        if hasattr(self, "room"):  # on the side stream, which fills it next, all copies from it come before
            self.rooms.give_back(self.room, pinned=self.side_stream is not None)

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if self.side_stream is None:
            target.copy_(source)
            return
        self.side_stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self.side_stream:
            target.copy_(source, non_blocking=True)
            self.copied_event = self.side_stream.record_event()

    def _wait(self) -> None:
        if self.side_stream is not None:
            torch.accelerator.current_stream(self.device).wait_event(self.copied_event)


def _no_copy() -> None:
    return None
