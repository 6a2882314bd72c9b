"""Recipes in so many pieces, for tests of each strategy."""

from __future__ import annotations

from mstplan.plan.solve import fixed_chunks
from mstplan.step.recipe import Recipe


def in_chunks(recipe: Recipe, mlp: int, loss: int) -> Recipe:
    """The recipe with so many chunks where it leaves their numbers to us ("auto")."""
    return fixed_chunks(recipe, mlp, loss).put_into(recipe)
