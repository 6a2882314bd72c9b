"""torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from .base import Memory, Optimizer, largest_of, numel_of

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
    torch_states: ClassVar[dict[str, str]] = {"AdamW first moment": "exp_avg", "AdamW second moment": "exp_avg_sq"}

    def memory(self, recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> Memory:
        """Two moments in the weights' dtype. step(): the square root of the second moment, for all weights at once
        (foreach, torch/optim/adam.py _multi_tensor_adam) or, with its quotient, for one (for-loop); none when fused."""
        size, dtype, total = recipe.weight_bytes, recipe.weight_dtype, numel_of(weights)
        states = tuple((name, dtype, size * total) for name in self.torch_states)
        if recipe.adamw_kernel == "fused":
            return Memory(states, (), 0)
        if recipe.adamw_kernel == "foreach":
            return Memory(states, (("square root of the second moment", dtype, size * total),), size)
        root = ("square root of one second moment, and its quotient", dtype, 2 * size * largest_of(weights))
        return Memory(states, (root,), 2 * size)

    def make(self, recipe: Recipe) -> Make:
        import torch

        foreach, fused = recipe.adamw_kernel == "foreach", self.is_fused(recipe) or None
        return lambda weights: torch.optim.AdamW(weights, lr=1e-5, foreach=foreach, fused=fused)

    def is_fused(self, recipe: Recipe) -> bool:
        return recipe.adamw_kernel == "fused"
