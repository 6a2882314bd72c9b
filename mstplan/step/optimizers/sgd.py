"""torch.optim.SGD without momentum or weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .base import Memory, Optimizer

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tape import Weight
    from .base import Make


class Sgd(Optimizer):
    name = "sgd"
    label = "torch's SGD"
    short = "SGD"

    def memory(self, recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> Memory:
        """Nothing: it updates in place."""
        return Memory((), (), 0)

    def make(self, recipe: Recipe) -> Make:
        import torch

        return lambda weights: torch.optim.SGD(weights, lr=1e-5, foreach=recipe.adamw_kernel == "foreach")
