"""transformers' Adafactor, as its Trainer makes it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from .base import Held, Memory, Optimizer, largest_of

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tape import Weight
    from .base import Make

COPIES = {2: 4, 4: 2}  # by bytes of a weight: fp32 tensors of one weight's size alive at once


class Adafactor(Optimizer):
    name = "adafactor"
    label = "transformers' Adafactor"
    short = "Adafactor"
    gives_up = "Adam's updates"
    steps_shards = False

    def memory(self, recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> Memory:
        """One row and one column of fp32 second moments per matrix.

        step() works on one weight at a time, in fp32 (transformers/optimization.py): its gradient and value cast to
        fp32 where they are bf16, the update, and two temporaries of it.
        """
        state_bytes = 0
        for weight, count in weights:
            *batch, rows, columns = weight.shape if len(weight.shape) > 1 else (1, *weight.shape)
            state_bytes += 4 * count * (prod(batch) * (rows + columns) if len(weight.shape) > 1 else columns)
        per_weight = COPIES[recipe.weight_bytes] * 4
        temporaries = (Held("fp32 working copies of one weight", "float32", per_weight * largest_of(weights)),)
        keys = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")  # of a matrix the first two, of a vector the last
        return Memory((Held("factored second moments", "float32", state_bytes, keys),), temporaries, per_weight)

    def traffic(self, recipe: Recipe, weights: int, states: int) -> int:
        """Bytes of a matrix's element in step() (transformers/optimization.py), in fp32: norm of the weights 4, square 8, + eps 8,
        two means 8, outer product 4, times gradient 12, norm 4, div_ 8, mul_ 8, negation 8, add_ 12; of bf16 weights, gradient
        and weight cast to fp32 and the weight back 18."""
        size = recipe.weight_bytes
        return weights // size * (84 + (18 if size == 2 else 0))

    def make(self, recipe: Recipe) -> Make:
        from transformers.optimization import Adafactor as TheirAdafactor

        return lambda weights: TheirAdafactor(weights, lr=1e-5, scale_parameter=False, relative_step=False)
