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

from .runtime import Runtime


class HostCopies:
    """The layer inputs of a model that are, or were, on the host. They live as long as the graph that needs them."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._latest: Callable[[], HostCopy | None] = _no_copy
        self._streams: dict[torch.device, Any] = {}

    def __deepcopy__(self, _memo: Any) -> HostCopies:
        return HostCopies(self.runtime)  # of another model

    @contextmanager
    def keep_on_host(self, index: int) -> Iterator[None]:
        """Within the context, what autograd saves is kept on the host; index: of the layer, 0 begins a forward pass."""

        def pack(tensor: torch.Tensor) -> HostCopy:
            previous = self._latest if index > 0 else _no_copy
            copy = HostCopy(tensor, previous, self._side_stream(tensor.device), self.runtime)
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
        self, tensor: torch.Tensor, previous: Callable[[], HostCopy | None], side_stream: Any, runtime: Runtime
    ):
        self.previous, self.side_stream, self.device = previous, side_stream, tensor.device
        self.fetched: torch.Tensor | None = None
        self.host_tensor = runtime.empty_on_host(tensor, pinned=side_stream is not None)
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
