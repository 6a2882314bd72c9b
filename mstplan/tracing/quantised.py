"""bitsandbytes' products with quantised weights, on fake tensors: what they allocate on a GPU, in order.

from source: bitsandbytes autograd/_functions.py, MatMul4Bit and MatMul8bitLt; backends/cuda/ops.py, _dequant_linear_fallback (training's numbers
of rows), int8_vectorwise_quant. measured: the event files qlora-8bL4* and int8-8bL4 of two GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..step.storage import BLOCK
from .patches import DEQUANTISE, FIND_STATE, MULTIPLY_4_BITS, MULTIPLY_8_BITS, MakeReplacement, Target, patched


def _scales(state: Any, tables: int) -> list[torch.Tensor]:
    """Scales of a weight in fp32, where they are quantised themselves: in so many steps."""
    blocks = -(-state.shape.numel() // BLOCK)
    return [torch.empty(blocks, dtype=torch.float32) for _ in range(tables if state.nested else 0)]


def _dequantise(state: Any, device: torch.device) -> torch.Tensor:
    scales = _scales(state, 1)
    whole = torch.empty(state.shape, dtype=state.dtype, device=device)
    del scales
    return whole


def _dequantise_module(module: Any) -> torch.Tensor:
    state = getattr(module, "quant_state", None)
    if state is not None:
        return _dequantise(state, module.weight.device)
    weight: torch.Tensor = module.weight
    return weight if weight.is_floating_point() else weight.to(torch.bfloat16)


def _find_state(module: Any) -> None:
    module.weight.quant_state = module.quant_state


class _FourBits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, state: Any) -> torch.Tensor:
        ctx.state = state
        scales = _scales(state, 2)
        whole = torch.empty(state.shape, dtype=x.dtype)
        out = torch.nn.functional.linear(x, whole, bias)
        del scales
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.matmul(grads[0], _dequantise(ctx.state, grads[0].device).to(grads[0].dtype)), None, None


class _EightBits(torch.autograd.Function):
    """Without columns of outliers, which depend on values. Its context holds the input itself, whatever checkpointing says."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.input, ctx.weight = x, weight
        half = x.to(torch.float16)
        scales = torch.empty(x.shape[:-1], dtype=torch.float32)
        rows = torch.empty(x.shape, dtype=torch.int8)
        absolute = torch.empty_like(half)
        outliers = torch.empty(x.shape, dtype=torch.bool)
        del absolute, outliers, half
        counted = torch.empty(*x.shape[:-1], weight.shape[0], dtype=torch.int32)
        scaled = torch.empty_like(counted, dtype=torch.float16)
        out = scaled.to(x.dtype)
        del scaled, counted, rows, scales
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        whole = torch.empty_like(ctx.weight, dtype=grads[0].dtype)
        return torch.matmul(grads[0], whole), None, None


def _multiply_4_bits(
    x: torch.Tensor, weight: torch.Tensor, quant_state: Any = None, out: None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    product: torch.Tensor = _FourBits.apply(x, bias, quant_state)
    return product


def _multiply_8_bits(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = _EightBits.apply(x, module.weight, module.bias)
    return product


@contextmanager
def on_fake_weights(quantised: bool) -> Iterator[None]:
    """Within the context modules of bitsandbytes run on tensors without values. quantised: whether there are any."""
    if not quantised:
        yield
        return
    replacements: dict[Target, MakeReplacement] = {
        MULTIPLY_4_BITS: _replace(_multiply_4_bits),
        MULTIPLY_8_BITS: _replace(_multiply_8_bits),
        FIND_STATE: _replace(_find_state),
        DEQUANTISE: _replace(_dequantise_module),
    }
    with patched(replacements):
        yield


def _replace(function: Callable[..., Any]) -> MakeReplacement:
    return lambda _plain: function
