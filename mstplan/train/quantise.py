"""A model's linear layers with bitsandbytes' weights of 4 or 8 bits, in place of its own, as transformers quantises a model that it loads."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import MissingError
from ..step.recipe import Recipe
from ..step.storage import storages_of
from ..step.tape import Weight
from . import locate

OUTLIERS_FROM = 6.0
"""Columns of inputs with values from this on stay in 16 bits (transformers' llm_int8_threshold)."""
_DTYPES = {"uint8": torch.uint8, "bfloat16": torch.bfloat16, "float32": torch.float32}


def quantise(model: PreTrainedModel, recipe: Recipe) -> None:
    """Replace every linear layer but the output layer, in place. On the meta device the weights' tensors are made without their values.
    Raises MissingError without bitsandbytes."""
    try:
        import bitsandbytes
    except ImportError:
        raise MissingError("quantised weights need bitsandbytes: pip install bitsandbytes") from None
    head = set(locate.find_parts(model).head.modules())
    make = _eight_bits if recipe.quantize == "int8" else _four_bits
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in (nn.Linear, Conv1D) and child not in head:
                setattr(module, name, make(bitsandbytes, _as_linear(child), recipe))
    eight = recipe.quantize == "int8"
    for flag, value in (
        ("is_loaded_in_8bit", eight),
        ("is_loaded_in_4bit", not eight),
        ("is_quantized", True),
        ("quantization_method", "bitsandbytes"),
    ):
        setattr(model, flag, value)  # peft asks for these


def _as_linear(module: Any) -> nn.Linear:
    """A linear layer with a module's weight; GPT-2's has the transposed one."""
    if isinstance(module, nn.Linear):
        return module
    inner, outer = module.weight.shape
    linear = nn.Linear(inner, outer, module.bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(module.weight.data.t().contiguous()), module.bias
    return linear


def _four_bits(bitsandbytes: ModuleType, linear: nn.Linear, recipe: Recipe) -> nn.Module:
    kept = {
        "compress_statistics": recipe.double_quantize,
        "quant_type": recipe.quantize,
        "quant_storage": _DTYPES[recipe.packed_in],
    }
    module: Any = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16, device="meta", **kept
    )
    module.bias = linear.bias
    if linear.weight.is_meta:
        _make_tensors(module, linear, recipe)
        return module  # type: ignore[no-any-return]
    module.weight = bitsandbytes.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, module=module, **kept)
    return module.to(linear.weight.device)  # type: ignore[no-any-return]


def _make_tensors(module: Any, linear: nn.Linear, recipe: Recipe) -> None:
    """A weight's tensors as quantisation would leave them: scales and tables as buffers of the module."""
    shape = linear.weight.shape
    weight = Weight(
        "", tuple(shape), quantised=recipe.quantize, double_quantised=recipe.double_quantize, packed_in=recipe.packed_in
    )
    packed, *others = storages_of(weight, "bfloat16")
    dtype = _DTYPES[packed.dtype]
    values = torch.empty(packed.bytes // dtype.itemsize, 1, dtype=dtype, device="meta")
    module.weight = nn.Parameter(values, requires_grad=False)
    module.weight.compress_statistics, module.weight.quant_type = (
        recipe.double_quantize,
        recipe.quantize,
    )  # peft reads them
    for n, stored in enumerate(others):
        dtype = _DTYPES[stored.dtype]
        buffer = torch.empty(stored.bytes // dtype.itemsize, dtype=dtype, device="meta")
        module.register_buffer(f"quantisation_{n}", buffer, persistent=False)
    module.quant_state = SimpleNamespace(shape=shape, dtype=torch.bfloat16, nested=recipe.double_quantize)


def _eight_bits(bitsandbytes: ModuleType, linear: nn.Linear, _recipe: Recipe) -> nn.Module:
    module: Any = bitsandbytes.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        has_fp16_weights=False,
        threshold=OUTLIERS_FROM,
        device="meta",
    )
    module.bias = linear.bias
    if linear.weight.is_meta:
        module.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=torch.int8), requires_grad=False)
        scales = torch.empty(linear.out_features, dtype=torch.float32, device="meta")
        module.register_buffer("quantisation_0", scales, persistent=False)
        return module  # type: ignore[no-any-return]
    module.weight = bitsandbytes.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    return module.to(linear.weight.device)  # type: ignore[no-any-return]
