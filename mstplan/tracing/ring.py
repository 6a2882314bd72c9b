"""torch's ring attention on fake tensors (`mstplan/train/ring.py`): its kernels as a GPU's allocate, and its collectives.

What is sent is held until what comes in its place is waited for: so NCCL's work holds it (torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp,
collective: stashed_for_allocator_safety_), and gloo's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ModelError
from ..spec.platform import Platform
from ..step.kernels import SDPA, chosen
from ..step.kernels.base import AttentionCall
from ..train.ring import RingKernel, torch_ring
from .kernels import STAND_INS
from .kernels.base import StandIn
from .patches import RING_GATHER, RING_SEND, RING_WAIT, patched
from .recorder import Recorder


def ring_stand_in(recorder: Recorder, platform: Platform) -> RingKernel:
    """The kernel that scaled_dot_product_attention chooses there."""

    def stand_in(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> StandIn:
        grouped = k.shape[1] != q.shape[1]
        asked = AttentionCall(str(q.dtype)[6:], q.shape[-1], v.shape[-1], grouped, False, platform=platform)
        kernel = chosen(SDPA, asked)
        if not kernel.in_rings:
            raise ModelError(
                f"sdpa runs {kernel.label} here ({asked.words}), whose ring is not planned.\nLeave --context-parallel out."
            )
        return STAND_INS[kernel.name]

    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None
    ) -> tuple[torch.Tensor, ...]:
        return stand_in(query, key, value).run(query, key, value, recorder)

    def backward(
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        logsumexp: torch.Tensor,
        is_causal: bool,
        scale: float | None,
    ) -> tuple[torch.Tensor, ...]:
        return stand_in(query, key, value).run_back(grad_out, query, key, value, out, recorder)

    return RingKernel(forward, backward, recorder.kernel_results)


class _InFlight:
    """What a collective makes, and what it sends until then."""

    def __init__(self, sent: torch.Tensor, received: torch.Tensor):
        self.sent: torch.Tensor | None = sent
        self.received = received

    def wait(self) -> torch.Tensor:
        self.sent = None
        return self.received


def _gather(sent: torch.Tensor, gather_dim: int, group: dist.ProcessGroup) -> _InFlight:
    return _InFlight(sent, sent.new_empty(sent.shape[0] * group.size(), *sent.shape[1:]))


def _send(sent: torch.Tensor, _places: list[int], _group: dist.ProcessGroup) -> _InFlight:
    return _InFlight(sent, torch.empty_like(sent))


def _wait(result: Any) -> torch.Tensor:
    waited: torch.Tensor = result.wait() if isinstance(result, _InFlight) else result
    return waited


@contextmanager
def ring_without_ranks() -> Iterator[None]:
    """Within the context torch's ring makes what it makes among all ranks, though the others are not there. Raises VersionError where torch's is
    another."""
    torch_ring()
    with patched({RING_GATHER: lambda _: _gather, RING_SEND: lambda _: _send, RING_WAIT: lambda _: _wait}):
        yield
