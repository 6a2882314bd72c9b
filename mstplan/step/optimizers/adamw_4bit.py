"""torchao's AdamW4bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Held
from .torchao import Torchao

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tape import Weight


class AdamW4bit(Torchao):
    name = "adamw-4bit"
    label = "torchao's AdamW4bit"
    short = "4-bit AdamW"
    host_state_bytes = 8
    no_shards = "its blocks and codes are planned for whole weights"
    trainer = "adamw_torch_4bit"
    theirs = "AdamW4bit"
    bits = 4
    block = 128

    def one_step(self, recipe: Recipe, weight: Weight) -> tuple[Held, ...]:
        """Codes too, as int64 before two go into a byte (quantize_4bit_with_qmap): 24 bytes for each value of the weight in all."""
        n = weight.numel
        codes = Held("codes of one weight's moments", "int64", 2 * 8 * n, copies=2)
        return (*super().one_step(recipe, weight), codes) if self.is_quantised(n) else ()
