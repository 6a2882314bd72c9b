"""Where a model's layers, MLPs and LM head are, asked of transformers' own interfaces.

The head is `get_output_embeddings()`. Decoder layers are transformers' checkpointable layers (GradientCheckpointingLayer).
The MLP of a layer is the child that maps hidden states alone to hidden states and owns matrices: its forward takes one
required argument, where attention takes masks and positions, and a norm owns vectors only.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import ModelError


class Parts(NamedTuple):
    layers: list[nn.Module]
    mlps: list[nn.Module]  # one a layer
    head: nn.Module


def find_parts(model: nn.Module) -> Parts:
    """Layers, MLPs and head of a causal language model. Raises ModelError naming what was not found."""
    name = type(model).__name__
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is None:
        raise ModelError(f"{name} has no LM head (get_output_embeddings() gave none).\nminisequence serves causal language models.")
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"{name} has no checkpointable decoder layers (transformers' GradientCheckpointingLayer).")
    return Parts(layers, [_mlp(name, layer) for layer in layers], head)


def _mlp(name: str, layer: nn.Module) -> nn.Module:
    found = [child for child in layer.children() if _is_mlp(child)]
    if len(found) != 1:
        kinds = ", ".join(type(child).__name__ for child in layer.children())
        what = "no MLP" if not found else f"{len(found)} modules that could be the MLP"
        raise ModelError(f"{name}: {what} found in {type(layer).__name__}, whose parts are {kinds}.\nSet mlp_chunks=1.")
    return found[0]


def _is_mlp(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, nn.Embedding)) or all(p.dim() < 2 for p in module.parameters()):
        return False
    signature = inspect.signature(module.forward)
    required = [p for p in signature.parameters.values() if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_more = any(p.name in ("attention_mask", "position_embeddings", "past_key_values") for p in signature.parameters.values())
    return len(required) == 1 and not takes_more
