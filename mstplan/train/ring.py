"""Attention of sequences whose tokens several ranks share in a ring: context parallelism, as torch has it and accelerate runs it.

Each rank has a piece of the sequence's head and the one that mirrors it of its tail. Blocks of keys and values come round, and what
attention makes of each is merged in fp32. The ring is torch's own (torch/distributed/tensor/experimental/_context_parallel/_attention.py, torch
2.13). On a GPU torch's dispatcher takes scaled_dot_product_attention to it; it knows no kernel of a CPU, for which `_Ring` calls
the same templates with the kernel that `Runtime.ring_kernel` gives. `mstplan/step/ring.py` says which tensors that makes. Ranks next to each other
share sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from ..errors import ModelError, VersionError


class RingKernel(NamedTuple):
    """A kernel as torch's templates call it. forward: of query, key, value and is_causal, its output, log-sum-exp, and more that backward
    takes. backward: of grad_out, query, key, value, out, logsumexp, is_causal and `more`, three gradients. run_whole: runs a whole ring's forward,
    which a selective checkpoint keeps as what one kernel makes: so torch's dispatcher, which it asks first, has it."""

    forward: Callable[..., tuple[torch.Tensor, ...]]
    backward: Callable[..., tuple[torch.Tensor, ...]]
    run_whole: Callable[[Callable[[], tuple[torch.Tensor, ...]]], tuple[torch.Tensor, ...]]


def torch_ring() -> Any:
    """torch's module of it. Raises VersionError where it is another."""
    try:
        from torch.distributed.tensor.experimental._context_parallel import _attention
    except ImportError:
        raise VersionError(
            f"torch {torch.__version__} has no ring attention as torch 2.13 has it.\nInstall torch 2.13, or use the formula rung."
        ) from None
    return _attention


@contextmanager
def ring_attention(
    group: dist.ProcessGroup, device: torch.device, rotate_method: str, kernel: RingKernel | None
) -> Iterator[None]:
    """Within the context, which forward and backward need, scaled_dot_product_attention is that of whole sequences, of which each rank of `group`
    has its part. kernel: None lets torch's dispatcher choose. Raises ModelError within it for attention that needs a mask."""
    ring = torch_ring()
    before, plain = ring._cp_options.rotate_method, F.scaled_dot_product_attention
    ring.set_rotate_method(rotate_method)
    if kernel is None:
        ring._enable_context_parallel_dispatcher_impl(2, DeviceMesh.from_group(group, device.type))
    else:
        F.scaled_dot_product_attention = _by_templates(group, kernel)  # type: ignore[assignment]
    try:
        yield
    finally:
        if kernel is None:
            ring._disable_context_parallel_dispatcher_impl()
        F.scaled_dot_product_attention = plain
        ring._cp_options.rotate_method = before


def _by_templates(group: dist.ProcessGroup, kernel: RingKernel) -> Callable[..., torch.Tensor]:
    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if attn_mask is not None or not is_causal:
            raise ModelError(
                "attention needs an explicit mask, and a ring knows whole causal attention only.\nLeave context_parallel out."
            )
        if dropout_p:
            raise ModelError("attention has dropout, which is not run in a ring here.\nLeave context_parallel out.")
        kind = query.device.type
        if torch.is_autocast_enabled(kind):
            query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
        out: torch.Tensor = _Ring.apply(query, key, value, scale, group, kernel)
        return out

    return attention


class _Ring(torch.autograd.Function):
    """query (b, H, s, e), key and value (b, G, s, e) of this rank -> (b, H, s, e)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        group: dist.ProcessGroup,
        kernel: RingKernel,
    ) -> torch.Tensor:
        def run() -> tuple[torch.Tensor, ...]:
            made = torch_ring()._templated_ring_attention(
                group, 2, kernel.forward, query, key, value, is_causal=True, scale=scale
            )
            return made[0], made[1]

        out, log_sum_exp = kernel.run_whole(run)
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        ctx.scale, ctx.group, ctx.kernel = scale, group, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, out, log_sum_exp = ctx.saved_tensors
        gradients = torch_ring()._templated_ring_attention_backward(
            ctx.group,
            2,
            ctx.kernel.backward,
            grads[0],
            "grad_out",
            query,
            key,
            value,
            out,
            log_sum_exp,
            True,
            scale=ctx.scale,
        )
        return (*gradients[:3], None, None, None)


def _run_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None
) -> tuple[torch.Tensor, ...]:
    made: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, scale=scale
    )
    return made


def _run_back_on_cpu(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    is_causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, ...]:
    gradients: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, logsumexp, 0.0, is_causal, scale=scale
    )
    return gradients


def on_cpu(run_whole: Callable[..., tuple[torch.Tensor, ...]]) -> RingKernel:
    """The CPU's flash kernel."""
    return RingKernel(_run_on_cpu, _run_back_on_cpu, run_whole)


def with_room_for_all(part: torch.Tensor, ranks: int) -> torch.Tensor:
    """A copy of a rank's part of (rows, S) tokens with the memory of all, as torch's context_parallel leaves its buffers."""
    rows, tokens = part.shape
    return part.new_empty(rows, tokens * ranks).resize_(part.shape).copy_(part)
