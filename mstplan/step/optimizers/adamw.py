"""torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .base import Held, Memory, Optimizer, largest_of, numel_of

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tape import Weight
    from .base import Make


class AdamW(Optimizer):
    name = "adamw"
    label = "torch's AdamW"
    short = "AdamW"
    host_state_bytes = 8
    has_kernels = True

    def memory(self, recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> Memory:
        """Two moments in the weights' dtype. step(): the square root of the second moment, for all weights at once
        (foreach, torch/optim/adam.py _multi_tensor_adam) or, with its quotient, for one (for-loop); none when fused."""
        size, dtype, total = recipe.weight_bytes, recipe.weight_dtype, numel_of(weights)
        states = (
            Held("AdamW first moment", dtype, size * total, ("exp_avg",)),
            Held("AdamW second moment", dtype, size * total, ("exp_avg_sq",)),
        )
        if recipe.adamw_kernel == "fused":
            return Memory(states, (), 0)
        if recipe.adamw_kernel == "foreach":
            return Memory(states, (Held("square root of the second moment", dtype, size * total),), size)
        root = Held("square root of one second moment, and its quotient", dtype, 2 * size * largest_of(weights))
        return Memory(states, (root,), 2 * size)

    def traffic(self, recipe: Recipe, weights: int, states: int) -> int:
        """Eight passes but for the fused kernel (torch/optim/adam.py, _multi_tensor_adam and _single_tensor_adam): decay of the
        weights 2 tensors; lerp_ 3; mul_ 2; addcmul_ 3; sqrt 2; div 2; add_ 2; addcdiv_ 4. Moments have the weights' dtype."""
        return super().traffic(recipe, weights, states) if self.is_fused(recipe) else 20 * weights

    def make(self, recipe: Recipe) -> Make:
        import torch

        foreach, fused = recipe.adamw_kernel == "foreach", self.is_fused(recipe) or None
        return lambda weights: torch.optim.AdamW(weights, lr=1e-5, foreach=foreach, fused=fused)

    def keys_on_host(self, recipe: Recipe) -> frozenset[str]:
        """The count of steps, unless one kernel reads it (torch/optim/adam.py, _init_group)."""
        return frozenset() if self.is_fused(recipe) else frozenset({"step"})

    def is_fused(self, recipe: Recipe) -> bool:
        return recipe.adamw_kernel == "fused"
