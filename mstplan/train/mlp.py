"""An MLP, a chunk of tokens at a time, in both passes.

The forward pass keeps the input only. Backward runs the MLP again for one chunk, takes that chunk's gradients, and goes
on: intermediates exist for one chunk at a time. Weights' gradients are summed over the chunks in fp32.

Inside a checkpointed layer the layer's own recomputation would run the MLP a third time, for an output that nobody reads
when only a residual addition follows. `output_is_read` finds that out from autograd's graph; then the recomputation hands
on an empty tensor instead, and two passes over the tokens remain, as many as plain checkpointing makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from ..plan.solve import chunk_tokens
from .leaves import standing_in, trained_weights

Forward = Callable[[torch.Tensor], Any]


def chunked_mlp(
    mlp: nn.Module, forward: Forward, x: torch.Tensor, chunks: int, *, random: bool = False, skip: bool = False
) -> torch.Tensor:
    """`forward`, which is `mlp`'s, over x (b, s, d) in `chunks` pieces of the sequence. random: it draws random numbers (dropout);
    skip: nobody reads the output, so leave it empty."""
    tokens = x.flatten(0, -2)
    rows = chunk_tokens(x.shape[-2], chunks) * (tokens.shape[0] // x.shape[-2])
    out: torch.Tensor = _ChunkedMlp.apply(tokens, mlp, forward, rows, random, skip, *trained_weights(mlp))
    return out.view(x.shape)


def in_backward() -> bool:
    """Is this code running inside a backward pass, that is, as a checkpoint's recomputation?"""
    return torch._C._current_graph_task_id() != -1


def output_is_read(output: torch.Tensor) -> bool:
    """Does anything between the chunked MLP and `output` need the MLP's values for its backward? Additions and changes
    of shape do not; whatever else stands between is taken to need them."""
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().startswith("_ChunkedMlp"):
            return False
        if node.name() in _VALUE_FREE:
            pending += [following for following, _ in node.next_functions]
    return True


_VALUE_FREE = {"AddBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "SqueezeBackward1"}


class _ChunkedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mlp: nn.Module, forward: Forward, rows: int, random: bool, skip: bool, *_weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.mlp, ctx.run, ctx.rows, ctx.random = mlp, forward, rows, random
        ctx.save_for_backward(x)
        ctx.autocast = _autocast_state(x.device.type)
        ctx.seeds = [_random_state(x)] * -(-x.shape[0] // rows) if random and skip else []
        if skip:
            return torch.empty_like(x)
        out: torch.Tensor | None = None
        for start in range(0, x.shape[0], rows):
            if random:
                ctx.seeds.append(_random_state(x))
            piece = forward(x[start : start + rows].unsqueeze(0)).squeeze(0)
            if out is None:
                out = piece.new_empty(x.shape[0], piece.shape[-1])
            out[start : start + rows] = piece
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        weights = trained_weights(ctx.mlp)
        d_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        several = x.shape[0] > ctx.rows
        sums: list[torch.Tensor | None] = [None] * len(weights)
        for n, start in enumerate(range(0, x.shape[0], ctx.rows)):
            rows = slice(start, start + ctx.rows)
            piece = x[rows].detach().requires_grad_(d_x is not None)
            with standing_in(ctx.mlp, weights) as leaves:
                out = _again(ctx, n, piece)
            inputs = [piece, *leaves] if d_x is not None else leaves
            found = list(torch.autograd.grad(out, inputs, incoming[rows], allow_unused=True))
            del out
            if d_x is not None:
                d_x[rows] = found.pop(0)
            _add(sums, found, weights, several)
            del found, piece  # before the next chunk's intermediates are made
        d_weights = [s.to(w.dtype) if s is not None else None for s, w in zip(sums, weights, strict=True)]
        return (d_x, None, None, None, None, None, *d_weights)


def _add(sums: list[torch.Tensor | None], found: list[Any], weights: list[torch.Tensor], several: bool) -> None:
    """Add a chunk's gradients of the weights to their sums, in place; one chunk alone needs no sum in fp32."""
    for i, (gradient, weight) in enumerate(zip(found, weights, strict=True)):
        if gradient is None:
            continue
        running = sums[i]
        if running is None:
            wide = torch.promote_types(weight.dtype, torch.float32)
            sums[i] = gradient.to(wide) if several else gradient
        else:
            running += gradient


def _again(ctx: Any, n: int, piece: torch.Tensor) -> torch.Tensor:
    """One chunk's forward once more, with the random numbers and the autocast of the first time."""
    devices = [piece.device.index] if piece.device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, enabled=ctx.random, device_type=piece.device.type if devices else "cuda"):
        if ctx.random:
            _set_random_state(ctx.seeds[n])
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            out: torch.Tensor = ctx.run(piece.unsqueeze(0)).squeeze(0)
    return out


def _autocast_state(device: str) -> dict[str, Any]:
    return {"device_type": device, "enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}


def _random_state(x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    return torch.get_rng_state(), get_device_states(x)


def _set_random_state(state: tuple[torch.Tensor, Any]) -> None:
    cpu, (devices, states) = state
    torch.set_rng_state(cpu)
    if devices:
        set_device_states(devices, states)
