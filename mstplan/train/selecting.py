"""Freezing what a recipe does not train: a `Selection` applied to a transformers model."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from ..step.selection import Kinds, Named, Selection, WeightKind
from .locate import find_parts, mixes_tokens
from .text_part import tower_kind, towers_of

if TYPE_CHECKING:
    from ..step.optimizers.base import KindsOf


def freeze(model: PreTrainedModel, selection: Selection) -> None:
    """Let only the weights that are selected get gradients, in place. Raises RecipeError for a pattern that matches none."""
    if not selection:
        return
    names_by_weight = named_weights(model)
    selection.check(list(names_by_weight.values()), type(model).__name__)
    for weight, weight_names in names_by_weight.items():
        weight.requires_grad_(weight.requires_grad and selection.trains(weight_names))


def named_weights(model: PreTrainedModel) -> dict[nn.Parameter, Named]:
    """The names and kinds of a model's weights; tied ones have those of all their uses."""
    kinds = _kinds_of_modules(model)
    names_by_weight: dict[nn.Parameter, Named] = {}
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            earlier = names_by_weight.get(weight, Named((), frozenset()))
            full_name = f"{path}.{name}" if path else name
            names_by_weight[weight] = Named((*earlier.names, full_name), earlier.kinds | kinds.get(module, frozenset()))
    return names_by_weight


def kinds_in(model: PreTrainedModel) -> KindsOf:
    """A function from a weight of the model to its kinds, which are looked up once they are asked for."""
    names_by_weight = cache(lambda: named_weights(model))
    return lambda weight: names_by_weight()[weight].kinds


def _kinds_of_modules(model: PreTrainedModel) -> dict[nn.Module, Kinds]:
    parts = find_parts(model)
    kinds: dict[nn.Module, Kinds] = {}
    for layer in parts.layers:
        mixing = {
            part for child in layer.modules() if child is not layer and mixes_tokens(child) for part in child.modules()
        }
        for module in layer.modules():
            kinds[module] = frozenset({WeightKind.ATTENTION if module in mixing else WeightKind.MLP})
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            kinds[module] = frozenset({WeightKind.NORMS})
        elif isinstance(module, nn.Embedding) and module not in kinds:
            kinds[module] = frozenset({WeightKind.EMBEDDINGS})
    for module in parts.head.modules():
        kinds[module] = frozenset({WeightKind.HEAD})
    for path, tower in towers_of(parts.model).items():
        for name, module in tower.named_modules(prefix=path):
            kinds[module] = kinds.get(module, frozenset()) | {WeightKind(tower_kind(name))}
    return kinds
