"""What optimizers hold and make, counted from the weights' shapes. Bytes throughout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .recipe import Recipe
from .tape import Weight

BLOCK = 256  # values that share one scale in bitsandbytes' 8-bit states (bitsandbytes/optim/optimizer.py)
SMALL = 4096  # weights below this many values keep fp32 states there (min_8bit_size)


class Memory(NamedTuple):
    """An optimizer's tensors: (name, dtype, bytes) that stay, and that live during its step only."""

    states: tuple[tuple[str, str, int], ...]
    temporaries: tuple[tuple[str, str, int], ...]
    per_weight: int  # bytes of temporaries per element while a single weight is stepped


def optimizer_memory(recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> Memory:
    """States and temporaries on the device of `recipe.optimizer` over weights, given as (weight, how many)."""
    if recipe.optimizer_on_host:
        return Memory((), (), 0)
    build = {"adamw": _adamw, "adamw-8bit": _adamw_8bit, "adafactor": _adafactor, "sgd": _sgd}[recipe.optimizer]
    return build(recipe, weights)


def _total(weights: Sequence[tuple[Weight, int]]) -> int:
    return sum(weight.numel * count for weight, count in weights)


def _adamw(recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> Memory:
    """Two moments in the weights' dtype. step(): the square root of the second moment, for all weights at once (foreach,
    torch/optim/adam.py _multi_tensor_adam) or, with its quotient, for one (for-loop); none when fused."""
    size, dtype, total = recipe.weight_bytes, recipe.weight_dtype, _total(weights)
    states = (("AdamW first moment", dtype, size * total), ("AdamW second moment", dtype, size * total))
    if recipe.adamw_kernel == "fused":
        return Memory(states, (), 0)
    if recipe.adamw_kernel == "foreach":
        return Memory(states, (("square root of the second moment", dtype, size * total),), size)
    largest = max(weight.numel for weight, _ in weights)
    root = ("square root of one second moment, and its quotient", dtype, 2 * size * largest)
    return Memory(states, (root,), 2 * size)


def _adamw_8bit(recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> Memory:
    """bitsandbytes AdamW8bit: two states of one byte with an fp32 scale per block; small weights keep fp32 states."""
    small = sum(weight.numel * count for weight, count in weights if weight.numel < SMALL)
    large = _total(weights) - small
    scales = sum(4 * -(-weight.numel // BLOCK) * count for weight, count in weights if weight.numel >= SMALL)
    states = (("8-bit moments", "uint8", 2 * large), ("scales of 8-bit moments", "float32", 2 * scales))
    return Memory((*states, ("fp32 moments of small weights", "float32", 8 * small)), (), 0)


def _adafactor(recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> Memory:
    """transformers' Adafactor as its Trainer uses it: one row and one column of fp32 second moments per matrix.

    step() works on one weight at a time, in fp32 (transformers/optimization.py): its gradient and value cast to fp32
    where they are bf16, the update, and two temporaries of it.
    """
    held = 0
    for weight, count in weights:
        *batch, rows, columns = weight.shape if len(weight.shape) > 1 else (1, *weight.shape)
        outer = 1
        for size in batch:
            outer *= size
        held += 4 * count * (outer * (rows + columns) if len(weight.shape) > 1 else columns)
    per_weight = ADAFACTOR_COPIES[recipe.weight_bytes] * 4
    largest = max(weight.numel for weight, _ in weights)
    temporaries = (("fp32 working copies of one weight", "float32", per_weight * largest),)
    return Memory((("factored second moments", "float32", held),), temporaries, per_weight)


ADAFACTOR_COPIES = {2: 4, 4: 2}  # by bytes of a weight: fp32 tensors of one weight's size alive at once


def _sgd(recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> Memory:
    """torch.optim.SGD without momentum or weight decay: updates in place."""
    return Memory((), (), 0)


def host_states(recipe: Recipe, parameters: int) -> int:
    """Host bytes of an optimizer on the host: fp32 weights and two fp32 moments, and the gradients as they arrive.

    Source: ZeRO-Offload's CPUAdam keeps 12 bytes per parameter (arXiv 2101.06840, section 4; DeepSpeed cpu_adam).
    """
    if not recipe.optimizer_on_host:
        return 0
    states = {"adamw": 8, "adamw-8bit": 8, "adafactor": 0, "sgd": 0}[recipe.optimizer]
    return parameters * (4 + states + recipe.weight_bytes)
