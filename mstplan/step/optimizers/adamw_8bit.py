"""bitsandbytes' AdamW8bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .base import Held, Memory, Optimizer, numel_of

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tape import Weight

BLOCK = 256  # values that share one scale in bitsandbytes' 8-bit states (bitsandbytes/optim/optimizer.py)
SMALL = 4096  # weights below this many values keep fp32 states there (min_8bit_size)


class AdamW8bit(Optimizer):
    name = "adamw-8bit"
    label = "bitsandbytes' AdamW8bit"
    short = "8-bit AdamW"
    gives_up = "exact moments"
    host_state_bytes = 8
    steps_shards = False
    runs = False

    def memory(self, recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> Memory:
        """Two states of one byte with an fp32 scale per block; small weights keep fp32 states."""
        small = sum(weight.numel * count for weight, count in weights if weight.numel < SMALL)
        large = numel_of(weights) - small
        scales = sum(4 * -(-weight.numel // BLOCK) * count for weight, count in weights if weight.numel >= SMALL)
        states = (Held("8-bit moments", "uint8", 2 * large), Held("scales of 8-bit moments", "float32", 2 * scales))
        return Memory((*states, Held("fp32 moments of small weights", "float32", 8 * small)), (), 0)
