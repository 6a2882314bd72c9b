"""torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..selection import WeightKind
from .base import OF_ALL, Held, Optimizer, bytes_of, dtype_of, itemsize_of, mesh_of

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tape import Weight
    from .base import KindsOf, Make


class AdamW(Optimizer):
    name = "adamw"
    label = "torch's AdamW"
    short = "AdamW"
    host_state_bytes = 8
    has_kernels = True

    def states(self, recipe: Recipe, weight: Weight) -> tuple[Held, ...]:
        """Two moments in the weights' dtype, and a count of steps where it is on the device."""
        size, dtype = itemsize_of(recipe, weight) * weight.numel, dtype_of(recipe, weight)
        return (
            *((Held("counts of steps", "float32", 4, ("step",)),) if self.is_fused(recipe) else ()),
            Held("AdamW first moment", dtype, size, ("exp_avg",)),
            Held("AdamW second moment", dtype, size, ("exp_avg_sq",)),
        )

    def one_step(self, recipe: Recipe, weight: Weight) -> tuple[Held, ...]:
        """The square root of the second moment (torch/optim/adam.py); in a loop its quotient, too; none when fused."""
        size, dtype = itemsize_of(recipe, weight) * weight.numel, dtype_of(recipe, weight)
        if recipe.adamw_kernel == "fused":
            return ()
        if recipe.adamw_kernel == "foreach":
            return (Held("square root of the second moment", dtype, size),)
        return (Held("square root of one second moment, and its quotient", dtype, 2 * size, copies=2),)

    def step(self, recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> tuple[Held, ...]:
        """foreach makes the square roots of all weights at once (_multi_tensor_adam): of one dtype after the other, and it holds those
        of one until it has those of the next. The loop holds the quotient of the weight before (_single_tensor_adam): in a mesh of matrices alone
        that is no small one."""
        if recipe.adamw_kernel == "for-loop" and any(mesh_of(recipe, weight) != OF_ALL for weight, _ in weights):
            first = weights[0][0]
            # of layers the last one's of the layer before
            before = [None if WeightKind.EMBEDDINGS in first.kinds else weights[-1][0], *(w for w, _ in weights)]
            held = (
                (*self.one_step(recipe, w), *((self._quotient(recipe, b),) if b is not None else ()))
                for (w, _), b in zip(weights, before, strict=False)
            )
            return max(held, key=bytes_of, default=())
        if recipe.adamw_kernel != "foreach":
            return super().step(recipe, weights)
        return tuple(held.times(count) for weight, count in weights for held in self.one_step(recipe, weight))

    def _quotient(self, recipe: Recipe, weight: Weight) -> Held:
        return Held(
            "quotient of the weight before", dtype_of(recipe, weight), itemsize_of(recipe, weight) * weight.numel
        )

    def traffic(self, recipe: Recipe, weights: int, states: int) -> int:
        """Eight passes but for the fused kernel (torch/optim/adam.py, _multi_tensor_adam and _single_tensor_adam): decay of the
        weights 2 tensors; lerp_ 3; mul_ 2; addcmul_ 3; sqrt 2; div 2; add_ 2; addcdiv_ 4. Moments have the weights' dtype."""
        return super().traffic(recipe, weights, states) if self.is_fused(recipe) else 20 * weights

    def make(self, recipe: Recipe, kinds_of: KindsOf) -> Make:
        import torch

        foreach, fused = recipe.adamw_kernel == "foreach", self.is_fused(recipe) or None
        return lambda weights: torch.optim.AdamW(weights, lr=1e-5, foreach=foreach, fused=fused)

    def keys_on_host(self, recipe: Recipe) -> frozenset[str]:
        """The count of steps, unless one kernel reads it (torch/optim/adam.py, _init_group)."""
        return frozenset() if self.is_fused(recipe) else frozenset({"step"})

    def is_fused(self, recipe: Recipe) -> bool:
        return recipe.adamw_kernel == "fused"
