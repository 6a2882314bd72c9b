"""Parameter counts, total, active and trained: the weights that the layers' operations use, each counted once."""

from __future__ import annotations

from functools import lru_cache

from ..spec.model import Model
from .recipe import STRATEGIES, Recipe
from .steps import Layout, build
from .tape import step_weights


@lru_cache(maxsize=256)
def parameter_count(model: Model) -> tuple[int, int]:
    """(all parameters, those that one token uses): a routed expert counts by its share of the experts chosen. Of a module that the
    formula does not know, all for both."""
    if model.stand_in is not None:
        return model.stand_in.parameters, model.stand_in.parameters
    weights = step_weights(build(model, Layout(STRATEGIES["standard"], False, False, False)).ops)
    total = sum(weight.numel * n for weight, n in weights)
    active = sum(weight.numel * weight.active[0] // weight.active[1] * n for weight, n in weights)
    return total + sum(tower.parameters for tower in model.towers), active


@lru_cache(maxsize=256)
def trained_count(model: Model, recipe: Recipe) -> int:
    """Parameters that a recipe trains. Raises RecipeError for patterns that match none."""
    fields = ("images", "train", "freeze", "lora_rank", "lora_targets", "lora_modules_to_save", "dora", "quantize")
    chosen = STRATEGIES["standard"].changed(**{field: getattr(recipe, field) for field in fields})
    weights = step_weights(build(model, Layout(chosen, False, False, False)).ops)
    return sum(weight.numel * n for weight, n in weights if weight.trained)
