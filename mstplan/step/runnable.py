"""Which recipes a real training step can follow, on fake tensors or on a device. No torch."""

from __future__ import annotations

from ..errors import RecipeError
from .losses import LOSSES
from .optimizers import OPTIMIZERS
from .recipe import Recipe

TRAINER_OPTIMIZERS = {
    ("adamw", "foreach"): "adamw_torch",
    ("adamw", "fused"): "adamw_torch_fused",
    ("adafactor", "foreach"): "adafactor",
    ("sgd", "foreach"): "sgd",
}
"""What transformers' TrainingArguments call an optimizer, by `optimizer` and `adamw_kernel` of a recipe."""


def check_trainer(recipe: Recipe) -> None:
    """Check that transformers' Trainer can follow the recipe as it is. Raises RecipeError with the reason."""
    for bad, why in (
        ((recipe.optimizer, recipe.adamw_kernel) not in TRAINER_OPTIMIZERS, "it has no such optimizer"),
        (recipe.optimizer_in_backward, "it steps after backward"),
        (recipe.checkpoint not in ("none", "layer"), "it checkpoints every layer, or none"),
        (recipe.loss != "transformers", "its loss is transformers' own"),
        (recipe.mlp_chunks != 1 or recipe.offload_layer_inputs, "it has no chunks and offloads nothing"),
        (recipe.sharded, "here it trains on one GPU"),
    ):
        if bad:
            raise RecipeError(
                f'transformers\' Trainer cannot follow this recipe: {why}.\nLeave "trainer" out, or change the recipe.'
            )


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
