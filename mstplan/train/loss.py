"""LM head and cross entropy, a chunk of tokens at a time, under the model's own loss function.

In training with labels the LM head hands out `LazyLogits`. The model's loss function shifts and flattens them as ever;
when it comes to cross entropy, logits, loss and gradients are made chunk by chunk. The gradients of hidden states and head
are made in the forward pass already, as soon as a chunk's logits exist: three matrix products in all, as many as plain
training takes, and never more than one chunk's logits. The head's gradient is summed over the chunks in fp32 (`grad_sums.py`).

Memory, in bytes, for n = b * s tokens, chunks of k, hidden size d and vocabulary V in bf16: 2 n d for the hidden states'
gradient, 4 V d for the head's sum, and about 12 k V while a chunk is worked on (see mstplan/step/steps.py, `_loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ModelError
from .grad_sums import Sums, add_gradients, as_gradients, can_sum_products, summing_products
from .lazy import LazyTensor, Run
from .runtime import Runtime, saving_here
from .weight_stand_ins import current_autocast, swap_weights, trained_weights
from .zero import gather, gathered


class LazyLogits(LazyTensor):
    """Logits of a whole batch, never made whole. divisor: what the loss function will divide the summed loss by."""

    divisor: torch.Tensor | int | None = None

    def extended(self, run: Run, *modules: nn.Module, random: bool = False) -> LazyTensor:
        logits = super().extended(run, *modules, random=random)
        logits.divisor = self.divisor  # type: ignore[attr-defined]
        return logits

    def with_source(self, source: torch.Tensor) -> LazyLogits:
        """The same function of other tokens."""
        logits = LazyLogits(source, self.run, self.modules, self.rows, self.runtime)
        logits.divisor = self.divisor
        return logits

    def call_function(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func is F.cross_entropy:
            return self.cross_entropy(*args[1:], **kwargs) if args and args[0] is self else self.refuse("cross_entropy")
        return super().call_function(func, args, kwargs)

    def cross_entropy(
        self,
        target: torch.Tensor,
        weight: Any = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """`torch.nn.functional.cross_entropy` of logits (n, V) and targets (n,); a scalar in the logits' dtype."""
        if label_smoothing:
            self.refuse(f"label smoothing ({label_smoothing:g})")
        if weight is not None or reduction not in ("mean", "sum") or target.shape != self.source.shape[:-1]:
            self.refuse(
                f"cross_entropy with reduction={reduction!r}, weight={weight is not None} and targets {tuple(target.shape)}"
            )
        target = target.flatten()
        hidden = self.source.flatten(0, -2)
        count = (target != ignore_index).sum() if reduction == "mean" else 1 if self.divisor is None else self.divisor
        early_divisor = _mantissa(count) if _computes_in_fp16(hidden) else count
        for module in self.modules:
            unshard: Any = getattr(
                module, "unshard", None
            )  # FSDP 2 of the head by itself, which thinks that the head has run
            if unshard is not None:
                unshard()
        with gathered(self.modules):
            loss = _ChunkedLoss.apply(
                hidden,
                *(self.run, self.modules, target, early_divisor, self.rows, self.runtime, ignore_index),
                *trained_weights(*self.modules),
            )
        return loss / (count / early_divisor) if reduction == "mean" else loss * early_divisor

    def view(self, *shape: Any) -> LazyLogits:
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape
        if len(sizes) != 2 or sizes[0] not in (-1, self.source.shape[:-1].numel()):
            self.refuse(f"view{tuple(sizes)}")
        return self.with_source(self.source.flatten(0, -2))

    reshape = view

    def flatten(self, start: int = 0, end: int = -1) -> LazyLogits:
        if start != 0 or end not in (-2, self.source.dim() - 2):
            self.refuse(f"flatten({start}, {end})")
        return self.with_source(self.source.flatten(0, -2))

    def __getitem__(self, index: Any) -> LazyLogits:
        """Some of the tokens, or part of the vocabulary of all."""
        indices = index if isinstance(index, tuple) else (index,)
        if (
            indices
            and indices[-1] == slice(None)
            and (len(indices) == self.source.dim() or Ellipsis in indices)
            and _keeps_shape(indices)
        ):
            return self.with_source(self.source[index])
        if Ellipsis not in indices and len(indices) < self.source.dim() and _keeps_shape(indices):
            return self.with_source(self.source[index])
        if _keeps_shape(indices) and indices[:-1] in (
            (...,),
            (slice(None),) * (self.source.dim() - 1),
        ):  # part of the vocabulary
            return self.record_step(lambda value: value[..., indices[-1]])  # type: ignore[no-any-return]
        return self.refuse("part of them")

    @property
    def shape(self) -> torch.Size:
        width = getattr(self.modules[0], "out_features", None)
        return torch.Size((*self.source.shape[:-1], width)) if width is not None else self.refuse("shape")

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def use_unrecorded(self, what: str, use: Callable[[Any], Any]) -> Any:
        self.refuse(what)

    def refuse(self, what: str) -> NoReturn:
        raise ModelError(
            f"cannot run the loss in chunks: the model's code uses {what} on its logits.\nSet loss_chunks=1."
        )


