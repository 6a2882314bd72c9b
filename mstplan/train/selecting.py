"""Freezing what a recipe does not train: a `Selection` applied to a transformers model."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..step.selection import Kinds, Named, Selection, WeightKind
from .locate import find_parts, mixes


def freeze(model: PreTrainedModel, selection: Selection) -> None:
    """Let only the weights that are selected get gradients, in place. Raises RecipeError for a pattern that matches none."""
    if not selection:
        return
    named = named_weights(model)
    selection.check(list(named.values()), type(model).__name__)
    for weight, known in named.items():
        weight.requires_grad_(weight.requires_grad and selection.trains(known))


def named_weights(model: PreTrainedModel) -> dict[nn.Parameter, Named]:
    """The names and kinds of a model's weights; tied ones have those of all their uses."""
    kinds = _kinds_of_modules(model)
    found: dict[nn.Parameter, Named] = {}
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            before = found.get(weight, Named((), frozenset()))
            whole = f"{path}.{name}" if path else name
            found[weight] = Named((*before.names, whole), before.kinds | kinds.get(module, frozenset()))
    return found


def _kinds_of_modules(model: PreTrainedModel) -> dict[nn.Module, Kinds]:
    parts = find_parts(model)
    found: dict[nn.Module, Kinds] = {}
    for layer in parts.layers:
        mixing = {part for child in layer.modules() if child is not layer and mixes(child) for part in child.modules()}
        for module in layer.modules():
            found[module] = frozenset({WeightKind.ATTENTION if module in mixing else WeightKind.MLP})
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            found[module] = frozenset({WeightKind.NORMS})
        elif isinstance(module, nn.Embedding) and module not in found:
            found[module] = frozenset({WeightKind.EMBEDDINGS})
    for module in parts.head.modules():
        found[module] = frozenset({WeightKind.HEAD})
    return found
