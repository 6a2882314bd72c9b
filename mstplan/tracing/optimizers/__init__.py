"""Stand-ins for optimizers whose kernels know no fake tensors, a file for each package: they keep and make what theirs do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...step.optimizers import OPTIMIZERS
from ...step.optimizers.bitsandbytes import Bitsandbytes
from ...step.optimizers.torchao import Torchao
from .bitsandbytes import FakeBitsandbytes
from .torchao import FakeTorchao

if TYPE_CHECKING:
    from ...step.optimizers.base import KindsOf, Make
    from ...step.recipe import Recipe


def make_fake_optimizer(recipe: Recipe, kinds_of: KindsOf) -> Make:
    """A function from weights to the recipe's optimizer, or to what stands in for it on fake tensors."""
    optimizer = OPTIMIZERS[recipe.optimizer]
    if isinstance(optimizer, Bitsandbytes):
        return lambda weights: FakeBitsandbytes(weights, optimizer, recipe, kinds_of)
    if isinstance(optimizer, Torchao):
        return lambda weights: FakeTorchao(weights, optimizer)
    return optimizer.make(recipe, kinds_of)
