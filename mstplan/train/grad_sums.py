"""Gradients of matrices, summed over chunks in fp32 as they are made: no chunk's gradient exists, nor is it rounded.

A chunk's share of a matrix's gradient is a product of two tensors of its tokens. Autograd would make it in the matrix's
dtype, one rounding a chunk, to be added afterwards. Here the product is added to the sum by the matrix product itself, in
the fp32 that it computes in. The sum is rounded once, as the plain model's gradient is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .runtime import Runtime

Sums = list[torch.Tensor | None]


class SummedProducts(TorchFunctionMode):
    """Within the context, products with the stand-ins `leaves` add their weights' gradients to `sums` when backward comes to
    them, and hand none on. Other uses of the leaves are left to autograd."""

    def __init__(self, leaves: Sequence[torch.Tensor], sums: Sums, runtime: Runtime):
        super().__init__()
        self.places = {id(leaf): n for n, leaf in enumerate(leaves)}
        self.sums, self.runtime = sums, runtime

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and id(args[1]) in self.places and args[0].dtype == args[1].dtype:
            x, weight, bias = args if len(args) == 3 else (*args, None)
            return self._product(x, weight, bias, turned=False)
        if func is torch.addmm and not kwargs and id(args[2]) in self.places and id(args[0]) in self.places:  # Conv1D
            bias, x, weight = args
            return self._product(x, weight, bias, turned=True)
        return func(*args, **(kwargs or {}))

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, turned: bool) -> Any:
        places = self.places[id(weight)], self.places.get(id(bias))
        return _Product.apply(x, weight, bias, self.sums, *places, turned, self.runtime)


def summing_products(
    on: bool, leaves: Sequence[torch.Tensor], sums: Sums, runtime: Runtime
) -> AbstractContextManager[Any]:
    return SummedProducts(leaves, sums, runtime) if on else nullcontext()


def add_gradients(sums: Sums, gradients: Sequence[torch.Tensor | None], several: bool) -> None:
    """Add what autograd made of a chunk's gradients, in place; one chunk alone needs no sum in fp32."""
    for n, gradient in enumerate(gradients):
        if gradient is not None:
            total = sums[n]
            wide = (
                gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                if several and total is None
                else gradient
            )
            sums[n] = wide if total is None else total.add_(gradient)


def as_gradients(sums: Sums, weights: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """The sums in their weights' dtypes; each goes as its gradient comes."""
    gradients: list[torch.Tensor | None] = []
    for n, weight in enumerate(weights):
        total, sums[n] = sums[n], None
        gradients.append(total.to(weight.dtype) if total is not None else None)
        del total
    return gradients


def can_sum_products(x: torch.Tensor, runtime: Runtime) -> bool:
    """Is there a product that adds to fp32, for what is on x's device? Under autocast the casts stand between."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return False
    return (
        x.dtype in (torch.float32, torch.float64)
        or not runtime.adds_to_fp32(kind)
        or "dtype_out" in torch.ops.aten.addmm.overloads()
    )


class _Product(torch.autograd.Function):
    """x W^T + bias as torch.nn.functional.linear, or x W + bias as torch.addmm (turned)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sums: Sums,
        place: int,
        bias_place: int | None,
        turned: bool,
        runtime: Runtime,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sums, ctx.place, ctx.bias_place, ctx.turned = sums, place, bias_place, turned
        ctx.runtime = runtime
        return torch.addmm(bias, x, weight) if turned else F.linear(x, weight, bias)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        d_x = incoming @ (weight.t() if ctx.turned else weight) if ctx.needs_input_grad[0] else None
        rows, out = x.flatten(0, -2), incoming.flatten(0, -2)
        a, b = (rows, out) if ctx.turned else (out, rows)
        ctx.sums[ctx.place] = ctx.runtime.add_product(ctx.sums[ctx.place], a.t(), b)
        if ctx.bias_place is not None:
            wide = torch.promote_types(out.dtype, torch.float32)
            total, share = ctx.sums[ctx.bias_place], out.sum(0, dtype=wide)
            ctx.sums[ctx.bias_place] = share if total is None else total.add_(share)
        return (d_x, *[None] * 7)