def _mantissa(count: torch.Tensor | int) -> torch.Tensor:
    """count / 2^n, between 1 and 2. fp16 divides by this early and by 2^n late, which is exact: a loss scale must not come after
    underflow."""
    whole = torch.as_tensor(count, dtype=torch.float32)
    return whole / whole.log2().floor().exp2()


def _computes_in_fp16(hidden: torch.Tensor) -> bool:
    autocast = current_autocast(hidden.device.type)
    return torch.float16 in (hidden.dtype, autocast["dtype"] if autocast["enabled"] else None)


def _keeps_shape(indices: Sequence[Any]) -> bool:
    return all(isinstance(index, slice) or index is Ellipsis for index in indices)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        run: Run,
        modules: tuple[nn.Module, ...],
        targets: torch.Tensor,
        divisor: Any,
        rows: int,
        runtime: Runtime,
        ignore: int,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        wants_hidden, wants_any = ctx.needs_input_grad[0], any(ctx.needs_input_grad)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        sums: Sums = [None] * len(weights)
        sums_products = wants_any and can_sum_products(hidden, runtime)
        total, autocast = None, current_autocast(hidden.device.type)
        for _, place in runtime.chunk_slices(hidden.shape[0], rows):
            chunk = hidden[place].detach().requires_grad_(wants_hidden)
            with (
                torch.set_grad_enabled(wants_any),
                torch.autocast(**autocast),
                saving_here(),
                swap_weights(modules, list(weights)) as leaves,
            ):
                with summing_products(sums_products, leaves, sums, runtime):
                    logits = run(chunk.unsqueeze(0)).squeeze(0)
                chunk_targets = targets[place].to(logits.device)
                loss = F.cross_entropy(logits, chunk_targets, ignore_index=ignore, reduction="sum") / divisor
                del logits
            total = loss.detach() if total is None else total + loss.detach()
            if wants_any:
                inputs = [chunk, *leaves] if wants_hidden else leaves
                gradients = list(torch.autograd.grad(loss, inputs, allow_unused=True))
                if d_hidden is not None:
                    d_hidden[place] = gradients.pop(0)
                add_gradients(sums, gradients, several=True)
                del gradients  # before the next chunk's logits are made
            del loss, chunk
        ctx.d_hidden, ctx.modules, ctx.dtypes = d_hidden, modules, [w.dtype for w in weights]
        ctx.d_weights = sums if _computes_in_fp16(hidden) else as_gradients(sums, weights)
        assert total is not None
        return total

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if ctx.d_weights is None:
            raise RuntimeError(
                "the chunked loss can be backpropagated once: its gradients are made in the forward pass"
            )
        d_hidden, d_weights = ctx.d_hidden, ctx.d_weights
        ctx.d_hidden = ctx.d_weights = None
        gather(ctx.modules)
        scaled = [
            g.mul_(incoming).to(dtype) if g is not None else None
            for g, dtype in zip(d_weights, ctx.dtypes, strict=True)
        ]
        return (d_hidden.mul_(incoming) if d_hidden is not None else None, *[None] * 7, *scaled)
