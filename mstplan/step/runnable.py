"""Which recipes a real training step can follow, on fake tensors or on a device. No torch."""

from __future__ import annotations

from ..errors import RecipeError
from .losses import LOSSES
from .optimizers import OPTIMIZERS
from .recipe import Recipe


def check_runnable(recipe: Recipe) -> None:
    """Check that a step here can follow the recipe. Raises RecipeError with the reason."""
    if "auto" in (recipe.mlp_chunks, recipe.loss_chunks):
        raise RecipeError("a training step needs numbers of chunks, not 'auto'.")
    running = ", ".join(name for name, each in OPTIMIZERS.items() if each.runs)
    for bad, why in (
        (
            recipe.optimizer_on_host or recipe.weights_on_host,
            "the step that is run keeps weights and optimizer on its device",
        ),
        (
            not OPTIMIZERS[recipe.optimizer].runs,
            f"the step that is run has no {recipe.optimizer} ({running} run)",
        ),
        (
            bool(LOSSES[recipe.loss].not_run),
            LOSSES[recipe.loss].not_run,
        ),
        (
            not recipe.mlp_recompute and recipe.mlp_chunks != 1,
            "the step that is run recomputes each MLP chunk by itself, so --no-recompute is not for it",
        ),
    ):
        if bad:
            raise RecipeError(f"{why}.\nPlan this recipe with the formula rung: mstplan max-seq, mstplan plan.")
