"""Optimizers, a file each: what they hold and make, counted from the weights' shapes, and how torch makes them.

Recipes, the command line's help, refusals, the formula, the trace and the comparison of both read `OPTIMIZERS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .adafactor import Adafactor
from .adamw import AdamW
from .adamw_8bit import AdamW8bit
from .base import Memory, Optimizer
from .sgd import Sgd

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tape import Weight

OPTIMIZERS: dict[str, Optimizer] = {each.name: each for each in (AdamW(), AdamW8bit(), Adafactor(), Sgd())}
"""By the name that recipes have for them."""


def stand_ins() -> dict[str, Optimizer]:
    """Optimizers with which a recipe of AdamW's may hold less, by name."""
    return {name: each for name, each in OPTIMIZERS.items() if each.gives_up}


def optimizer_memory(recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> Memory:
    """States and temporaries on the device of the recipe's optimizer over weights, given as (weight, how many)."""
    if recipe.optimizer_on_host:
        return Memory((), (), 0)
    return OPTIMIZERS[recipe.optimizer].memory(recipe, weights)


def host_states(recipe: Recipe, parameters: int) -> int:
    """Host bytes of an optimizer on the host: fp32 weights, its states, and the gradients as they arrive.

    Source: ZeRO-Offload's CPUAdam keeps 12 bytes per parameter (arXiv 2101.06840, section 4; DeepSpeed cpu_adam).
    """
    if not recipe.optimizer_on_host:
        return 0
    return parameters * (4 + OPTIMIZERS[recipe.optimizer].host_state_bytes + recipe.weight_bytes)
