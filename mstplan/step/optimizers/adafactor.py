"""transformers' Adafactor, as its Trainer makes it."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from .base import Held, Optimizer, itemsize_of

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tape import Weight
    from .base import KindsOf, Make

COPIES = {2: 4, 4: 2}  # by bytes of a weight: fp32 tensors of one weight's size alive at once


class Adafactor(Optimizer):
    name = "adafactor"
    label = "transformers' Adafactor"
    short = "Adafactor"
    gives_up = "Adam's updates"
    no_shards = "its rows and columns are those of whole matrices"
    trainer = "adafactor"

    def states(self, recipe: Recipe, weight: Weight) -> tuple[Held, ...]:
        """One row and one column of fp32 second moments per matrix, of a vector all; and the root mean square of its values."""
        name, rms = "factored second moments", Held("root mean square of a weight", "float32", 4, ("RMS",))
        keys = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")  # of a matrix the first two, of a vector the last
        if len(weight.shape) == 1:
            return Held(name, "float32", 4 * weight.numel, keys), rms
        return (*(Held(name, "float32", size, keys) for size in _factors(weight)), rms)

    def one_step(self, recipe: Recipe, weight: Weight) -> tuple[Held, ...]:
        """step() works on one weight at a time, in fp32 (transformers/optimization.py): its gradient and value cast to fp32 where they
        are bf16, the square of the gradient, and what is made of rows and columns in its place (_approx_sq_grad, which holds the
        factors of both)."""
        copies = COPIES[itemsize_of(recipe, weight)]
        copied = Held("fp32 working copies of one weight", "float32", copies * 4 * weight.numel, copies=copies)
        if len(weight.shape) == 1:
            return (copied,)
        return (copied, *(Held("factors of rows and columns", "float32", size) for size in _factors(weight)))

    def traffic(self, recipe: Recipe, weights: int, states: int) -> int:
        """Bytes of a matrix's element in step() (transformers/optimization.py), in fp32: norm of the weights 4, square 8, + eps 8,
        two means 8, outer product 4, times gradient 12, norm 4, div_ 8, mul_ 8, negation 8, add_ 12; of bf16 weights, gradient
        and weight cast to fp32 and the weight back 18."""
        size = recipe.weight_bytes
        return weights // size * (84 + (18 if size == 2 else 0))

    def make(self, recipe: Recipe, kinds_of: KindsOf) -> Make:
        from transformers.optimization import Adafactor as TheirAdafactor

        return lambda weights: TheirAdafactor(weights, lr=1e-5, scale_parameter=False, relative_step=False)


def _factors(weight: Weight) -> tuple[int, int]:
    """Bytes of one fp32 number for each row, and for each column."""
    *batch, rows, columns = weight.shape
    return 4 * prod(batch) * rows, 4 * prod(batch) * columns
