"""Recipes in so many pieces, for tests of each strategy."""

from __future__ import annotations

from functools import cache

from mstplan.errors import RecipeError
from mstplan.plan.layout import check_counted, pieces_that_there_are
from mstplan.plan.solve import fixed_chunks
from mstplan.spec.model import Model
from mstplan.step.recipe import STRATEGIES, Recipe

IN_PIECES = {"mst-layer", "mst-layer-offload"}
REFUSED = {
    "codestral-mamba-7b": IN_PIECES,
    "deepseek-v3.2": IN_PIECES,
    "falcon-h1-0.5b": IN_PIECES,
    "gemma3n-e2b": {*IN_PIECES, "checkpoint-sqrt"},
    "gemma3n-e4b": {*IN_PIECES, "checkpoint-sqrt"},
    "gemma4-e2b": {*IN_PIECES, "checkpoint-sqrt"},
    "gemma4-e4b": {*IN_PIECES, "checkpoint-sqrt"},
    "mamba2-2.7b": IN_PIECES,
}
"""What the formula does not count of models that ship; what max-seq shows without being asked for more it counts of all."""


@cache
def counted_strategies(model: Model) -> dict[str, Recipe]:
    """Strategies that the formula counts for a model, by name, an MLP in pieces only where there is one."""
    return {
        name: pieces_that_there_are(model, recipe) for name, recipe in STRATEGIES.items() if is_counted(model, recipe)
    }


def is_counted(model: Model, recipe: Recipe) -> bool:
    try:
        check_counted(model, recipe)
    except RecipeError:
        return False
    return True


def in_chunks(recipe: Recipe, mlp: int, loss: int) -> Recipe:
    """The recipe with so many chunks where it leaves their numbers to us ("auto")."""
    return fixed_chunks(recipe, mlp, loss).put_into(recipe)
