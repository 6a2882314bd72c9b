"""LM head and cross entropy, a chunk of tokens at a time.

The gradients of hidden states and head are made in the forward pass already, chunk by chunk, as soon as a chunk's logits
exist: three matrix products in all, as many as plain training takes, and never more than one chunk's logits. Weights'
gradients are summed over the chunks in fp32, so that their rounding does not grow with the number of chunks.

Memory, in bytes, for n = b * s tokens, chunks of k, hidden size d and vocabulary V in bf16: 2 n d for the hidden states'
gradient, 4 V d for the head's sum, and about 12 k V while a chunk is worked on (see mstplan/plan/steps.py, `_loss`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..plan.solve import chunk_tokens
from .leaves import standing_in, trained_weights
from .logits import LazyLogits


def chunked_loss(
    logits: LazyLogits, labels: torch.Tensor, chunks: int, *, num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100, shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Mean cross entropy of the next token, as transformers' ForCausalLMLoss: labels (b, s), -100 ignored; a sum over
    `num_items_in_batch` where that is given (gradient accumulation). Returns a scalar in fp32 (fp64 for fp64 logits)."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden = logits.hidden.flatten(0, -2)
    targets = shift_labels.flatten().to(hidden.device)
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    rows = chunk_tokens(logits.hidden.shape[-2], chunks) * (hidden.shape[0] // logits.hidden.shape[-2])
    return _ChunkedLoss.apply(hidden, logits, targets, count, rows, ignore_index, *trained_weights(logits.head))


def _add(sums: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    for running, gradient in zip(sums, found, strict=True):
        running.add_(gradient)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, logits: LazyLogits, targets: torch.Tensor, count: Any, rows: int, ignore: int,
                *weights: torch.Tensor) -> torch.Tensor:  # fmt: skip
        wants_hidden, wants_any = ctx.needs_input_grad[0], any(ctx.needs_input_grad)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights] if wants_any else []
        total = None
        for start in range(0, hidden.shape[0], rows):
            chunk = hidden[start : start + rows].detach().requires_grad_(wants_hidden)
            with torch.set_grad_enabled(wants_any), standing_in(logits.head, list(weights)) as leaves:
                out = logits.of(chunk)
                out = out.to(torch.promote_types(out.dtype, torch.float32))
                loss = F.cross_entropy(out, targets[start : start + rows], ignore_index=ignore, reduction="sum") / count
                del out
            total = loss.detach() if total is None else total + loss.detach()
            if wants_any:
                inputs = [chunk, *leaves] if wants_hidden else leaves
                found = list(torch.autograd.grad(loss, inputs))
                if d_hidden is not None:
                    d_hidden[start : start + rows] = found.pop(0)
                _add(sums, found)
                del found  # before the next chunk's logits are made
            del loss, chunk
        ctx.d_hidden = d_hidden
        ctx.d_weights = [s.to(w.dtype) for s, w in zip(sums, weights, strict=False)]
        assert total is not None
        return total

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if ctx.d_weights is None:
            raise RuntimeError("the chunked loss can be backpropagated once: its gradients are made in the forward pass")
        d_hidden, d_weights = ctx.d_hidden, ctx.d_weights
        ctx.d_hidden = ctx.d_weights = None
        scaled = [gradient.mul_(incoming) for gradient in d_weights]
        return (d_hidden.mul_(incoming) if d_hidden is not None else None, None, None, None, None, None, *scaled)
