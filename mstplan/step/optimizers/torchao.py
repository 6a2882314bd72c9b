"""What torchao's quantised optimizers have in common (torchao/optim/adam.py, subclass_4bit.py, subclass_8bit.py)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import MissingError
from .base import Held, Optimizer, dtype_of, itemsize_of

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tape import Weight
    from .base import KindsOf, Make

SMALL = 4096  # weights below this many values keep states in their own dtype (_new_buffer)
KEYS = tuple(f"{moment}.{part}" for part in ("codes", "scale", "qmap") for moment in ("exp_avg", "exp_avg_sq"))
"""As the trace calls the tensors that a state is made of, codes first."""


class Torchao(Optimizer):
    """bits: of a moment's codes; block: values that share an fp32 scale. Each weight is stepped by compiled code."""

    theirs: ClassVar[str]
    """What torchao calls it."""
    bits: ClassVar[int]
    block: ClassVar[int]

    def is_quantised(self, numel: int) -> bool:
        """Whether the states of a weight of so many values are."""
        return numel >= SMALL and numel % self.block == 0

    def states(self, recipe: Recipe, weight: Weight) -> tuple[Held, ...]:
        """Codes, scales and a code book of each moment; or moments in the weights' dtype."""
        n, dtype = weight.numel, dtype_of(recipe, weight)
        if not self.is_quantised(n):
            size = 2 * n * itemsize_of(recipe, weight)
            return (Held(f"moments of small weights, {dtype}", dtype, size, ("exp_avg", "exp_avg_sq"), 2),)
        moments = f"{self.bits}-bit moments"
        return (
            Held(moments, "uint8", 2 * n * self.bits // 8, KEYS[:2], 2, words=f"{self.bits}-bit"),
            Held(f"scales of {moments}", "float32", 2 * 4 * n // self.block, KEYS[2:4], 2),
            Held("code books", "float32", 2 * 4 * 2**self.bits, KEYS[4:], 2),
        )

    def one_step(self, recipe: Recipe, weight: Weight) -> tuple[Held, ...]:
        """Both moments in fp32 and their new scales, which the compiled code makes before it codes them (copy_ of the states)."""
        n = weight.numel
        if not self.is_quantised(n):
            return ()
        scales = Held("new scales of one weight's moments", "float32", 2 * 4 * n // self.block, copies=2)
        return scales, Held("fp32 moments of one weight", "float32", 2 * 4 * n, copies=2)

    def make(self, recipe: Recipe, kinds_of: KindsOf) -> Make:
        try:
            optim: Any = import_module("torchao.optim")
        except ImportError:
            raise MissingError(f"{self.label} needs torchao: pip install torchao") from None
        return lambda weights: getattr(optim, self.theirs)(weights, lr=1e-5)

    def keys_on_host(self, recipe: Recipe) -> frozenset[str]:
        """The count of steps, a CPU tensor."""
        return frozenset({"step"})
