"""What bitsandbytes' optimizers have in common (bitsandbytes/optim/optimizer.py): each weight is stepped in place, by one kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import MissingError
from ..selection import WeightKind
from .base import Held, Optimizer

if TYPE_CHECKING:
    import torch

    from ..recipe import Recipe
    from ..selection import Kinds
    from ..tape import Weight
    from .base import KindsOf, Make

BLOCK = 256  # values that share one scale (init_state's blocksize)
SMALL = 4096  # weights below this many values keep fp32 states (min_8bit_size)
PAGED = 100_000  # values from which on states of a paged optimizer are in managed memory (get_state_buffer)
CODE_BOOK = 1024  # bytes: 256 fp32 values that codes of 8 bits stand for (create_dynamic_map)


class Bitsandbytes(Optimizer):
    """moments: how many it keeps. bits: of theirs.

    Where it is paged, states of large weights are in CUDA's managed memory, which the driver moves to CPU RAM when the card is full.
    They are counted as the card's, for every step brings back what has moved out.
    """

    theirs: ClassVar[str]
    """What bitsandbytes calls it."""
    moments: ClassVar[int]
    bits: ClassVar[int] = 8
    no_shards = "bitsandbytes' kernels know no shards"

    def is_eight_bit(self, recipe: Recipe, numel: int, kinds: Kinds) -> bool:
        """Whether states of a weight of so many values are in 8 bits."""
        is_fp32 = recipe.fp32_embedding_states and WeightKind.EMBEDDINGS in kinds
        return self.bits == 8 and numel >= SMALL and not is_fp32

    def states(self, recipe: Recipe, weight: Weight) -> tuple[Held, ...]:
        """A moment of one byte for each value, with an fp32 scale per block; or in fp32, whatever dtype the weights have."""
        numel, keys = weight.numel, ("state1", "state2")[: self.moments]
        managed = self.paged and numel >= PAGED
        where = " in managed memory" if managed else ""
        if not self.is_eight_bit(recipe, numel, weight.kinds):
            whose = "" if self.bits == 32 else " of small weights" if numel < SMALL else " of embeddings"
            size = 4 * numel * self.moments
            name = f"fp32 moments{whose}{where}"
            return (Held(name, "float32", size, keys, self.moments, managed=managed),)
        scales = 4 * -(-numel // BLOCK) * self.moments
        return (
            Held("8-bit moments" + where, "uint8", numel * self.moments, keys, self.moments, managed=managed),
            Held("scales of 8-bit moments", "float32", scales, ("absmax1", "absmax2")[: self.moments], self.moments),
        )

    def shared_states(self, recipe: Recipe, weights: Sequence[Weight]) -> tuple[Held, ...]:
        """What codes stand for: one table for each moment."""
        if not any(self.is_eight_bit(recipe, weight.numel, weight.kinds) for weight in weights):
            return ()
        keys = ("qmap1", "qmap2")[: self.moments]
        return (Held("code books", "float32", CODE_BOOK * self.moments, keys, self.moments),)

    def make(self, recipe: Recipe, kinds_of: KindsOf) -> Make:
        try:
            optim: Any = import_module("bitsandbytes.optim")
        except ImportError:
            raise MissingError(f"{self.label} needs bitsandbytes: pip install bitsandbytes") from None

        def make(weights: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
            listed = list(weights)
            if recipe.fp32_embedding_states:  # as transformers' Trainer does for every nn.Embedding
                embeddings = [weight for weight in listed if WeightKind.EMBEDDINGS in kinds_of(weight)]
                optim.GlobalOptimManager.get_instance().override_config(embeddings, "optim_bits", 32)
            made: torch.optim.Optimizer = getattr(optim, self.theirs)(listed, lr=1e-5)
            return made

        return make
