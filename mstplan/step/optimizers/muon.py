"""torch.optim.Muon for the matrices of layers, and torch's AdamW for embeddings, head and what is no matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import MissingError
from ..selection import WeightKind
from .adamw import AdamW
from .base import Held, Optimizer, bytes_of, dtype_of, itemsize_of

if TYPE_CHECKING:
    import torch

    from ..recipe import Recipe
    from ..selection import Kinds
    from ..tape import Weight
    from .base import KindsOf, Make

_REST = AdamW()
_BF16 = 2  # bytes


def is_for_muon(shape: Sequence[int], kinds: Kinds) -> bool:
    """Whether Muon steps a weight."""
    return len(shape) == 2 and not kinds & {WeightKind.EMBEDDINGS, WeightKind.HEAD}


class Muon(Optimizer):
    name = "muon"
    label = "torch's Muon"
    short = "Muon"
    host_state_bytes = 8
    no_shards = "its steps multiply whole matrices"
    has_kernels = True

    def states(self, recipe: Recipe, weight: Weight) -> tuple[Held, ...]:
        """A momentum in the weights' dtype; of the rest AdamW's moments."""
        if not is_for_muon(weight.shape, weight.kinds):
            return _REST.states(recipe, weight)
        size = itemsize_of(recipe, weight) * weight.numel
        return (Held("Muon momentum", dtype_of(recipe, weight), size, ("momentum_buffer",)),)

    def one_step(self, recipe: Recipe, weight: Weight) -> tuple[Held, ...]:
        """Newton-Schulz (torch/optim/_muon.py): the update in the weights' dtype, two generations of the matrix that is made
        orthogonal in bf16, its Gram matrix, and the polynomial of that."""
        if not is_for_muon(weight.shape, weight.kinds):
            return _REST.one_step(recipe, weight)
        numel, side = weight.numel, min(weight.shape)
        return (
            Held("update of one matrix", dtype_of(recipe, weight), itemsize_of(recipe, weight) * numel),
            Held("one matrix on the way to an orthogonal one", "bfloat16", 2 * _BF16 * numel, copies=2),
            Held("Gram matrix and its polynomial", "bfloat16", 2 * _BF16 * side * side, copies=2),
        )

    def step(self, recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> tuple[Held, ...]:
        """Muon's step, then AdamW's."""
        rest = [(weight, n) for weight, n in weights if not is_for_muon(weight.shape, weight.kinds)]
        matrices = [(weight, n) for weight, n in weights if is_for_muon(weight.shape, weight.kinds)]
        return max(super().step(recipe, matrices), _REST.step(recipe, rest), key=bytes_of)

    def asks_kinds(self, recipe: Recipe) -> bool:
        return True

    def make(self, recipe: Recipe, kinds_of: KindsOf) -> Make:
        from torch import optim

        if not hasattr(optim, "Muon"):
            raise MissingError("torch's Muon needs torch 2.9 or later: pip install --upgrade torch")
        make_rest = _REST.make(recipe, kinds_of)

        def make(weights: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
            listed = list(weights)
            matrices = [weight for weight in listed if is_for_muon(weight.shape, kinds_of(weight))]
            rest = [weight for weight in listed if not is_for_muon(weight.shape, kinds_of(weight))]
            made = ([optim.Muon(matrices, lr=1e-3)] if matrices else []) + ([make_rest(rest)] if rest else [])
            return made[0] if len(made) == 1 else _Several(made)  # type: ignore[return-value]

        return make

    def keys_on_host(self, recipe: Recipe) -> frozenset[str]:
        return _REST.keys_on_host(recipe)

    def is_fused(self, recipe: Recipe) -> bool:
        return _REST.is_fused(recipe)


class _Several:
    """Optimizers that step one after the other."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for each in self.optimizers for group in each.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        return {weight: state for each in self.optimizers for weight, state in each.state.items()}

    def step(self) -> None:
        for each in self.optimizers:
            each.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for each in self.optimizers:
            each.zero_grad(set_to_none)
