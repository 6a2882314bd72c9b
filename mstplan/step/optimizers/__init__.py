"""Optimizers, a file each: what they hold and make, counted from the weights' shapes, and how torch makes them.

Recipes, the command line's help, refusals, the formula, the trace and the comparison of both read `OPTIMIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from ..meshes import by_mesh
from .adafactor import Adafactor
from .adamw import AdamW
from .adamw_4bit import AdamW4bit
from .adamw_8bit import AdamW8bit
from .adamw_8bit_torchao import TorchaoAdamW8bit
from .base import Held, Memory, Optimizer, bytes_of, mesh_of
from .lion import Lion
from .lion_8bit import Lion8bit
from .muon import Muon
from .paged_adamw import PagedAdamW
from .paged_adamw_8bit import PagedAdamW8bit
from .sgd import Sgd

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tape import Weight

OPTIMIZERS: dict[str, Optimizer] = {
    each.name: each
    for each in (
        AdamW(),
        AdamW8bit(),
        PagedAdamW8bit(),
        PagedAdamW(),
        TorchaoAdamW8bit(),
        AdamW4bit(),
        Adafactor(),
        Sgd(),
        Muon(),
        Lion(),
        Lion8bit(),
    )
}
"""By the name that recipes have for them."""


def stand_ins() -> dict[str, Optimizer]:
    """Optimizers with which a recipe of AdamW's may hold less, by name."""
    return {name: each for name, each in OPTIMIZERS.items() if each.gives_up}


def optimizer_memory(recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> Memory:
    """States and temporaries on the device of the recipe's optimizer over weights, given as (weight, how many)."""
    return Memory() if recipe.optimizer_on_host else OPTIMIZERS[recipe.optimizer].memory(recipe, weights)


def states_in_order(recipe: Recipe, weights: Sequence[Weight]) -> list[Held]:
    """States on the device as the first step makes them, one weight's after another's; what all share comes first."""
    if recipe.optimizer_on_host:
        return []
    optimizer = OPTIMIZERS[recipe.optimizer]
    groups = [[weight] for weight in weights] if recipe.optimizer_in_backward else [weights]  # of an optimizer each
    groups = [part for group in groups for part in by_mesh(group, lambda weight: mesh_of(recipe, weight))]
    return [
        held
        for group in groups
        for made in (optimizer.shared_states(recipe, group), *(optimizer.states(recipe, weight) for weight in group))
        for held in made
    ]


@lru_cache(maxsize=256)
def bytes_to_step(recipe: Recipe) -> Callable[[Weight], int]:
    """A function from a weight to the bytes of what is made while the recipe's optimizer steps it alone. The same for the same recipe."""
    optimizer = OPTIMIZERS[recipe.optimizer]
    return lambda weight: bytes_of(optimizer.one_step(recipe, weight))


def host_states(recipe: Recipe, parameters: int) -> int:
    """Host bytes of an optimizer on the host: fp32 weights, its states, and the gradients as they arrive.

    Source: ZeRO-Offload's CPUAdam keeps 12 bytes per parameter (arXiv 2101.06840, section 4; DeepSpeed cpu_adam).
    """
    if not recipe.optimizer_on_host:
        return 0
    return parameters * (4 + OPTIMIZERS[recipe.optimizer].host_state_bytes + recipe.weight_bytes)
