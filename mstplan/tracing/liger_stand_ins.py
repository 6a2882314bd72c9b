"""What stands in for Liger's norms, rotary embedding and MLP: they allocate what those do, and compute nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..spec.families import family_of
from ..step.liger import Served, kernels_for
from ..step.workspaces import MULTIPROCESSORS
from .patches import Target, patched

ROTARY = "apply_rotary_pos_emb"
"""What the code of families calls it."""


class _Norm(torch.autograd.Function):
    """from source: liger_kernel 0.8.5, ops/rms_norm.py."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, in_place: bool) -> torch.Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        ctx.save_for_backward(x.contiguous(), weight, x.new_empty(x.shape[:-1].numel(), dtype=torch.float32))
        ctx.in_place = in_place
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, weight, _ = ctx.saved_tensors
        gradient = grads[0].contiguous()
        d_weight = None
        if ctx.needs_input_grad[1]:
            parts = x.new_empty(MULTIPROCESSORS, weight.shape[0], dtype=torch.float32)
        d_x = gradient if ctx.in_place else torch.empty_like(gradient)
        if ctx.needs_input_grad[1]:
            d_weight = parts.sum(0).to(weight.dtype)
        return d_x, d_weight, None


class _Rotary(torch.autograd.Function):
    """from source: ops/rope.py."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*tables)
        return _tokens_first(q), _tokens_first(k)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        ctx.saved_tensors  # noqa: B018 - as a checkpoint notices
        return (*map(_tokens_first, grads), None, None)


class _Gate(torch.autograd.Function):
    """from source: ops/swiglu.py, ops/geglu.py."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        _gradient = grads[0].contiguous()
        gate, up = ctx.saved_tensors
        return gate, up


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    """x (b, H, s, e), laid out by tokens: itself, or a copy."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any, **__: Any) -> Any:
    return _Rotary.apply(q, k, cos, sin)


def _normed(in_place: bool) -> Any:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Norm.apply(x, self.weight, in_place)
        return out

    return forward


def _gated(self: Any, x: torch.Tensor) -> Any:
    if hasattr(self, "gate_up_proj"):
        return self.down_proj(_Gate.apply(*self.gate_up_proj(x).chunk(2, dim=-1)))
    return self.down_proj(_Gate.apply(self.gate_proj(x), self.up_proj(x)))


def _replace_modules(model: nn.Module, served: Served, model_type: str) -> None:
    names = family_of(model_type).weight_names
    norms = {names.get(norm, norm).rsplit(".", 1)[-1]: norm not in served.copying for norm in served.norms}
    for path, module in model.named_modules():
        if (name := path.rsplit(".", 1)[-1]) in norms and hasattr(module, "weight"):
            module.forward = MethodType(_normed(norms[name]), module)
        elif hasattr(module, "down_proj") and (hasattr(module, "gate_proj") or hasattr(module, "gate_up_proj")):
            module.forward = MethodType(_gated, module)


@contextmanager
def liger_kernels(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the model runs on the stand-ins. Raises RecipeError for a family that Liger does not serve."""
    served = kernels_for(model.config.model_type)
    _replace_modules(model, served, model.config.model_type)
    code = next(
        each.__module__ for each in type(model).__mro__ if not each.__module__.startswith("torch.")
    )  # fully_shard's
    rotary = Target(code, ROTARY, "transformers 5.23.0", "Liger's turns queries and keys in place")
    with patched({rotary: lambda _plain: _rotate} if served.rotary else {}):
        yield
