"""Which recipes a real training step can follow, on fake tensors or on a device. No torch."""

from __future__ import annotations

from ..errors import RecipeError
from .losses import LOSSES
from .optimizers import OPTIMIZERS
from .recipe import Recipe

TRAINER_OPTIMIZERS = {
    ("adamw", "foreach"): "adamw_torch",
    ("adamw", "fused"): "adamw_torch_fused",
}
"""What transformers' TrainingArguments call an optimizer, by `optimizer` and `adamw_kernel` of a recipe, where the kernel counts."""


def trainer_optimizer(recipe: Recipe) -> str:
    """What transformers' TrainingArguments call the optimizer of a recipe; empty: they have none like it."""
    optimizer = OPTIMIZERS[recipe.optimizer]
    if recipe.fp32_embedding_states != optimizer.keeps_fp32_for_embeddings:
        return ""  # its Trainer has all keep them that can
    return optimizer.trainer or TRAINER_OPTIMIZERS.get((recipe.optimizer, recipe.adamw_kernel), "")


def check_trainer(recipe: Recipe) -> None:
    """Check that transformers' Trainer can follow the recipe as it is. Raises RecipeError with the reason."""
    for bad, why in (
        (not trainer_optimizer(recipe), "it has no such optimizer"),
        (recipe.optimizer_in_backward, "it steps after backward"),
        (recipe.checkpoint not in ("none", "layer"), "it checkpoints every layer, or none"),
        (recipe.loss != "transformers", "its loss is transformers' own"),
        (recipe.kernels != "torch", "it runs torch's kernels"),
        (recipe.mlp_chunks != 1 or recipe.offload != "none", "it has no chunks and offloads nothing"),
        (recipe.samples_in_row > 1, "it is given one sample a row"),
        (recipe.gpus > 1, "here it trains on one GPU"),
    ):
        if bad:
            raise RecipeError(
                f'transformers\' Trainer cannot follow this recipe: {why}.\nLeave "trainer" out, or change the recipe.'
            )


def check_runnable(recipe: Recipe) -> None:
    """Check that a step here can follow the recipe. Raises RecipeError with the reason."""
    if recipe.is_open:
        raise RecipeError("a training step needs numbers of chunks, not 'auto'.")
    for bad, why in (
        (
            bool(recipe.zero_stage),
            "DeepSpeed's ZeRO is planned by the formula alone: the trace and the step that is run are of FSDP2 and DDP",
        ),
        (
            (recipe.optimizer_on_host or recipe.weights_on_host) and not recipe.sharded,
            "the step that is run keeps weights and optimizer on its device",
        ),
        (
            bool(LOSSES[recipe.loss].not_run),
            LOSSES[recipe.loss].not_run,
        ),
        (
            recipe.kernels not in ("torch", "liger"),
            f"kernels of {recipe.kernels} are counted by the formula alone: the trace and the step that is run take the model's own code",
        ),
        (
            not recipe.mlp_recompute and recipe.mlp_chunks != 1,
            "the step that is run recomputes each MLP chunk by itself, so --no-recompute is not for it",
        ),
    ):
        if bad:
            raise RecipeError(f"{why}.\nPlan this recipe with the formula rung: mstplan max-seq, mstplan plan.")


def check_measurable(recipe: Recipe) -> None:
    """Check that a step here can follow the recipe on a device. Raises RecipeError with the reason."""
    check_runnable(recipe)
    if recipe.tensor_parallel > 1:
        raise RecipeError(
            "split matrices are planned and traced, and not run here.\nUse mstplan plan or mstplan trace, or leave --tensor-parallel out."
        )
    if recipe.expert_parallel > 1:
        raise RecipeError(
            "experts over several GPUs are planned and traced, and not run here.\nUse mstplan plan or mstplan trace, or leave --expert-parallel out."
        )
    if recipe.flat:
        raise RecipeError(
            "FSDP1 is planned and traced, and not run here.\nUse mstplan plan or mstplan trace, or --sharding fsdp, which is FSDP2."
        )
    if recipe.weights_on_host:
        raise RecipeError(
            "fsdp's weights in CPU RAM are planned and traced, and not run here.\nUse mstplan plan or mstplan trace, or leave --weights-on-host out."
        )
