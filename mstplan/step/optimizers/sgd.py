"""torch.optim.SGD without momentum or weight decay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Held, Optimizer

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tape import Weight
    from .base import KindsOf, Make


class Sgd(Optimizer):
    name = "sgd"
    label = "torch's SGD"
    short = "SGD"
    trainer = "sgd"

    def states(self, recipe: Recipe, weight: Weight) -> tuple[Held, ...]:
        """Nothing: it updates in place."""
        return ()

    def make(self, recipe: Recipe, kinds_of: KindsOf) -> Make:
        import torch

        return lambda weights: torch.optim.SGD(weights, lr=1e-5, foreach=recipe.adamw_kernel != "for-loop")
