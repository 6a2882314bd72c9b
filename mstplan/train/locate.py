"""Where a model's layers, MLPs and LM head are, asked of transformers' own interfaces.

The head is `get_output_embeddings()`. Decoder layers are transformers' checkpointable layers (GradientCheckpointingLayer)
in `get_decoder()`; models that cannot be checkpointed keep theirs in a plain list. What mixes tokens (attention, state
spaces) takes masks, positions, caches or states beside the hidden states. The MLP is a child of the layer that owns matrices
and takes hidden states alone; or, where it is no module of its own, the two matrices outside of what mixes tokens, one of
which takes what the other gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError

MIXING = ("mask", "position", "past_key", "cache", "state")
"""What the names of arguments hold that let a module look from one token to another. `hidden_states` is no such name."""


class LayerMlp(NamedTuple):
    """What a layer runs token by token. down: the second matrix, where `first` is but the first one."""

    first: nn.Module
    down: nn.Module | None
    followers: tuple[nn.Module, ...]  # norms, dropout, activations of the layer, which may follow it


class ModelParts(NamedTuple):
    model: PreTrainedModel  # the one with the head, inside of what wraps it (adapters, DDP)
    head: nn.Module
    layers: list[nn.Module]


def find_parts(model: nn.Module) -> ModelParts:
    """Head and decoder layers of a causal language model. Raises ModelError naming what was not found."""
    name = type(model).__name__
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel) and (head := inner.get_output_embeddings()) is not None:
            break
    else:
        raise ModelError(
            f"{name} has no LM head (get_output_embeddings() gave none).\nminisequence serves transformers' causal language models."
        )
    decoder: Any = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    for part in (decoder, inner):
        layers = [m for m in part.modules() if isinstance(m, GradientCheckpointingLayer)] if part is not None else []
        if layers:
            return ModelParts(inner, head, layers)
    layers = list(max((m for m in inner.modules() if isinstance(m, nn.ModuleList)), key=len, default=[]))
    if len(layers) > 1 and not inner.supports_gradient_checkpointing:
        return ModelParts(inner, head, layers)
    raise ModelError(f"{name} has no decoder layers (transformers' GradientCheckpointingLayer, or a list of layers).")


def layers_of_towers(parts: ModelParts) -> list[nn.Module]:
    """Layers of towers of images or sound, in the order of the model: transformers' checkpointable layers outside of the decoder's."""
    text = set(parts.layers)
    return [m for m in parts.model.modules() if isinstance(m, GradientCheckpointingLayer) and m not in text]


def find_mlps(parts: ModelParts, layers: Sequence[nn.Module] | None = None) -> list[tuple[nn.Module, LayerMlp]]:
    """Layers, all or some, and their MLPs; layers that only mix tokens have none. Raises ModelError when no layer of all has one, or
    when a layer owns matrices that are neither."""
    mlps = {
        mlp.first: (layer, mlp)
        for layer in (parts.layers if layers is None else layers)
        for part in _layer_and_sublayers(layer)
        for mlp in _layer_mlps(parts.model, part)
    }
    if not mlps and layers is None:
        kinds = ", ".join(sorted({type(child).__name__ for child in parts.layers[0].children()}))
        raise ModelError(
            f"{type(parts.model).__name__}: no MLP found in {type(parts.layers[0]).__name__}, whose parts are {kinds}.\nSet mlp_chunks=1."
        )
    return list(mlps.values())


def _layer_mlps(model: nn.Module, layer: nn.Module) -> list[LayerMlp]:
    outside = list(_modules_outside_mixers(layer))
    followers = tuple(m for m in outside if takes_tokens_alone(m) and not count_matrices(m))
    children = [part for child in layer.children() for part in (child if isinstance(child, nn.ModuleList) else [child])]
    modules = [child for child in children if count_matrices(child) > 1 and takes_tokens_alone(child)]
    served = {id(p) for module in modules for p in module.parameters()}
    if any(p.dim() == 3 and id(p) not in served for part in outside for p in part.parameters(recurse=False)):
        raise ModelError(
            f"{type(model).__name__}: the experts of {type(layer).__name__} are given more than hidden states.\nSet mlp_chunks=1."
        )
    if modules:
        return [LayerMlp(module, None, tuple(m for m in followers if not _is_inside(m, modules))) for module in modules]
    linears = [m for m in outside if _is_linear(m)]
    pairs = [(a, b) for a, b in combinations(linears, 2) if _matrix_sizes(a) == _matrix_sizes(b)[::-1]]
    if not pairs:
        return []
    if len(linears) == 2:
        return [LayerMlp(*pairs[0], followers)]
    raise ModelError(
        f"{type(model).__name__}: {len(linears)} matrices of {type(layer).__name__} stand by themselves, none of them known as the MLP."
        "\nSet mlp_chunks=1."
    )


def _layer_and_sublayers(layer: nn.Module) -> list[nn.Module]:
    """The layer, and what in it is a layer too: it mixes tokens in one part and works token by token in another."""
    layers = [layer]
    for part in layer.modules():
        children = list(part.children())
        attends = any(mixes_tokens(c) and not isinstance(c, nn.modules.conv._ConvNd) for c in children)
        if part is not layer and attends and any(count_matrices(c) > 1 and takes_tokens_alone(c) for c in children):
            layers.append(part)
    return layers


def _is_inside(module: nn.Module, others: list[nn.Module]) -> bool:
    return any(module is part for other in others for part in other.modules())


def _modules_outside_mixers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if not mixes_tokens(child):
            yield child
            yield from _modules_outside_mixers(child)


def mixes_tokens(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return True
    names = inspect.signature(module.forward).parameters
    return any(part in name for name in names if not name.endswith("hidden_states") for part in MIXING)


def takes_tokens_alone(module: nn.Module) -> bool:
    """Does it take one tensor and nothing by which to look at other tokens?"""
    parameters = inspect.signature(module.forward).parameters.values()
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(required) == 1 and not mixes_tokens(module)


def count_matrices(module: nn.Module) -> int:
    """How many it owns; a stack of matrices, such as experts', is several."""
    return sum(p.dim() - 1 for p in module.parameters() if p.dim() >= 2)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def _matrix_sizes(linear: Any) -> tuple[int, int]:
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)
