"""Clipping of gradients by their norm, as torch.nn.utils.clip_grad_norm_ does it on a card (torch/nn/utils/clip_grad.py), or FSDP1's own
(torch/distributed/fsdp/fully_sharded_data_parallel.py)."""

from __future__ import annotations

from collections.abc import Sequence

from .optimizers.base import Held, by_mesh_of_cards, bytes_of, dtype_of, itemsize_of
from .recipe import Recipe
from .tape import Weight
from .workspaces import SumOverTokens

CHUNK = 65_536  # values whose squares one block of threads adds up (aten native/cuda/MultiTensorApply.cuh, kChunkSize)


def clipping(recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> tuple[Held, ...]:
    """What is made of the gradients of weights, given as (weight, how many): they are scaled in place, their norms are one number each.
    torch._foreach_norm adds up in fp32, with room in every tensor for as many parts as the largest has
    (aten native/cuda/ForeachReduceOp.cu, output_per_tensor)."""
    if recipe.max_grad_norm is None:
        return ()
    if recipe.flat:
        return _flat_clipping(weights)
    return max((_norms(recipe, group) for group in by_mesh_of_cards(recipe, weights)), key=bytes_of, default=())


def _norms(recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> tuple[Held, ...]:
    """What is made for those of one mesh, whose norm alone stays."""
    by_dtype: dict[str, list[tuple[Weight, int]]] = {}
    for weight, n in weights:
        by_dtype.setdefault(dtype_of(recipe, weight), []).append((weight, n))
    parts = max(_parts(group) for group in by_dtype.values())  # of one dtype after the other
    norms = [(itemsize_of(recipe, group[0][0]), dtype, sum(n for _, n in group)) for dtype, group in by_dtype.items()]
    return (
        Held("parts of gradients' norms", "float32", 4 * parts),
        *(Held("norms of gradients", dtype, size * count, copies=count) for size, dtype, count in norms),
    )


def _flat_clipping(weights: Sequence[tuple[Weight, int]]) -> tuple[Held, ...]:
    """The same under FSDP1: norms of one gradient after the other, in fp32 whatever their dtype, joined (_get_grad_norm)."""
    count = sum(n for _, n in weights)
    parts = max(parts_of_norm(weight.numel) for weight, _ in weights)
    return (
        Held("parts of a gradient's norm, or norms joined", "float32", max(parts, 4 * count)),
        Held("norms of gradients", "float32", 4 * count, copies=count),
    )


def parts_of_norm(numbers: int) -> int:
    """Bytes of what blocks of threads add up to one number (aten native/cuda/Reduce.cuh)."""
    return SumOverTokens(columns=1).bytes(numbers)


def _parts(weights: Sequence[tuple[Weight, int]]) -> int:
    """Numbers that there is room for while norms of the gradients of weights, given as (weight, how many), are made."""
    return sum(n for _, n in weights) * max(-(-weight.numel // CHUNK) for weight, _ in weights)
